"""Translator: a trained model with its tokenizer, which translates lines of text.

    translator = open_translator(Path("runs/ende"), DecodeConfig(beam=5))
    [[best, *_], ...] = translator.translate(["A dog runs.", ...])

An empty line stays empty. Control characters count as spaces. A line that is longer than those in training is
translated in parts and counted, or refused; nothing is truncated.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data.corpus.parallel import Findings, clean_line
from ...data.tokenizers.pairs import TEXT, PairTokenizer, text_pairs
from ...data.tokenizers.tokenizer import Tokenizer
from ...models import load
from ...models.checkpoints.folder import Loaded, family_of_folder, read_config
from ...models.encoder_decoder import EncoderDecoderConfig
from ..errors import RunError
from ..generate.config import DecodeConfig
from ..generate.generator import Generator, Hypothesis
from ..generate.released import FILE as GENERATION_FILE
from ..generate.released import read_generation_config
from ..machine.cpu import yield_to_callers
from ..run_folder import model_folder
from .config import TooLong

BREAKS = (".!?;:", ",", " ")  # characters after which to split a long line, preferred ones first


class Part(NamedTuple):
    """Input and output of one pass through the model: a whole line, or part of a long line."""

    source: list[int]  # token ids, with the end token
    target: list[int]  # token ids, without the start and the end token


class Translation(NamedTuple):
    """One translation of a line."""

    text: str  # detokenised text
    prepared: str  # the model's own output: words as its tokenizer splits them
    score: float  # the search's score, summed over the parts
    parts: tuple[Part, ...] = ()  # empty for an empty line


ROW = 512  # maximum length of a source, in tokens, of a model that has none


def longest_output(model: EncoderDecoderConfig, source: int) -> int:
    """Return the maximum length of the translation of `source` tokens: half as many again, plus 16."""
    longest = source * 3 // 2 + 16
    return longest if model.max_length is None else min(model.max_length, longest)


def check_vocabulary(model: EncoderDecoderConfig, tokenizer: PairTokenizer, where: str) -> None:
    """Raise RunError unless the tokenizer's vocabularies have the model's sizes; a text model's table may be padded."""
    for side, size, expected in (
        ("source", tokenizer.source.size, model.vocab_size),
        ("target", tokenizer.target.size, model.target_words),
    ):
        if size != expected and not (tokenizer.kind == TEXT and size < expected):
            raise RunError(
                f"{where}: the model has a {side} vocabulary of {expected:,}, the tokenizer one of {size:,}. Give the "
                "tokenizer that the model was trained with."
            )


def load_generator(folder: Path, **changes: Any) -> Loaded:
    """Load an encoder-decoder that generates; the constants of a released BART's logits may be missing.

    Raises:
        RunError: it is another kind of model.
    """
    stored = read_config(folder)
    family = family_of_folder(stored, folder)
    if "generation" not in family.heads:
        raise RunError(f"{folder}: a model of {family.title}; expected an encoder-decoder that generates text.")
    return load(folder, head=None if family.one_kind else "generation", **changes)


def open_translator(
    folder: Path,
    decode: DecodeConfig | None,
    *,
    rows: int = 64,
    longest: int = 0,
    too_long: TooLong = "split",
    dtype: str | None = None,
    prefix: str | None = None,
) -> "Translator":
    """Load a translator, for a process that only translates.

    On a CPU this also sets up the process's threads (`cpu.yield_to_callers`).

    Args:
        folder: run folder or checkpoint folder.
        decode: decoding options; None for the settings in the folder's generation_config.json.
        rows: number of sentences translated together.
        longest: see `Translator`.
        too_long: see `Translator`.
        dtype: compute dtype; None for that of the checkpoint's config.
        prefix: text before every source; None for that of the model's training.

    Raises:
        RunError: it is another kind of model, or the tokenizer does not belong to the model.
    """
    folder = model_folder(folder)
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    loaded = load_generator(folder, **changes)
    tokenizer = loaded.tokenizer
    if isinstance(tokenizer, Tokenizer):
        tokenizer = text_pairs(tokenizer, where=str(folder))
    if prefix is not None and isinstance(tokenizer, PairTokenizer):
        tokenizer = tokenizer.with_prefix(prefix)
    if not isinstance(tokenizer, PairTokenizer):
        raise RunError(f"{folder}: no tokenizer for translation there (subwords.json, or source.spm and vocab.json).")
    check_vocabulary(loaded.config, tokenizer, str(folder))
    model = loaded.model
    if decode is None:
        decode, special = read_generation_config(folder)
        try:
            model = model.clone(config=dataclasses.replace(loaded.config, **special))
        except ValueError as error:
            raise RunError(f"{folder / GENERATION_FILE}: {error}") from None
    translator = Translator(model, loaded.params, tokenizer, decode, rows=rows, longest=longest, too_long=too_long)
    yield_to_callers()
    return translator


class Translator:
    """Translate lists of lines.

    Args:
        model: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        decode: decoding options. The maximum output length is limited to the model's positions.
        rows: number of sentences translated together.
        longest: maximum number of source tokens of a line, including the end token; 0 for the length used in training,
            or if unknown, the model's positions, or `ROW` if it has no maximum.
        too_long: whether to split, cut or refuse longer lines.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: PairTokenizer,
        decode: DecodeConfig,
        *,
        rows: int = 64,
        longest: int = 0,
        too_long: TooLong = "split",
    ):
        self.model, self.tokenizer, self.too_long = model, tokenizer, too_long
        positions = model.config.max_length
        self.longest = longest or tokenizer.longest or positions or ROW
        self.longest = self.longest if positions is None else min(positions, self.longest)
        self.findings, self.lines, self._sentences = Findings(), 0, 0
        if decode.coverage_penalty and not model.config.decoder_heads:
            raise RunError("coverage_penalty: this model translates without attention; no source word is ever covered")
        # Padding is never generated, as in the reference's generation settings of Marian.
        decode = self.decode = dataclasses.replace(
            decode,
            max_length=decode.max_length if positions is None else min(decode.max_length, positions),
            suppressed=(*decode.suppressed, tokenizer.target.pad_id),
        )
        self.generator = Generator(model, params, decode, rows=rows)

    def with_params(self, params: Any) -> "Translator":
        """Return a translator with the same compiled programs and other parameters, for a model in training.

        Its lines are counted from 0.
        """
        other = copy.copy(self)
        other.generator = self.generator.with_params(params)
        other.findings, other.lines, other._sentences = Findings(), 0, 0
        return other

    def translate(self, lines: Iterable[str]) -> list[list[Translation]]:
        """Translate lines.

        Returns:
            the `n_best` translations of each line, in order, best first.

        Raises:
            RunError: a line is too long, and long lines are refused.
        """
        return list(self.answers(lines))

    def answers(self, lines: Iterable[str]) -> Iterator[list[Translation]]:
        """Translate line by line: if a line is refused, the lines before it have been translated."""
        sources: list[list[int]] = []
        counts: list[int] = []  # parts of each line
        first, refusal = self.lines + 1, None
        for line in lines:
            text, control = clean_line(line)
            try:
                parts = self._parts(text, self.lines + 1) if text else []
            except RunError as error:
                refusal = error
                break
            self.lines += 1
            if control:
                self.findings.add("control characters, taken for spaces", self.lines)
            sources += parts
            counts.append(len(parts))
        outputs = iter(zip(sources, self.generator(sources, first=self._sentences), strict=True))
        self._sentences += len(sources)
        for number, count in enumerate(counts, first):
            yield self._join([next(outputs) for _ in range(count)], number)
        if refusal is not None:
            raise refusal

    def _encode(self, text: str) -> list[int]:
        return [*self.tokenizer.encode_source([text])[0], self.tokenizer.source.eos_id]

    def _parts(self, text: str, line: int) -> list[list[int]]:
        """Return the source ids of line number `line`, with the end token; several lists if it is too long for one."""
        ids = self._encode(text)
        if len(ids) <= self.longest:
            return [ids]
        if self.too_long == "refuse":
            raise RunError(
                f"line {line}: {len(ids)} tokens, more than {self.longest}. Split it, or use --too-long split."
            )
        if self.too_long == "cut":
            self.findings.add(f"more than {self.longest} tokens (see --longest), cut", line)
            return [[*ids[: self.longest - 1], ids[-1]]]
        self.findings.add(f"more than {self.longest} tokens (see --longest), translated in parts", line)
        return self._split(text, ids)

    def _split(self, text: str, ids: list[int]) -> list[list[int]]:
        """Split a text, whose ids are these, near its middle until every part fits; between sentences if possible.

        Every part begins with the text's language code, if it has one.
        """
        code = self.tokenizer.language_code(text)
        text = text[len(code) :].strip()
        if len(ids) <= self.longest or len(text) < 2:
            return [ids]
        middle, quarter = len(text) // 2, len(text) // 4
        for marks in BREAKS:
            near = [
                place + 1
                for place in range(middle - quarter, middle + quarter)
                if text[place] in marks and (marks == " " or text[place + 1 : place + 2] == " ")
            ]
            if near:
                cut = min(near, key=lambda place: abs(place - middle))
                break
        else:
            cut = middle
        halves = [f"{code} {half.strip()}".strip() for half in (text[:cut], text[cut:]) if half.strip()]
        return [part for half in halves for part in self._split(half, self._encode(half))]

    def _join(self, outputs: Sequence[tuple[list[int], list[Hypothesis]]], line: int) -> list[Translation]:
        """Join the outputs for a line's parts to translations: the n-th best consists of the n-th best of each part."""
        if not outputs:
            return [Translation("", "", 0.0)] * self.decode.n_best  # as many as other lines have
        sources = [source for source, _ in outputs]
        if any(math.isnan(found.score) for _, hypotheses in outputs for found in hypotheses):
            raise RunError(f"line {line}: the model's scores are not numbers (NaN): nothing is translated.")
        if any(len(found[0].tokens) == self.decode.max_length for _, found in outputs):
            self.findings.add("a translation as long as --max-length allows, probably unfinished", line)
        result = []
        for hypotheses in zip(*(found for _, found in outputs), strict=True):
            targets = [found.tokens for found in hypotheses]
            result.append(
                Translation(
                    text=" ".join(map(self.tokenizer.decode, targets)),
                    prepared=" ".join(map(self.tokenizer.decode_prepared, targets)),
                    score=sum(found.score for found in hypotheses),
                    parts=tuple(map(Part, sources, targets)),
                )
            )
        return result
