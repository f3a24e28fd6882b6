"""Read sentence-transformers folders: an encoder, and how to pool its hidden states into the vector of a sentence.

    modules.json                         modules to apply in order: Transformer, Pooling, Normalize
    config.json, model.safetensors, ...  the encoder: here, or in the folder of the Transformer module
    sentence_bert_config.json            next to the encoder: max_seq_length, do_lower_case
    1_Pooling/config.json                pooling_mode_cls_token, pooling_mode_mean_tokens, ...
    config_sentence_transformers.json    prompts, default_prompt_name

(Reimers and Gurevych 2019, "Sentence-BERT".)
"""

import json
from pathlib import Path
from typing import NamedTuple

from ...data.json_files import read_json, read_object
from .config import ConfigError

# Poolings in 1_Pooling/config.json, in the order of concatenation: the name used here, the key that is set to true, and
# the name that `pooling_mode` may have instead.
POOLINGS = {
    "cls": ("pooling_mode_cls_token", "cls"),
    "max": ("pooling_mode_max_tokens", "max"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "mean_sqrt_len": ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
}


class SentenceFolder(NamedTuple):
    """Settings of a sentence-transformers folder."""

    encoder: Path  # checkpoint folder of the encoder
    pooling: tuple[str, ...]  # as in `pooling.POOLINGS`; several are concatenated
    normalize: bool  # whether to divide each vector by its length
    max_length: int | None  # maximum length of a text, in tokens, special tokens included
    lowercase: bool  # whether to lower-case texts before tokenising them
    prompt: str  # text to put before every text


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """Return the settings of a folder, or None if it has no modules.json.

    Raises:
        ConfigError: a module is not implemented, or a file is invalid.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = read_json(folder / "modules.json")
    try:
        kinds = [(str(module["type"]).rpartition(".")[2], folder / module["path"]) for module in modules]
    except (TypeError, KeyError):
        raise ConfigError(f"{folder / 'modules.json'}: expected a list of modules, each with type and path") from None
    names = [kind for kind, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(
            f"{folder / 'modules.json'}: expected Transformer, Pooling and optionally Normalize, in this order; found "
            f"{', '.join(names) or 'none'}"
        )
    encoder, pooling = kinds[0][1], kinds[1][1] / "config.json"
    own, prompts = encoder / "sentence_bert_config.json", folder / "config_sentence_transformers.json"
    settings = read_object(own) if own.is_file() else {}
    general = read_object(prompts) if prompts.is_file() else {}
    name = general.get("default_prompt_name")
    if name is not None and name not in (general.get("prompts") or {}):
        raise ConfigError(f"{prompts}: default_prompt_name is {json.dumps(name)}, which is not among its prompts")
    prompt = "" if name is None else general["prompts"][name]
    return SentenceFolder(
        encoder,
        _poolings(pooling, prompt),
        "Normalize" in names,
        settings.get("max_seq_length"),
        bool(settings.get("do_lower_case")),
        prompt,
    )


def _poolings(path: Path, prompt: str) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; modules.json names this folder")
    stored = read_object(path)
    if prompt and not stored.get("include_prompt", True):
        raise ConfigError(f"{path}: include_prompt: only true is implemented with a prompt, found false")
    mode = stored.get("pooling_mode")
    if mode is None:
        stored = {"pooling_mode_mean_tokens": True} | stored  # the default of an absent key
        asked = [key for key, value in stored.items() if key.startswith("pooling_mode_") and value]
    else:
        asked = [str(mode).lower()]
    unknown = [key for key in asked if not any(key in names for names in POOLINGS.values())]
    if unknown or not asked:
        known = ", ".join(key for key, _ in POOLINGS.values())
        raise ConfigError(
            f"{path}: only {known} are implemented; {f'found {unknown[0]}' if unknown else 'none of them is true'}"
        )
    return tuple(name for name, names in POOLINGS.items() if any(key in names for key in asked))
