"""Read a released checkpoint's decoding settings: generation_config.json, under the reference implementation's names.

With them, a released translator gives the same outputs as the reference's `generate`. Lengths are as in the reference,
including the start token.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ...data.json_files import read_object, value_of
from ..errors import RunError
from .config import DecodeConfig
from .generator import Generator

FILE = "generation_config.json"
TOKENS = ("decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""Special tokens that are also in the model's config; this file takes precedence."""
STOPPING: dict[bool | str, Literal["heuristic", "first", "exhaustive"]] = {
    False: "heuristic",
    True: "first",
    "never": "exhaustive",
}
SAME = {
    "num_beams": "beam",
    "num_return_sequences": "n_best",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
KINDS: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "no_repeat_ngram_size", *TOKENS), int),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), int),
    **dict.fromkeys(("length_penalty", "repetition_penalty"), float),
    "early_stopping": bool | str,
    "bad_words_ids": list[list[int]],
    "suppress_tokens": list[int],
    "renormalize_logits": bool,
}
"""Settings that are read, and their types."""
NO_MATTER = {
    *("_from_model_config", "transformers_version", "use_cache", "return_dict_in_generate", "output_scores"),
    *("bos_token_id", "pad_token_id"),
    *("temperature", "top_k", "top_p"),  # unless tokens are sampled
}
REFERENCE_LENGTH = 20
"""Default of max_length."""


def read_generation_config(folder: Path) -> tuple[DecodeConfig, dict[str, int]]:
    """Read a checkpoint folder's generation_config.json: decoding options, and special tokens for the model's config.

    Raises:
        RunError: there is no such file, or its settings are not implemented; all of them are listed.
        DataError: it is not JSON, or a setting has another type.
    """
    path = folder / FILE
    if not path.is_file():
        raise RunError(f"{folder}: no {FILE} there; give flags instead.")
    return from_settings(read_object(path), str(path))


def from_settings(settings: dict[str, Any], where: str) -> tuple[DecodeConfig, dict[str, int]]:
    """Return decoding options and special tokens from settings under the reference's names.

    Args:
        settings: the settings; null is as if it were not there.
        where: their file, for messages.

    Raises:
        RunError: settings are not implemented; all of them are listed.
        DataError: a setting has another type.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = {key: value for key, value in given.items() if key not in KINDS.keys() | NO_MATTER and value is not False}
    unknown |= {key: given[key] for key in TOKENS if isinstance(given.get(key), list)}  # such as several end tokens
    if any(len(words) != 1 for words in value_of(given, "bad_words_ids", list[list[int]], where, [])):
        unknown["bad_words_ids"] = given["bad_words_ids"]
    if unknown:
        asked = (f"{key}: {json.dumps(value)[:200]}" for key, value in sorted(unknown.items()))
        raise RunError("\n  ".join([f"{where}: unknown or not implemented:", *asked]))
    for key, kind in KINDS.items():
        value_of(given, key, kind, where, None)
    if given.get("early_stopping", False) not in STOPPING:
        raise RunError(f'{where}: early_stopping: expected true, false or "never", found {given["early_stopping"]!r}')
    tokens = {key: given[key] for key in TOKENS if key in given}
    try:
        return decode_config(given), tokens
    except RunError as error:
        raise RunError(f"{where}: {error}") from None


def decode_config(given: dict[str, Any]) -> DecodeConfig:
    """Return decoding options from settings under the reference's names; those that are not known are left out."""
    most, least = given.get("max_length", REFERENCE_LENGTH) - 1, max(0, given.get("min_length", 0) - 1)
    same: dict[str, Any] = {name: given[key] for key, name in SAME.items() if key in given}
    searches = given.get("num_beams", 1) > 1
    return DecodeConfig(
        max_length=given.get("max_new_tokens", most),
        min_length=given.get("min_new_tokens", least),
        early_stopping=STOPPING[given.get("early_stopping", False) if searches else False],
        suppressed=(*(word for (word,) in given.get("bad_words_ids", [])), *given.get("suppress_tokens", [])),
        renormalise=given.get("renormalize_logits", False) and searches,
        **same,
    )


def reference_generate(
    model: Any, params: Any, settings: Path, sources: Sequence[Sequence[int]]
) -> list[tuple[list[int], float]]:
    """Generate with the settings of a file, under the reference's names, for `models.checkpoints.parity`.

    Args:
        model: a model with a method `incremental()`.
        params: its parameters.
        settings: arguments of the reference's `generate`, as JSON.
        sources: token ids.

    Returns:
        The tokens and the score of the best output of each source.
    """
    decode, special = from_settings(read_object(settings), str(settings))
    model = model.clone(config=dataclasses.replace(model.config, **special))
    generate = Generator(model, params, decode, rows=max(1, len(sources)))
    return [(best.tokens, best.score) for best, *_ in generate(sources)]
