"""Read sentence-transformers folders: an encoder, and how to pool its hidden states into the vector of a sentence.

    modules.json                         modules to apply in order: Transformer, Pooling, Normalize
    config.json, model.safetensors, ...  the encoder: here, or in the folder of the Transformer module
    sentence_bert_config.json            next to the encoder: max_seq_length, do_lower_case
    1_Pooling/config.json                pooling_mode, or pooling_mode_cls_token, ...; include_prompt
    config_sentence_transformers.json    prompts, default_prompt_name

Everything means what it means in sentence-transformers 6 (Reimers and Gurevych 2019, "Sentence-BERT").
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ...data.json_files import expect, read_json, read_object, value_of
from .config import ConfigError

# Poolings in 1_Pooling/config.json, in the order of concatenation: the name used here, the key that is set to true, and
# the name that `pooling_mode` may have instead.
POOLINGS = {
    "cls": ("pooling_mode_cls_token", "cls"),
    "max": ("pooling_mode_max_tokens", "max"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "mean_sqrt_len": ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
}

# Settings of the Transformer module: the first of these that is there.
_ENCODER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


class SentenceFolder(NamedTuple):
    """Settings of a sentence-transformers folder."""

    encoder: Path  # checkpoint folder of the encoder
    pooling: tuple[str, ...]  # as in `pooling.POOLINGS`; several are concatenated
    normalize: bool  # whether to divide each vector by its length
    max_length: int | None  # maximum length of a text, in tokens, special tokens included
    lowercase: bool  # whether to lower-case texts before tokenising them
    prompt: str  # text to put before every text
    pools_prompt: bool = True  # whether the tokens of the prompt are pooled too


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """Return the settings of a folder, or None if it has no modules.json.

    Raises:
        ConfigError: a module is not implemented, or a file is invalid.
    """
    if not (folder / "modules.json").is_file():
        return None
    kinds = [(kind, folder / path) for kind, path in _modules(folder / "modules.json")]
    names = [kind for kind, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(
            f"{folder / 'modules.json'}: expected Transformer, Pooling and optionally Normalize, in this order; found "
            f"{', '.join(names) or 'none'}"
        )
    encoder, pooling = kinds[0][1], kinds[1][1] / "config.json"
    if not pooling.is_file():
        raise FileNotFoundError(f"{pooling}: missing; modules.json names this folder")
    found = next((encoder / name for name in _ENCODER_FILES if (encoder / name).is_file()), None)
    prompts = folder / "config_sentence_transformers.json"
    pooled = read_object(pooling)
    return SentenceFolder(
        encoder,
        _poolings(pooled, pooling),
        "Normalize" in names,
        *_encoder_settings({} if found is None else read_object(found), str(found)),
        _prompt(read_object(prompts) if prompts.is_file() else {}, str(prompts)),
        value_of(pooled, "include_prompt", bool, str(pooling), True),
    )


def _modules(path: Path) -> list[tuple[str, str]]:
    """Return the kind and the folder of each module; folders lie in that of modules.json."""
    found = []
    for module in expect(read_json(path), list[dict], str(path)):
        kind, inside = (value_of(module, key, str, str(path)) for key in ("type", "path"))
        if Path(inside).is_absolute() or ".." in Path(inside).parts or "\0" in inside:
            raise ConfigError(f"{path}: path: expected a folder within that of the file, found {json.dumps(inside)}")
        found.append((kind.rpartition(".")[2], inside))
    return found


def _encoder_settings(stored: dict[str, Any], where: str) -> tuple[int | None, bool]:
    """Return the maximum length and whether texts are lower-cased."""
    tokenizer: dict[str, Any] = {}
    for name in ("tokenizer_args", "processor_kwargs"):
        tokenizer |= value_of(stored, name, dict, where, {})
    length = value_of(stored, "max_seq_length", int | None, where, None)
    length = value_of(tokenizer, "model_max_length", int | None, where, length)
    others = {name: value for name, value in tokenizer.items() if name not in ("model_max_length", "trust_remote_code")}
    others |= {name: stored[name] for name in ("config_args", "config_kwargs", "processing_kwargs") if stored.get(name)}
    if value_of(stored, "transformer_task", str, where, "feature-extraction") != "feature-extraction":
        others["transformer_task"] = stored["transformer_task"]
    if others:
        raise ConfigError(f"{where}: {next(iter(others))}: not implemented, found {json.dumps(others)[:200]}")
    if length is not None and length < 1:
        raise ConfigError(f"{where}: the maximum length is {length}; expected at least 1")
    return length, value_of(stored, "do_lower_case", bool, where, False)


def _prompt(stored: dict[str, Any], where: str) -> str:
    """Return the prompt that stands before texts by default."""
    prompts = value_of(stored, "prompts", dict[str, str] | None, where, None) or {}
    name = value_of(stored, "default_prompt_name", str | None, where, None)
    if name is not None and name not in prompts:
        raise ConfigError(f"{where}: default_prompt_name is {json.dumps(name)}, which is not among its prompts")
    return "" if name is None else prompts[name]


def _poolings(stored: dict[str, Any], path: Path) -> tuple[str, ...]:
    modes = value_of(stored, "pooling_mode", str | list[str] | None, str(path), None)
    if modes is None:
        keys = [key for key in stored if key.startswith("pooling_mode_") and value_of(stored, key, bool, str(path))]
        given = {key: name for name, (key, _) in POOLINGS.items()}
        modes = [key for key in given if key in keys] + [key for key in keys if key not in given] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    names = {key: name for name, both in POOLINGS.items() for key in both}
    unknown = [mode for mode in modes if mode not in names]
    if unknown or not modes:
        known = ", ".join(key for key, _ in POOLINGS.values())
        raise ConfigError(f"{path}: only {known} are implemented; found {unknown[0] if unknown else 'none'}")
    return tuple(names[mode] for mode in modes)
