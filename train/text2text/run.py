"""Write an output for each line of text, in order.

bestiary text2text run --model runs/summaries --beam 4 < sources.txt > summaries.txt
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..generate.config import DecodeConfig
from ..translate.config import TooLong
from ..translate.run import RunConfig
from ..translate.run import main as run_lines

DECODE = DecodeConfig(beam=4, max_length=128)
"""Default decoding options of the commands."""


@dataclass(frozen=True)
class Text2TextRun(RunConfig):
    """Write an output for each line of standard input to standard output."""

    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = DECODE
    too_long: TooLong = "cut"
    """Handling of longer lines: cut them and report their number; split them and write the outputs of the parts; or
    refuse them."""
    prefix: str | None = None
    """Text before every line, as T5 names its tasks. None: that of the model's training."""
    attention: tyro.conf.Suppress[Path | None] = None
    layers: tyro.conf.Suppress[tuple[int, ...]] = ()
    heads: tyro.conf.Suppress[tuple[int, ...]] = ()


def main(config: Text2TextRun) -> int:
    """Run `bestiary text2text run`; return the exit status."""
    return run_lines(config)
