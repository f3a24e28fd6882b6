"""Translate text with a trained translator, line by line, in order.

    bestiary translate run --model runs/ende --beam 5 < source.txt > translation.txt
    bestiary translate run --model runs/ende --attention map.html < sentence.txt

Input is read and translated a window of lines at a time, and nothing is kept: a million lines need no more memory than
the first thousand, if these include long lines too.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ...data.progress import counted
from ..arguments import flags
from ..errors import RunError
from ..generate.config import DecodeConfig, refuse_decoding_flags
from ..generate.lines import Lines
from ..machine.cpu import return_freed_memory
from ..progress import Progress
from .config import DECODE, TooLong

if TYPE_CHECKING:
    from .translator import Translation


@dataclass(frozen=True)
class RunConfig:
    """Translate standard input to standard output, line by line."""

    model: Path
    """Run folder, or checkpoint folder with its tokenizer."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = DECODE
    batch: int = 64
    """Sentences per batch."""
    window: int = 2048
    """Maximum number of lines to read before writing their translations. A larger window sorts better by length, but
    the first translation comes later."""
    longest: int = 0
    """Maximum length of a line, in tokens. 0: the length used in training (model_max_length in tokenizer_config.json),
    since the model has learned nothing about longer lines; if unknown, the model's number of positions."""
    too_long: TooLong = "split"
    """Handling of longer lines: split them, translate the parts and report their number; or refuse them."""
    scores: bool = False
    """Write each translation's score and a tab before it. With --n-best above 1, scores are always written, with N
    output lines per input line."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""
    generation_config: bool = False
    """Use the decoding settings in the checkpoint's generation_config.json, instead of the decoding flags."""
    attention: Path | None = None
    """HTML file to draw the cross-attention of the first 20 lines to."""
    layers: tuple[int, ...] = ()
    """With --attention: layers to draw, from 1. None: the last one."""
    heads: tuple[int, ...] = ()
    """With --attention: heads to draw, from 1. None: all, and their mean."""
    prefix: tyro.conf.Suppress[str | None] = None
    """Text before every line; None: that of the model's training. For `text2text run`."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.window < 1 or self.longest < 0:
            raise RunError("--batch and --window must be at least 1, --longest at least 0.")
        if self.attention is None and (self.layers or self.heads):
            raise RunError("--layers and --heads select what --attention draws: give it a file.")
        if self.attention is not None and not self.attention.absolute().parent.is_dir():
            raise RunError(f"--attention {self.attention}: there is no folder {self.attention.absolute().parent}.")
        if self.generation_config and self.decode != type(self).decode:
            raise RunError("--generation-config replaces the flags of decoding: leave one out.")

    @staticmethod
    def check_arguments(arguments: Sequence[str]) -> None:
        """Refuse flags that another flag makes meaningless, whatever their values."""
        given = flags(arguments)
        if "generation_config" in given:
            refuse_decoding_flags(given, "--generation-config replaces the flags of decoding")


def main(config: RunConfig) -> int:
    """Run `bestiary translate run`; return the exit status."""
    import jax  # imported here, since it would delay --help

    from ..attention_page import MOST
    from .attention_map import draw_attention, to_draw
    from .translator import open_translator

    progress = Progress()
    translator = open_translator(
        config.model,
        None if config.generation_config else config.decode,
        rows=config.batch,
        longest=config.longest,
        too_long=config.too_long,
        dtype=config.dtype,
        prefix=config.prefix,
    )
    if config.attention is not None:
        to_draw(
            translator.model.config, config.layers, config.heads
        )  # refuse layers that do not exist, before any work
    several = translator.decode.n_best > 1
    drawn: list[Translation] | None = None if config.attention is None else []
    tidy_at = 0
    for lines in Lines(sys.stdin.buffer, config.window):
        if translator.lines:
            progress.update(f"{counted(translator.lines, 'line')} translated")
        if translator.lines >= tidy_at and jax.default_backend() == "cpu":
            return_freed_memory()
            tidy_at = translator.lines + config.window
        try:
            for translations in translator.answers(lines):
                for translation in translations if several else translations[:1]:
                    score = f"{translation.score:.4f}\t" if config.scores or several else ""
                    sys.stdout.write(f"{score}{translation.text}\n")
                if drawn is not None and len(drawn) < MOST and translations[0].parts:
                    drawn.append(translations[0])
        finally:
            sys.stdout.flush()
    if config.attention is not None and drawn is not None:
        draw_attention(config.attention, translator, drawn, config.layers, config.heads)
        progress.line(f"cross-attention of {counted(len(drawn), 'line')}: {config.attention}")
    progress.line(f"{counted(translator.lines, 'line')} translated")
    for note in translator.findings:
        progress.line(note)
    return 0
