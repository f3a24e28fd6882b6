"""Read and write config.json of the released format, for every family's config dataclass.

Every key of a config.json is one of: a field of the family's config under another name; a setting with only one
implemented value, any other being refused; or something irrelevant here, which is kept and written back.
"""

import dataclasses
import hashlib
import json
import math
import os
import typing
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...data.json_files import fits, in_words, type_name

Extra = tuple[tuple[str, str], ...]
"""Keys that are irrelevant here, with their values as JSON text (so that a config stays hashable)."""


class ConfigError(ValueError):
    """Raised for a config.json that this version does not support; the message lists every problem."""


def require_folder(folder: Path) -> None:
    """Raise FileNotFoundError if there is no such checkpoint folder."""
    if folder.is_dir():
        return
    size = ""
    if len(folder.parts) == 1:
        size = " Only `bestiary pretrain` and `bestiary distill` take the name of a size, by --model."
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


SIZES = ("size", "width", "layers", "heads", "forward", "positions", "labels", "groups", "inner", "every", "targets")
"""Last words of the names of fields that are sizes or counts: at least 1."""
MOST = {"layers": 10_000, "positions": 1 << 20, "labels": 1 << 20}
"""Last word of a field's name -> what is beyond any model, and would fill the memory before a tensor is missed."""


def check_fields(config: Any, keys: Mapping[str, str]) -> None:
    """Check the numbers of a config dataclass by the names of its fields.

    Sizes are at least 1 and other whole numbers at least 0; dropout rates are at least 0 and below 1, other numbers at
    least 0 and finite; `..._id` is a token of the vocabulary.

    Args:
        config: with the fields.
        keys: field name -> key in config.json, for messages.

    Raises:
        ValueError: a number is out of its range; all of them are listed.
    """
    problems = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        last = field.name.rpartition("_")[2]
        if last == "id":
            least, most = 0, max(config.vocab_size, getattr(config, "target_words", 0)) - 1
        elif "dropout" in field.name:
            least, most = 0, math.nextafter(1, 0)
        else:
            least = int(last in SIZES) or (math.ulp(0.0) if last == "theta" else 0)
            most = MOST.get(last, math.inf)
        if not (least <= value <= most and math.isfinite(value)):
            key = keys.get(field.name, field.name)
            also = "" if key == field.name else f" ({key} in config.json)"
            bound = f"at least {least}" if math.isinf(most) else f"from {least} to {most:,}"
            bound = "at least 0 and below 1" if "dropout" in field.name else "above 0" if last == "theta" else bound
            problems.append(f"{field.name}{also}: expected a number {bound}, found {value}")
    if problems:
        raise ValueError(f"{type(config).__name__}: {'; '.join(problems)}")


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
            if fits(stored[key], hints[name]):
                fields[name] = tuple(stored[key]) if typing.get_origin(hints[name]) is tuple else stored[key]
            else:
                problems.append(f"{key}: expected {type_name(hints[name])}, found {in_words(stored[key])}")
    if problems:
        raise ConfigError("\n  ".join(["config.json:", *problems]))
    used = set(keys.values())
    return fields, tuple((key, json.dumps(value)) for key, value in stored.items() if key not in used)


def write_fields(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return a config as the dictionary of its config.json: the kept entries, then the fields under their keys."""
    return {key: json.loads(text) for key, text in config.extra} | {
        key: getattr(config, name) for name, key in keys.items()
    }


def read_labels(stored: Mapping[str, Any]) -> tuple[int, tuple[str, ...] | None]:
    """Return (number of classes, their names or None) from `id2label` or `num_labels`; the reference's default is 2.

    Names may repeat, as "crane" and "maillot" of ImageNet do: see `distinct_names`.
    """
    names = stored.get("id2label")
    if names is None:
        count = stored.get("num_labels", 2)
        if not fits(count, int) or count < 1:
            raise ConfigError(f"config.json:\n  num_labels: expected a positive int, found {in_words(count)}")
        return count, None
    if not isinstance(names, Mapping) or not names or set(names) != set(map(str, range(len(names)))):
        raise ConfigError(f"config.json:\n  id2label: expected names for 0, 1, 2, ..., found {in_words(names)}")
    listed = tuple(str(names[str(i)]) if fits(names[str(i)], str | float | bool) else "" for i in range(len(names)))
    if "" in listed:
        raise ConfigError("config.json:\n  id2label: expected a name for each class")
    return len(names), listed


def distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of classes with the number of the class after those that repeat: `crane (134)`, `crane (517)`."""
    counts = Counter(names)
    return tuple(f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(names))


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


def fingerprint(folder: Path) -> str:
    """Return a hash of a checkpoint folder's configuration, weights and tokenizer, in hexadecimal.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".hdf5", ".txt", ".model"):
            stat = path.stat()
            found.update(f"{path.name} {_hash(os.fspath(path), stat.st_mtime_ns, stat.st_size)}\n".encode())
    return found.hexdigest()[:32]


@cache
def _hash(path: str, modified: int, size: int) -> str:
    del modified, size  # a file that has changed is hashed again
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
