"""Translate text with a trained translator: lines in, lines out, in their order.

    bestiary translate run --model runs/ende --beam 5 < source.txt > translation.txt
    bestiary translate run --model runs/ende --attention map.html < sentence.txt

It reads and writes as it goes, some lines at a time, and keeps nothing of them: a million need no more memory than the
first thousand, if these have long lines among them too. An empty line stays empty. Control characters count as spaces.
A line that is longer than those of the training is translated in parts and counted, or refused; nothing is cut.
"""

import copy
import dataclasses
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import jax
import tyro

from ...data.corpus.parallel import Findings, clean_line
from ...data.tokenizers.pairs import PairTokenizer
from ...models import load
from ...models.transformer import TransformerConfig
from ..cpu import return_freed_memory, run_in_callers, spare_callers
from ..errors import RunError
from ..generate.config import DecodeConfig
from ..generate.generator import Generator, Hypothesis
from ..generate.released import read_generation_config
from ..progress import Progress

TooLong = Literal["split", "refuse"]
WAIT_SECONDS = 0.05  # for more lines, once there is one
PARTS = (".!?;:", ",", " ")  # where a line that is too long is parted: after the last of these that fits, in this order


class Translation(NamedTuple):
    """One translation of a line."""

    text: str  # running text
    prepared: str  # as the model wrote it: in words of its tokeniser
    score: float  # of the search, summed over parts


DECODE = DecodeConfig(beam=5, max_length=256)
"""How the commands decode, unless their flags say otherwise."""


def longest_output(model: TransformerConfig, source: int) -> int:
    """Tokens that the translation of so many source tokens may have: half as many again, and 16."""
    return min(model.positions, source * 3 // 2 + 16)


def check_vocabulary(model: TransformerConfig, tokenizer: PairTokenizer, where: str) -> None:
    """Raise RunError unless the tokenizer's pieces are the model's."""
    for side, size, expected in (
        ("source", tokenizer.source.size, model.vocab_size),
        ("target", tokenizer.target.size, model.target_words),
    ):
        if size != expected:
            raise RunError(
                f"{where}: the model has a {side} vocabulary of {expected:,}, the tokenizer one of {size:,}. Give the "
                "tokenizer that the model was trained with."
            )


def model_folder(folder: Path) -> Path:
    """The checkpoint folder that is meant: a run folder's model/, or the folder itself."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def open_translator(
    folder: Path,
    decode: DecodeConfig | None,
    *,
    rows: int = 64,
    longest: int = 0,
    too_long: TooLong = "split",
    dtype: str | None = None,
) -> "Translator":
    """The translator of a run folder or a checkpoint folder, for a process that translates and does nothing else.

    `decode` is how to; None for what the folder's generation_config.json says.

    On a CPU that is settled here: programs run in the threads that search, and XLA's others stand back.

    Raises:
        RunError: another kind of model, or a tokenizer that is not this model's.
    """
    run_in_callers()
    folder = model_folder(folder)
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    loaded = load(folder, **changes)
    if not isinstance(loaded.config, TransformerConfig):
        raise RunError(f"{folder}: a {type(loaded.config).__name__}; expected a translator's checkpoint.")
    tokenizer = loaded.tokenizer
    if not isinstance(tokenizer, PairTokenizer):
        raise RunError(f"{folder}: no tokenizer for translation there (subwords.json, or source.spm and vocab.json).")
    check_vocabulary(loaded.config, tokenizer, str(folder))
    model = loaded.model
    if decode is None:
        decode, special = read_generation_config(folder)
        model = model.clone(config=dataclasses.replace(loaded.config, **special))
    translator = Translator(model, loaded.params, tokenizer, decode, rows=rows, longest=longest, too_long=too_long)
    spare_callers()
    return translator


class Translator:
    """Translates lists of lines.

    Args:
        model, params: the model and its parameters.
        tokenizer: its tokenizer.
        decode: how to search. Its longest output is cut down to the model's positions.
        rows: sentences that are translated together.
        longest: source tokens that a line may have, its end token included; 0 for as many as in training, or the
            model's positions where the tokenizer does not know.
        too_long: what is done to longer lines.
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
        positions = model.config.positions
        self.longest = min(positions, longest or tokenizer.longest or positions)
        self.findings, self.lines, self._sentences = Findings(), 0, 0
        # Padding is never written, as in the reference's generation settings of Marian.
        decode = self.decode = dataclasses.replace(
            decode,
            max_length=min(decode.max_length, positions),
            suppressed=(*decode.suppressed, tokenizer.target.pad_id),
        )
        self.generator = Generator(model, params, decode, rows=rows)

    def with_params(self, params: Any) -> "Translator":
        """The same programs with other parameters, as for a model in training; lines and findings begin anew."""
        other = copy.copy(self)
        other.generator = self.generator.with_params(params)
        other.findings, other.lines, other._sentences = Findings(), 0, 0
        return other

    def translate(self, lines: Iterable[str]) -> list[list[Translation]]:
        """The translations of each line, the best first; in the order of the lines.

        Raises:
            RunError: a line is too long, where these are refused.
        """
        return list(self.answers(lines))

    def answers(self, lines: Iterable[str]) -> Iterator[list[Translation]]:
        """As `translate`, line by line: where one is refused, those before it have been answered."""
        parts, counts, first, refusal = [], [], self.lines + 1, None
        for line in lines:
            text, control = clean_line(line)
            try:
                found = self._parts(text, self.lines + 1) if text else []
            except RunError as error:
                refusal = error
                break
            self.lines += 1
            if control:
                self.findings.add("control characters, taken for spaces", self.lines)
            parts += found
            counts.append(len(found))
        outputs = iter(self.generator(parts, first=self._sentences))
        self._sentences += len(parts)
        for number, count in enumerate(counts, first):
            yield self._join([next(outputs) for _ in range(count)], number)
        if refusal is not None:
            raise refusal

    def _parts(self, text: str, line: int) -> list[list[int]]:
        """Source ids of line number `line`, with the end token; several lists where it is too long for one."""
        ids = [*self.tokenizer.encode_source([text])[0], self.tokenizer.source.eos_id]
        if len(ids) <= self.longest:
            return [ids]
        if self.too_long == "refuse":
            raise RunError(
                f"line {line}: {len(ids)} tokens, and {self.longest} are taken. Part it, or let --too-long split do so."
            )
        self.findings.add(f"more than {self.longest} tokens (see --longest), translated in parts", line)
        return self._split(text)

    def _split(self, text: str) -> list[list[int]]:
        """Part a text near its middle, after a sentence's end if there is one, until every part fits."""
        ids = [*self.tokenizer.encode_source([text])[0], self.tokenizer.source.eos_id]
        if len(ids) <= self.longest or len(text) < 2:
            return [ids]
        middle, quarter = len(text) // 2, len(text) // 4
        for marks in PARTS:
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
        return [part for half in (text[:cut].strip(), text[cut:].strip()) if half for part in self._split(half)]

    def _join(self, parts: Sequence[Sequence[Hypothesis]], line: int) -> list[Translation]:
        """The n-th best of a line in parts is made of the n-th best of each."""
        if not parts:
            return [Translation("", "", 0.0)] * self.decode.n_best  # as many as of other lines
        if any(len(found[0].tokens) == self.decode.max_length for found in parts):
            self.findings.add("a translation as long as --max-length allows, probably unfinished", line)
        result = []
        for hypotheses in zip(*parts, strict=True):
            texts = [self.tokenizer.decode(found.tokens) for found in hypotheses]
            prepared = [self.tokenizer.decode_prepared(found.tokens) for found in hypotheses]
            score = sum(found.score for found in hypotheses)
            result.append(Translation(" ".join(texts), " ".join(prepared), score))
        return result


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """Translate standard input to standard output, a line for a line."""

    model: Path
    """Run folder, or checkpoint folder with its tokenizer."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = DECODE
    batch: int = 64
    """Sentences that are translated together."""
    window: int = 2048
    """Most lines that are read before their translations are written. More sort better by length, and wait longer."""
    longest: int = 0
    """Tokens that a line may have; 0: as many as in training, since the model has learnt nothing of longer lines (the
    model_max_length of its tokenizer_config.json), or as many as it has positions."""
    too_long: TooLong = "split"
    """Longer lines: translate them in parts, and count them, or refuse them."""
    scores: bool = False
    """Write each translation's score and a tab before it. With --n-best above 1 that is so anyway, and each line has as
    many answers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""
    generation_config: bool = False
    """Decode as the checkpoint's generation_config.json says, instead of by flags."""
    attention: Path | None = None
    """HTML file to draw the attention of the first lines' translations to their sources in."""
    layers: tuple[int, ...] = ()
    """With --attention: layers to draw, from 1; the last if none is named."""
    heads: tuple[int, ...] = ()
    """With --attention: heads to draw, from 1; all and their mean if none is named."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.window < 1 or self.longest < 0:
            raise RunError("--batch and --window must be at least 1, --longest at least 0.")
        if self.attention is None and (self.layers or self.heads):
            raise RunError("--layers and --heads choose what --attention draws: give it a file.")
        if self.attention is not None and not self.attention.absolute().parent.is_dir():
            raise RunError(f"--attention {self.attention}: there is no folder {self.attention.absolute().parent}.")
        chosen(self.decode, self.generation_config)


def chosen(decode: DecodeConfig, generation_config: bool) -> DecodeConfig | None:
    """What `open_translator` takes: decoding by flags, or None for the checkpoint's own settings; never both."""
    if not generation_config:
        return decode
    if decode != DECODE:
        raise RunError("--generation-config takes the place of the flags of decoding, as --beam: leave one out.")
    return None


class Lines:
    """The lines of a stream, read by a thread as they come; at most `window` wait to be taken."""

    def __init__(self, stream: BinaryIO, window: int):
        self._window = window
        self._waiting: queue.Queue[str | Exception | None] = queue.Queue(window)
        self._stream = stream
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for number, line in enumerate(self._stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise RunError(
                        f"standard input, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column "
                        f"{error.start + 1}). Convert the text first."
                    ) from None
                self._waiting.put(text.removesuffix("\n").removesuffix("\r"))
            self._waiting.put(None)
        except Exception as error:  # goes on in the thread that takes the lines
            self._waiting.put(error)

    def __iter__(self) -> Iterator[list[str]]:
        """Up to `window` lines at a time: those that are there, once there is one."""
        some: list[str] = []
        while True:
            try:
                line = self._waiting.get(timeout=WAIT_SECONDS if some else None)
            except queue.Empty:
                yield some
                some = []
                continue
            if isinstance(line, str):
                some.append(line)
            if some and (len(some) == self._window or not isinstance(line, str)):
                yield some
                some = []
            if isinstance(line, Exception):
                raise line
            if line is None:
                return


def main(config: RunConfig) -> int:
    """`bestiary translate run`; returns the exit status."""
    progress = Progress()
    translator = open_translator(
        config.model,
        chosen(config.decode, config.generation_config),
        rows=config.batch,
        longest=config.longest,
        too_long=config.too_long,
        dtype=config.dtype,
    )
    several, to_fill = translator.decode.n_best > 1, config.attention
    if to_fill is not None:
        from .attention_map import to_draw

        to_draw(translator.model.config, config.layers, config.heads)  # refuses what there is not, before any work
    tidy_at = 0
    for lines in Lines(sys.stdin.buffer, config.window):
        if translator.lines:
            progress.update(f"{translator.lines:,} lines translated")
        if translator.lines >= tidy_at and jax.default_backend() == "cpu":
            return_freed_memory()
            tidy_at = translator.lines + config.window
        try:
            for translations in translator.answers(lines):
                shown = translations if several else translations[:1]
                for translation in shown:
                    score = f"{translation.score:.4f}\t" if config.scores or several else ""
                    sys.stdout.write(f"{score}{translation.text}\n")
        finally:
            sys.stdout.flush()
        if to_fill is not None:
            from .attention_map import draw_attention

            count = draw_attention(to_fill, translator, lines, config.layers, config.heads)
            progress.line(f"attention of {count} sentences drawn in {to_fill}")
            to_fill = None
    progress.line(f"{translator.lines:,} {'line' if translator.lines == 1 else 'lines'} translated")
    for note in translator.findings:
        progress.line(note)
    return 0
