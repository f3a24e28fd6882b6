"""Settings of `bestiary pretrain`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import tyro

from ...models.checkpoints.config import fingerprint, require_checkpoint
from ..arguments import flags
from ..config import FREE as EVERY_FREE
from ..config import Attention, LoopConfig, OptimConfig, ParallelConfig, upgrade_optim
from ..errors import MOST_SEED, RunError, check_setting

MaskingKind = Literal["token", "word", "ngram", "span"]
RowKind = Literal["sentences", "full-sentences", "doc-sentences"]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a model on text, by an objective that needs no labels.

    Without arguments: a small ModernBERT on Python's own documentation, about two minutes on two CPU cores.
    """

    corpus: tuple[str, ...] = ()
    """Files or folders of text, Markdown, WikiText or JSON lines (.gz and .zst too), prepared tensorflow-datasets
    folders, or tfds:NAME. None: the documentation that comes with Python."""
    validation_corpus: tuple[str, ...] = ()
    """Held-out text, like --corpus. None: a fraction of the corpus's documents is held out."""
    validation_fraction: float = 0.05
    """Fraction of the documents to hold out."""
    encoding: str = "utf-8"
    """Character encoding of the corpus."""
    text_field: str = "text"
    """Field of JSON lines, or feature of a tensorflow-datasets folder, that holds the text."""
    tokenizer: Path | None = None
    """Folder of a tokenizer, or a vocab.txt. A tokenizer of another kind than the model family's own is reported. None:
    that of --init-from, or one trained on the corpus, of the family's kind."""
    vocab_size: int = 4096
    """Vocabulary size of a newly trained tokenizer."""
    lowercase: bool = True
    """Lower-case the text and strip accents, in a newly trained WordPiece or unigram tokenizer."""
    language: str = "en"
    """Language of the corpus (ISO 639-1), for splitting it into sentences."""
    blank_line: Literal["paragraph", "document"] = "paragraph"
    """What blank lines separate in plain text: paragraphs, or documents with one sentence per line (BERT's own
    format)."""
    verbatim: bool = False
    """Keep markup, line ends and white space of the corpus as they are."""
    cache: Path | None = None
    """Folder to cache tokenised corpora in, which later runs reuse. None: bestiary/ in the user's cache folder."""
    workers: int = 0
    """Number of tokenising processes; 0: one per core."""

    model: str = "modernbert-tiny"
    """Size, one of `bestiary models`: bert-tiny, bert-mini, bert-base, ... The vocabulary is the tokenizer's. Without
    --model and --init-from, the optimiser is muon, with a learning rate of 0.01 (else adamw and 0.001)."""
    objective: str | None = None
    """Pretraining objective: mlm (masked words), mlm+nsp (also whether sentence B follows A), mlm+sop (also whether A
    and B are swapped), span+sbo (masked spans, also from the tokens beside them), rtd (which tokens a generator has
    replaced), causal (the next token, of GPT) or causal+memory (the same, with a memory of the text before, of
    Transformer-XL); for T5 span-corruption (the tokens of missing spans), for BART denoise
    (the whole text, from one with masked words and permuted sentences). None: that of the family's paper."""
    generator_size: float | None = None
    """Width of the generator of --objective rtd, as a fraction of the model's. None: that of the model's size."""
    generator: Path | None = None
    """Checkpoint folder of the generator of --objective rtd, for going on from both networks: generator/ of a run, or a
    released generator. --init-from is the discriminator, whose embeddings both use. None: a new generator."""
    rows: RowKind | None = None
    """Content of a row, for --objective mlm: sentences (examples of consecutive sentences of one document; several
    short examples share a row), full-sentences (RoBERTa's: the text runs on across documents, and <s> and </s> may be
    masked too) or doc-sentences (the same, but each row is from one document). None: the rows of the family's paper."""
    across_documents: bool = True
    """For --objective causal or causal+memory: let attention cross the boundaries of documents in a row, and in the
    memory, as in GPT-3. Off: each document sees only itself, and for causal its positions start anew."""
    memory: int | None = None
    """For --objective causal+memory: number of tokens before a row whose hidden states it sees; 0: none. None: that of
    the model's size."""
    dropout: float = 0.1
    """Dropout rate of hidden states and attention probabilities."""
    shared_dropout: bool = False
    """For T5: drop the same channels at all positions of a row, as the authors' training does. Off: each position by
    itself, as in the reference implementation."""
    z_loss: float = 0.0
    """For the objectives of encoder-decoders: weight of the square of the logarithm of the softmax's denominator in the
    training loss. T5's own training: 1e-4."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation; parameters are always float32. auto: bfloat16 on an accelerator, float32 on a
    CPU."""
    scan_layers: bool = True
    """Compile one layer and loop over it. Off: unroll the layers, with the same results but longer compilation."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more computation."""
    attention: Attention | None = None
    """Attention backend. None: the fastest that supports the call."""

    sequence_length: int | None = None
    """Length of a row, in tokens; several short examples are packed into one. None: 128."""
    batch_tokens: int = 2048
    """Tokens per step, padding included: rows per step times --sequence-length."""
    batch_ramp: tuple[str, ...] = ()
    """Smaller batches at the start, TOKENS:STEPS each, before those of --batch-tokens: `512:200 1024:200`. The learning
    rate's course and the text go on as if nothing changed."""
    steps: int | None = None
    """Number of training steps. None: 1,200."""
    phases: tuple[str, ...] = ()
    """Phases LENGTH:STEPS[:LEARNING_RATE], instead of --sequence-length and --steps: `128:18000 512:2000` as in the
    paper. A phase with a learning rate of its own has its own warmup and decay."""
    accumulate: int = 1
    """Number of gradient-accumulation micro-batches: parts of a batch that are computed in turn, to save memory. The
    results stay the same."""
    masking: MaskingKind | None = None
    """Unit of masking: a token, a whole word, an n-gram of up to 3 words, or a span of up to 10 words. None: a token,
    or a span for --objective span+sbo."""
    mask_rate: float | None = None
    """Fraction of the tokens to predict: of these 80 % become [MASK], 10 % a random token, 10 % stay (for rtd 85 %, 0 %
    and 15 %). None: 0.15; for ModernBERT 0.3, and 0.15 in evaluation; for BART 0.3, of the words."""
    static_masks: int = 0
    """Static masking: number of epochs with different masks and pairs, which are then repeated (10 in the original).
    0: dynamic masking, with new masks and pairs in every epoch."""
    seed: int = 0
    """Seed of everything random."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, warmup=0.1)
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    evaluation_rows: int = 512
    """Maximum number of held-out rows per evaluation; 0: all."""

    out: Path = Path("runs/pretrain")
    """Run folder. To resume a run that was stopped, give the same command again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, from which a new run continues, with optimiser state and data
    position."""
    init_from: Path | None = None
    """Checkpoint folder (config.json, model.safetensors) with the initial weights of a new run, and with its tokenizer
    unless --tokenizer is given."""
    vectors: Path | None = None
    """File of word vectors, such as `bestiary words train` writes: initial embeddings of a new model's tokens that are
    words; of byte-level BPE's, those in ASCII. They must be as wide as its embeddings."""

    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """Return the defaults of a command line: a first run, with no model named, has an optimiser of its own.

        In two minutes on two cores, Muon teaches it to predict a third of the masked words; AdamW stays at the
        frequencies of the words, as it does with a small BERT.
        """
        given = flags(arguments)
        if {"model", "init_from", "optimizer"} & set(given):
            return cls()
        return cls(optim=OptimConfig(optimizer="muon", learning_rate=1e-2, warmup=0.1))

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer, that of --init-from unless another is given; None to train one on the corpus."""
        return self.tokenizer or self.init_from

    def __post_init__(self) -> None:
        check_setting(self, "seed", least=0, most=MOST_SEED)
        if self.generator is not None:
            require_checkpoint(self.generator)
            if self.init_from is None:
                raise RunError("--generator goes with --init-from, the folder of its discriminator.")
        if self.init_from is not None:
            require_checkpoint(self.init_from)
            if self.generator_size is not None:
                raise RunError(f"--generator-size: the generator is as wide as {self.init_from} says. Leave it out.")
        if self.vectors is not None and (self.init_from is not None or isinstance(self, DistillConfig)):
            raise RunError("--vectors is for new embeddings; this model starts from a checkpoint's. Leave it out.")
        if self.phases and (self.sequence_length is not None or self.steps is not None):
            raise RunError("--phases includes lengths and steps: leave out --sequence-length and --steps.")
        check_setting(self, "mask_rate", above=0, most=1)
        check_setting(self, "generator_size", above=0, most=1)
        check_setting(self, "dropout", least=0, below=1)
        check_setting(self, "z_loss", least=0)
        check_setting(self, "accumulate", least=1)
        check_setting(self, "memory", least=0)
        check_setting(self, "static_masks", least=0)
        for name in ("steps", "sequence_length"):
            check_setting(self, name, least=1)
        for number, phase in enumerate(self.plan, 1):
            if phase.learning_rate is not None and not phase.learning_rate > 0:
                raise RunError(f"Phase {number} has learning rate {phase.learning_rate}; it must be above 0.")

    @cached_property
    def plan(self) -> tuple["Phase", ...]:
        """Return the phases of the run, cut where the batch size changes; without --phases, a single one.

        Raises:
            RunError: a phase is invalid, its length does not divide a batch, or the ramp is longer than the run.
        """
        phases = [_parse_phase(text) for text in self.phases]
        phases = phases or [(self.sequence_length or 128, 1200 if self.steps is None else self.steps, None)]
        stages: list[tuple[int, int | None]] = [*map(_parse_stage, self.batch_ramp), (self.batch_tokens, None)]
        plan: list[Phase] = []
        for number, (length, steps, rate) in enumerate(phases, 1):
            if steps < 1:
                raise RunError(f"Phase {number} has {steps} steps; it needs at least one.")
            done = 0
            while done < steps:
                tokens, left = stages[0]
                if length < 1 or tokens % length:
                    flag = "--batch-tokens" if left is None else "--batch-ramp"
                    raise RunError(f"{flag} {tokens} is not a multiple of the sequence length {length}.")
                here = steps - done if left is None else min(left, steps - done)
                plan.append(Phase(length, tokens // length, here, None if done else rate, done > 0))
                done += here
                if left is not None:
                    stages[:1] = [(tokens, left - here)] if left > here else []
        if len(stages) > 1:
            raise RunError("--batch-ramp has more steps than the run.")
        return tuple(plan)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(PretrainConfig):
    """Distil a masked language model into a smaller one, on text (DistilBERT; Sanh et al. 2019).

    The student learns to predict every token as its teacher does, to predict masked words, and to have hidden states of
    the same direction. The other options are those of `bestiary pretrain`, with the original's optimiser. A teacher
    that was fine-tuned on a task is distilled by `bestiary finetune TASK --teacher FOLDER`.
    """

    teacher: Path
    """Checkpoint folder of the teacher, a model with a masked language model head; its tokenizer is the student's."""
    temperature: float = 2.0
    """Temperature of both models' predictions in the first loss."""
    kl_weight: float = 5.0
    """Weight of the loss "kl": the divergence of the student's predictions from the teacher's, over all tokens, times
    the square of --temperature."""
    mlm_weight: float = 2.0
    """Weight of the loss "mlm": the cross-entropy of the masked words."""
    cosine_weight: float = 1.0
    """Weight of the loss "cosine": 1 - cosine of the two models' last hidden states, over all tokens. Not 0 only for
    models of the same width."""
    copy_layers: bool | None = None
    """Start from the teacher's embeddings, head and, evenly spaced from the first to the last, as many of its layers as
    the student has: 0, 2, 4, 7, 9 and 11 of 12 for 6. None: if they fit."""
    model: str = "half"
    """Size of the student, one of `bestiary models`, such as distilbert-base; half: the teacher's, with half of its
    layers."""
    objective: tyro.conf.Suppress[str | None] = "distill"
    generator_size: tyro.conf.Suppress[float | None] = None
    shared_dropout: tyro.conf.Suppress[bool] = False
    z_loss: tyro.conf.Suppress[float] = 0.0
    generator: tyro.conf.Suppress[Path | None] = None
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            learning_rate=5e-4, warmup=0.05, weight_decay=0.0, beta2=0.98, clip_norm=5.0
        )
    )
    tokenizer: Path | None = None
    """Folder of the student's tokenizer, or a vocab.txt, which must have the teacher's vocabulary. None: that of
    --init-from or, without it, the teacher's."""
    out: Path = Path("runs/distill")
    """Run folder. To resume a run that was stopped, give the same command again; the teacher must be the same."""
    teacher_fingerprint: tyro.conf.Suppress[str] = ""  # by which a resumed run knows its teacher

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer."""
        return self.tokenizer or self.init_from or self.teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        require_checkpoint(self.teacher)
        check_setting(self, "temperature", above=0)
        for name in ("kl_weight", "mlm_weight", "cosine_weight"):
            check_setting(self, name, least=0)
        if not self.kl_weight and not self.cosine_weight:
            raise RunError("Nothing is learnt from the teacher: --kl-weight or --cosine-weight must be above 0.")
        if self.copy_layers and self.init_from is not None:
            raise RunError("--copy-layers and --init-from are mutually exclusive: both give the first weights.")
        object.__setattr__(self, "teacher_fingerprint", fingerprint(self.teacher))


class Phase(NamedTuple):
    """A part of a run with one sequence length and one batch size."""

    length: int
    rows: int  # per batch
    steps: int
    learning_rate: float | None
    continued: bool = False  # whether it takes up the text where the phase before it, of the same length, stopped


def _parse_stage(text: str) -> tuple[int, int]:
    try:
        tokens, steps = map(int, text.split(":"))
    except ValueError:
        tokens = steps = 0
    if tokens < 1 or steps < 1:
        raise RunError(f"--batch-ramp {text}: expected TOKENS:STEPS, both at least 1.")
    return tokens, steps


def _parse_phase(text: str) -> tuple[int, int, float | None]:
    length, *rest = text.split(":")
    try:
        steps, *rates = rest
        (rate,) = map(float, rates) if rates else (None,)
        return int(length), int(steps), rate
    except ValueError:
        raise RunError(f"--phases {text}: expected LENGTH:STEPS or LENGTH:STEPS:LEARNING_RATE.") from None


# Settings that change neither the numbers of a run nor what it exports: they may change when it is resumed.
FREE = (*EVERY_FREE, "cache", "workers")


def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
    """Convert a run folder's settings to this version's.

    Raises:
        RunError: this version cannot continue the run.
    """
    stored = stored | {"optim": upgrade_optim(stored.get("optim"))}
    if "next_sentence" not in stored:
        return stored
    changed = {name: value for name, value in stored.items() if name not in ("next_sentence", "spread")}
    if not stored["next_sentence"]:
        raise RunError(
            f"{stored['out']} was begun by an earlier version with --no-next-sentence, whose model kept a "
            "next-sentence head that nothing trained. It cannot go on; a new run with --objective mlm can start from "
            "its weights by --init-from."
        )
    return {**changed, "parallelism": stored["spread"], "objective": "mlm+nsp", "rows": None}
