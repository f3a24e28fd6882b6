"""The settings of `bestiary pretrain`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from ..config import LoopConfig, OptimConfig, SpreadConfig
from ..errors import RunError

MaskingKind = Literal["token", "word", "ngram", "span"]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain BERT on text: masked language model and next sentence prediction.

    With no arguments: a small BERT on Python's own documentation, about three minutes on two CPU cores.
    """

    corpus: tuple[str, ...] = ()
    """Files or folders of text, Markdown, WikiText or JSON lines (.gz and .zst too), prepared tensorflow-datasets
    folders, or tfds:NAME. None: the documentation that every Python carries."""
    validation_corpus: tuple[str, ...] = ()
    """Held-out text, like --corpus. None: a share of the corpus's documents is held out."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    encoding: str = "utf-8"
    """Character encoding of the corpus."""
    text_field: str = "text"
    """Field of JSON lines, or feature of a tensorflow-datasets folder, that holds the text."""
    tokenizer: Path | None = None
    """Folder of a WordPiece tokenizer, or its vocab.txt. None: one is trained on the corpus."""
    vocab_size: int = 4096
    """Word pieces of a tokenizer that is trained here."""
    lowercase: bool = True
    """Whether a tokenizer that is trained here lower-cases the text and strips accents."""
    language: str = "en"
    """Language of the corpus (ISO 639-1), for the rules that sentences are split by."""
    blank_line: Literal["paragraph", "document"] = "paragraph"
    """What blank lines separate in plain text: paragraphs, or documents with a sentence a line (BERT's own format)."""
    cache: Path | None = None
    """Folder for tokenised corpora, which later runs share. None: bestiary/ in the user's cache folder."""
    workers: int = 0
    """Processes that tokenise; 0: one a core."""

    model: str = "bert-tiny"
    """Size: bert-tiny, -mini, -small, -medium, -base or -large. The vocabulary is the tokenizer's."""
    dropout: float = 0.1
    """Share of hidden values and of attention probabilities that is dropped."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; parameters are float32 always. auto: bfloat16 on an accelerator, float32 on a CPU."""
    scan_layers: bool = True
    """Compile one layer and loop over it; off writes all layers out: same numbers, longer compilation."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    attention: str | None = None
    """Backend of the attention kernel; None takes the fastest that supports the call."""

    sequence_length: int | None = None
    """Tokens a row; short examples share rows. None: 128."""
    batch_tokens: int = 2048
    """Tokens a step, padding included: rows a step times the sequence length."""
    steps: int | None = None
    """Updates. None: 1,200."""
    phases: tuple[str, ...] = ()
    """LENGTH:STEPS[:LEARNING_RATE] of each phase, instead of --sequence-length and --steps: `128:18000 512:2000` as in
    the paper. A phase with a learning rate of its own warms up and decays anew."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; the numbers stay the same."""
    masking: MaskingKind = "token"
    """What is hidden at once: a token, a whole word, an n-gram of up to 3 words, or a span of up to 10."""
    mask_rate: float = 0.15
    """Share of the tokens that is predicted: of these 80 % become [MASK], 10 % a random token, 10 % stay."""
    static_masks: int = 0
    """Copies of the corpus with masks and pairs of their own, repeated after that, as the original did (with 10).
    0: new ones in every epoch."""
    next_sentence: bool = True
    """Predict whether sentence B follows A. Off: rows of running text without pairs, as RoBERTa's."""
    seed: int = 0
    """Of everything random."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, warmup=0.1)
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    evaluation_rows: int = 512
    """Most held-out rows that an evaluation reads; 0: all."""

    out: Path = Path("runs/pretrain")
    """Run folder. A run that was stopped goes on when the same command is given again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, that a new run goes on from, with optimiser and data position."""
    init_from: Path | None = None
    """Checkpoint folder (config.json, model.safetensors) whose weights a new run starts from."""

    spread: Annotated[SpreadConfig, tyro.conf.arg(name="")] = field(default_factory=SpreadConfig)

    def __post_init__(self) -> None:
        from ...models.bert import BertConfig  # needs JAX, which --help does not

        if self.model not in BertConfig.PRESETS:
            raise RunError(f"--model {self.model}: known are {', '.join(BertConfig.PRESETS)}.")
        if self.phases and (self.sequence_length is not None or self.steps is not None):
            raise RunError("--phases has lengths and steps of its own: leave --sequence-length and --steps out.")
        if not 0 < self.mask_rate <= 1:
            raise RunError(f"--mask-rate is {self.mask_rate}; it must be above 0 and at most 1.")
        if not 0 <= self.dropout < 1:
            raise RunError(f"--dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.accumulate < 1 or self.static_masks < 0:
            raise RunError("--accumulate must be at least 1 and --static-masks at least 0.")
        for phase in parse_phases(self):
            if self.batch_tokens % phase.length:
                raise RunError(
                    f"--batch-tokens {self.batch_tokens} is not a multiple of the sequence length {phase.length}."
                )


# Settings that change neither the numbers of a run nor what it leaves behind: they may differ when it is started again.
FREE = frozenset({
    "out", "cache", "workers", "remat", "scan_layers", "loop.keep", "loop.checkpoint_every",
    "spread.parallel", "spread.mesh", "spread.coordinator", "spread.processes", "spread.process",
})  # fmt: skip


class Phase(NamedTuple):
    """A stretch of a run with one sequence length."""

    length: int
    steps: int
    learning_rate: float | None


def parse_phases(config: PretrainConfig) -> list[Phase]:
    """The phases that the configuration asks for; a run without --phases has one.

    Raises:
        RunError: a phase that cannot be read, has no steps, or a learning rate that is not positive.
    """
    phases = []
    for text in config.phases:
        parts = text.split(":")
        try:
            rate = float(parts[2]) if len(parts) == 3 else None
            phases.append(Phase(int(parts[0]), int(parts[1]), rate))
        except (ValueError, IndexError):
            raise RunError(f"--phases {text}: expected LENGTH:STEPS or LENGTH:STEPS:LEARNING_RATE.") from None
    phases = phases or [Phase(config.sequence_length or 128, 1200 if config.steps is None else config.steps, None)]
    for number, phase in enumerate(phases, 1):
        if phase.steps < 1:
            raise RunError(f"Phase {number} has {phase.steps} steps; it needs at least one.")
        if phase.learning_rate is not None and not phase.learning_rate > 0:
            raise RunError(f"Phase {number} has learning rate {phase.learning_rate}; it must be above 0.")
    return phases
