"""Measure how well a language model predicts a text.

bestiary perplexity --model gpt2 --text wiki.test.tokens --stride 512

bestiary perplexity --model runs/transformer-xl --text wiki.test.tokens --memory 512

The text is read through windows of the model's length, each `stride` tokens after the one before. Every token but the
first is predicted once, by the window in which it has the most context that the stride allows. A model with a memory
(Transformer-XL) reads windows that do not overlap, and remembers those before.
"""

import json as json_text
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...data.progress import counted
from ..errors import RunError, check_setting
from ..progress import Progress

if TYPE_CHECKING:
    from .model import LanguageModel


@dataclass(frozen=True)
class PerplexityConfig:
    """Measure the perplexity of a text: per token, per word and per character."""

    model: Path
    """Checkpoint folder of a language model (GPT-2, ...) with its tokenizer, or run folder."""
    text: Path
    """Text file (.gz and .zst too), read as it is; a special token in it is text."""
    stride: int = 0
    """Number of new tokens per window. A smaller one gives each token more context, and takes longer. 0: the window's
    length, so that windows do not overlap."""
    window: int = 0
    """Length of a window, in tokens. 0: the model's number of positions, or of slots of its memory."""
    memory: int | None = None
    """Of a model with a memory (Transformer-XL): number of tokens before a window whose hidden states it sees; 0: none.
    None: the model's own number."""
    begin: bool = False
    """Put the model's end-of-text token before the text, so that its first token is predicted too."""
    batch: int = 0
    """Windows computed together; with a memory: parts that the text is cut into, which are read together, each with an
    empty memory at first. 0: 4 windows, or 1 part."""
    encoding: str = "utf-8"
    """Character encoding of the file."""
    json: bool = False
    """Print one JSON object instead of text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""

    def __post_init__(self) -> None:
        for name, least in (("stride", 0), ("window", 0), ("batch", 0)):
            check_setting(self, name, least=least)
        if self.memory is not None:
            check_setting(self, "memory", least=0)
        if not self.text.is_file():
            raise RunError(f"--text {self.text}: there is no such file.")


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return the windows of a text of `length` tokens: (first token, end, number of its last tokens to predict).

    The model reads all of a window but its last token, which is only predicted: `window` tokens.
    """
    found, done, first = [], 1, 0  # nothing is before the first token
    while done < length:
        end = min(first + window + 1, length)
        found.append((first, end, end - done))
        done, first = end, first + stride
    return found


def measure(language_model: "LanguageModel", text: str, config: PerplexityConfig, progress: Progress) -> dict[str, Any]:
    """Return the perplexities of a text, and what was counted.

    Raises:
        RunError: the text has nothing to predict, or a window does not fit the model or has no length.
    """
    tokens, _ = language_model.tokenizer.encode_literally([text])
    ids = tokens.tolist()
    if config.begin:
        if language_model.first_id is None:
            raise RunError("--begin: the model has no end-of-text token.")
        ids = [language_model.first_id, *ids]
    positions, own = language_model.positions, language_model.memory
    if config.memory is not None and own is None:
        raise RunError("--memory: the model has none; it is for Transformer-XL.")
    slots = own if config.memory is None else config.memory
    window = config.window or positions or own
    if not window:
        raise RunError("--window: the model has no limit of positions. Give the length of a window, in tokens.")
    if positions is not None and window > positions:
        raise RunError(f"--window {window}: the model has {positions} positions.")
    stride = config.stride or window
    if stride > window:
        raise RunError(f"--stride {stride}: more than the window's {window} tokens, so that some would be left out.")
    if len(ids) < 2:
        raise RunError(f"{config.text}: {counted(len(ids), 'token')}: nothing to predict.")
    total, done, count, begun = 0.0, 0, 0, time.perf_counter()
    parts = 1
    if slots is None:
        cut = windows(len(ids), window, stride)
        texts = [ids[first:end] for first, end, _ in cut]
        read = (losses for _, losses in language_model.losses(texts, [n for *_, n in cut], config.batch or 4))
    else:
        if config.stride:
            raise RunError("--stride: windows of a model with a memory follow each other; leave it out.")
        parts = min(config.batch or 1, len(ids) - 1)
        read = language_model.losses_with_memory(ids, window, slots, parts)
    for losses in read:
        count += 1
        total += float(losses.sum(dtype="float64"))
        done += len(losses)
        rate = done / (time.perf_counter() - begun)
        progress.update(f"{done:,} of {len(ids) - 1:,} tokens, {rate:,.0f} tokens/s")
    words, characters, size = len(text.split()), len(text), len(text.encode())
    return {
        "perplexity_per_token": math.exp(total / done),
        "perplexity_per_word": _exp(total / words) if words else None,
        "bits_per_character": total / math.log(2) / characters,
        "bits_per_byte": total / math.log(2) / size,
        "nats": total,
        "tokens_predicted": done,
        "tokens": len(ids),
        "words": words,
        "characters": characters,
        "bytes": size,
        "windows": count,
        "window": window,
        **({"stride": stride} if slots is None else {"memory": slots, "parts": parts}),
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def main(config: PerplexityConfig) -> int:
    """Run `bestiary perplexity`; return the exit status."""
    from ...data.reading import read_text
    from .model import open_language_model

    text = read_text(config.text, config.encoding)
    progress = Progress()
    found = measure(open_language_model(config.model, config.dtype), text, config, progress)
    if config.json:
        print(json_text.dumps({**found, "perplexity_per_word": _finite(found["perplexity_per_word"])}, indent=2))
        return 0
    per_word = found["perplexity_per_word"]
    print(f"perplexity per token      {found['perplexity_per_token']:.4f}")
    print(f"perplexity per word       {'no words' if per_word is None else f'{per_word:.4f}'}")
    print(f"bits per character        {found['bits_per_character']:.4f}")
    print(f"bits per byte             {found['bits_per_byte']:.4f}")
    print(
        f"of {counted(found['tokens_predicted'], 'predicted token')} ({found['tokens']:,} in all), "
        f"{counted(found['words'], 'word')} between white space, {counted(found['characters'], 'character')}, "
        f"{counted(found['bytes'], 'byte')}"
    )
    last = f"{found['stride']:,} apart" if "stride" in found else f"with a memory of {found['memory']:,}"
    parts = f"{counted(found['parts'], 'part')} that are read together, " if found.get("parts", 1) > 1 else ""
    each = "each in " if parts else ""
    print(f"in {parts}{each}{counted(found['windows'], 'window')} of {found['window']:,} tokens, {last}")
    return 0


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
