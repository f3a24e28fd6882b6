"""Read and write config.json of the released format, for every family's config dataclass.

Every key of a config.json is one of: a field of the family's config under another name; a setting with only one
implemented value, any other being refused; or something irrelevant here, which is kept and written back.
"""

import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Extra = tuple[tuple[str, str], ...]
"""Keys that are irrelevant here, with their values as JSON text (so that a config stays hashable)."""


class ConfigError(ValueError):
    """Raised for a config.json that this version does not support; the message lists every problem."""


def require_folder(folder: Path) -> None:
    """Raise FileNotFoundError if there is no such checkpoint folder."""
    if folder.is_dir():
        return
    size = "" if len(folder.parts) > 1 else " Only `bestiary pretrain` takes the name of a size."
    raise FileNotFoundError(
        f"{folder}: no such folder. Expected a checkpoint folder (config.json, model.safetensors, tokenizer files): "
        f"model/ in a run's folder, or a released checkpoint, already downloaded.{size}"
    )


def require_checkpoint(folder: Path) -> None:
    """Raise FileNotFoundError if there is no such folder, it has no config.json, or it is a run's folder."""
    require_folder(folder)
    model = folder / "model"
    if (model / "config.json").is_file() and not any(folder.glob("model*.safetensors*")):
        raise FileNotFoundError(f"{folder}: the folder of a run; expected that of its model, {model}.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json. A checkpoint folder holds config.json, model.safetensors and tokenizer files."
        )


def read_json(path: Path) -> Any:
    """Read a JSON file; raise ConfigError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON in UTF-8 ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise ConfigError if it does not."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: expected an object, found {type(stored).__name__}")
    return stored


def read_fields(
    cls: type, stored: Mapping[str, Any], keys: Mapping[str, str], required: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, Any], Extra]:
    """Split a config.json into a dataclass's fields and the rest.

    Args:
        cls: the config dataclass; its type hints are checked.
        stored: the parsed config.json.
        keys: field name -> key in config.json. A missing key leaves the field at its default.
        required: key -> the values that the family implements. Any other value is refused.

    Returns:
        (values of the fields, the other entries of the file)

    Raises:
        ConfigError: a value has the wrong type, or a setting is not implemented; all problems are listed.
    """
    hints = typing.get_type_hints(cls)
    problems = []
    for key, allowed in required.items():
        if key in stored and stored[key] not in allowed:
            values = " or ".join(json.dumps(value) for value in allowed)
            problems.append(f"{key}: only {values} is implemented, found {json.dumps(stored[key])}")
    fields = {}
    for name, key in keys.items():
        if key in stored:
            if _fits(stored[key], hints[name]):
                fields[name] = stored[key]
            else:
                wanted = getattr(hints[name], "__name__", str(hints[name]))
                problems.append(f"{key}: expected {wanted}, found {json.dumps(stored[key])}")
    if problems:
        raise ConfigError("\n  ".join(["config.json:", *problems]))
    used = set(keys.values())
    return fields, tuple((key, json.dumps(value)) for key, value in stored.items() if key not in used)


def write_fields(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return a config as the dictionary of its config.json: the kept entries, then the fields under their keys."""
    return {key: json.loads(text) for key, text in config.extra} | {
        key: getattr(config, name) for name, key in keys.items()
    }


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def read_labels(stored: Mapping[str, Any]) -> tuple[int, tuple[str, ...] | None]:
    """Return (number of classes, their names or None) from `id2label` or `num_labels`; the reference's default is 2."""
    names = stored.get("id2label")
    if names is None:
        count = stored.get("num_labels", 2)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"config.json:\n  num_labels: expected a positive int, found {json.dumps(count)}")
        return count, None
    if not isinstance(names, Mapping) or sorted(names, key=str) != sorted(map(str, range(len(names))), key=str):
        raise ConfigError(f"config.json:\n  id2label: expected names for 0, 1, 2, ..., found {json.dumps(names)}")
    return len(names), tuple(str(names[str(i)]) for i in range(len(names)))


def write_labels(count: int, names: tuple[str, ...] | None) -> dict[str, Any]:
    """Return the keys that `read_labels` reads; empty for the reference's default."""
    if names is None:
        if count == 2:
            return {}
        names = tuple(f"LABEL_{i}" for i in range(count))
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
