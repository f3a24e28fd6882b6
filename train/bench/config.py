"""The settings of `bestiary bench pretrain` and `bestiary bench translate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...data.tokenizers.kinds import PairKind
from ..config import Attention, ParallelConfig
from ..errors import RunError
from ..generate.config import DecodeConfig


@dataclass(frozen=True)
class PretrainBenchConfig:
    """Measure pretraining steps on this machine. Only the figures are saved."""

    corpus: tuple[str, ...] = ()
    """As for `bestiary pretrain`."""
    tokenizer: Path | None = None
    """As for `bestiary pretrain`."""
    cache: Path | None = None
    """As for `bestiary pretrain`."""
    model: str = "bert-mini"
    """Size of the model."""
    objective: str | None = None
    """As for `bestiary pretrain`."""
    teacher: Path | None = None
    """Measure `bestiary distill` with this teacher."""
    sequence_length: int = 512
    """Length of a packed row, in tokens."""
    rows: int = 8
    """Rows per step, over all devices."""
    steps: int = 60
    """Number of steps; each is timed separately."""
    skip: int = 5
    """Number of initial steps to exclude from the timing."""
    learning_rate: float = 5e-4
    """Peak learning rate, constant after warmup."""
    warmup: int = 20
    """Warmup steps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """As for `bestiary pretrain`."""
    attention: Attention | None = None
    """As for `bestiary pretrain`."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """JSON file to write, in addition to printing it."""


@dataclass(frozen=True)
class TranslateBenchConfig:
    """Measure training steps and decoding on this machine. Only the figures are saved."""

    source: Path | None = None
    """File of source sentences to train on."""
    target: Path | None = None
    """File of their translations."""
    tokenizer: Path | None = None
    """As for `bestiary translate train`."""
    subwords: PairKind = "unigram"
    """As for `bestiary translate train`."""
    vocab_size: int = 8000
    """As for `bestiary translate train`."""
    cache: Path | None = None
    """As for `bestiary translate train`."""
    preset: str = "transformer-tiny"
    """As for `bestiary translate train`."""
    dropout: float = 0.3
    """As for `bestiary translate train`."""
    row_tokens: int = 64
    """As for `bestiary translate train`."""
    batch_tokens: int = 4096
    """As for `bestiary translate train`."""
    steps: int = 60
    """Number of steps; each is timed separately."""
    skip: int = 5
    """Number of initial steps to exclude from the timing."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """As for `bestiary translate train`."""
    attention: Attention | None = None
    """As for `bestiary translate train`."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)
    model: Path | None = None
    """Run folder or checkpoint folder of the model that translates --test, instead of the model trained here."""
    test: Path | None = None
    """File of sentences to translate."""
    limit: int = 1000
    """Number of lines of --test to translate."""
    batch: int = 64
    """Sentences per batch."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: DecodeConfig(beam=5, max_length=64)
    )
    out: Path | None = None
    """JSON file to write, in addition to printing it."""

    def __post_init__(self) -> None:
        if self.source is None and (self.model is None or self.test is None):
            raise RunError("Nothing to measure: give --source and --target, or --model and --test.")
        if self.steps <= self.skip:
            raise RunError(f"--steps {self.steps} leaves nothing to time after --skip {self.skip}.")
