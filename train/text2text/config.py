"""Options of `bestiary text2text train` and `bestiary finetune glue --as-text`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ...data.tasks.glue import GlueName
from ...data.tokenizers.kinds import PairKind
from ...data.tokenizers.pairs import TextForm
from ...models.checkpoints.config import require_checkpoint
from ..config import LoopConfig, OptimConfig
from ..errors import MOST_SEED, RunError, check_setting
from ..translate.config import TooLong, TranslateConfig

Metric = Literal["rouge", "sacrebleu", "exact"]
LONGEST_ANSWER = 16
"""Maximum length of an answer of a GLUE task, in tokens."""


@dataclass(frozen=True, kw_only=True)
class TextModelConfig(TranslateConfig):
    """Options of a model that writes a text for each text, whatever these are."""

    model: str
    """Checkpoint folder to start from; or a size in `bestiary models` (t5-small, bart-base, ...) of a new model, whose
    tokenizer is --tokenizer."""
    source_tokens: int = 512
    """Length of a packed row of sources, in tokens."""
    target_tokens: int = 128
    """Length of a packed row of targets, in tokens, and maximum length of an output."""
    batch_rows: int = 8
    """Rows per step."""
    dropout: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Dropout rate of embeddings and sub-layer outputs. None: the model's own."""
    attention_dropout: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Dropout rate of attention probabilities, of models that have one of their own. None: the model's own."""
    activation_dropout: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Dropout rate inside the feed-forward layers, likewise. None: the model's own."""
    label_smoothing: float = 0.0
    """Label smoothing: probability mass spread over all words."""
    steps: int = 1000
    """Maximum number of updates."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            optimizer="adafactor", learning_rate=1e-3, warmup=0, schedule="constant", weight_decay=0.0, clip_norm=0.0
        )
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(evaluate_every=250, checkpoint_every=250)
    )
    final_beam: int = 4
    """Beam size for the dev set's outputs at the end."""
    out: Path = Path("runs/text2text")
    """Run folder. To resume a run that was stopped, give the same command again."""

    source: tyro.conf.Suppress[Path | None] = None
    target: tyro.conf.Suppress[Path | None] = None
    pairs: tyro.conf.Suppress[str | None] = None
    languages: tyro.conf.Suppress[tuple[str, str]] = ("en", "en")
    subwords: tyro.conf.Suppress[PairKind] = "unigram"
    vocab_size: tyro.conf.Suppress[int] = 0
    joint: tyro.conf.Suppress[bool] = True
    split_digits: tyro.conf.Suppress[bool | None] = None
    lowercase: tyro.conf.Suppress[bool] = False
    moses: tyro.conf.Suppress[bool] = False
    sample_subwords: tyro.conf.Suppress[float] = 0.0
    preset: tyro.conf.Suppress[str] = "transformer-tiny"
    tying: tyro.conf.Suppress[Literal["all", "decoder", "none"] | None] = None
    pre_norm: tyro.conf.Suppress[bool] = False
    row_tokens: tyro.conf.Suppress[int] = 512
    batch_tokens: tyro.conf.Suppress[int] = 512
    init_from: tyro.conf.Suppress[Path | None] = None

    def __post_init__(self) -> None:
        for name in ("source_tokens", "target_tokens"):
            check_setting(self, name, least=8)
        check_setting(self, "batch_rows", least=1)
        folder = Path(self.model)
        given: dict[str, Any] = {"preset": self.model}
        if folder.is_dir() or len(folder.parts) > 1:
            require_checkpoint(folder)
            given = {"init_from": folder}
        elif self.tokenizer is None:
            raise RunError(
                f"--model {self.model}: no folder of that name, and a new model of that size needs --tokenizer."
            )
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self.check()

    @property
    def rows(self) -> int:
        """Number of rows of a batch."""
        return self.batch_rows

    @property
    def lengths(self) -> tuple[int, int]:
        """Length of a row of sources, and of one of targets."""
        return self.source_tokens, self.target_tokens

    @property
    def longest_output(self) -> int:
        """Maximum length of the outputs for the dev set."""
        return self.target_tokens

    @property
    def form(self) -> TextForm:
        """Preparation of the texts."""
        return TextForm(self.languages)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer: that of the checkpoint unless another is given."""
        return self.tokenizer or self.init_from

    @property
    def sources_too_long(self) -> TooLong:
        """What becomes of sources of the dev set that are longer than a row."""
        return "cut"


@dataclass(frozen=True, kw_only=True)
class Text2TextConfig(TextModelConfig):
    """Train a model that writes a target for each source: summaries, rewriting, answers, translation.

    From a checkpoint of T5, mT5, BART or another encoder-decoder, or from scratch with a released size and a tokenizer.
    """

    train: tuple[str, ...]
    """Training pairs: a .tsv or .jsonl file, a prepared tensorflow-datasets folder, or two files, sources and targets,
    one text per line (.gz and .zst too)."""
    fields: tuple[str, str] | None = None
    """Source and target in --train: column numbers of a .tsv, from 1, or names of fields or features. None: the first
    two columns, or `source` and `target`."""
    prefix: str = ""
    """Text before every source, as T5 names its tasks: `summarize: `. It is saved with the model."""
    metric: Metric = "sacrebleu"
    """Figure of the dev set, by which the best model is selected: rouge (the mean of ROUGE-1, 2 and L), sacrebleu
    (BLEU), or exact (share of outputs that are the target)."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.train) <= 2:
            raise RunError(f"--train names {len(self.train)} files; expected one with both sides, or two.")
        given: dict[str, Any] = {"pairs": self.train[0]}
        if len(self.train) == 2:
            given = {"source": Path(self.train[0]), "target": Path(self.train[1])}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def form(self) -> TextForm:
        """Preparation of the texts."""
        return TextForm(self.languages, prefix=self.prefix)

    @property
    def field_names(self) -> tuple[str, str]:
        """Names of the fields with source and target in a file with both, unless --fields gives others."""
        return "source", "target"


@dataclass(frozen=True, kw_only=True)
class GlueTextConfig(TextModelConfig):
    """Fine-tune T5, BART or the like on GLUE tasks as text, and write one table of their official metrics.

    The inputs have T5's prefixes, the answers are the names of the classes. An answer that is none of them is wrong.
    """

    data: Path
    """Folder that contains the folders of the tasks: CoLA, SST-2, MRPC, ..."""
    tasks: tuple[GlueName, ...] = ()
    """Tasks to fine-tune on, in this order. None: all tasks with training data in the folder."""
    seeds: tuple[int, ...] = ()
    """One run per seed and task, instead of --seed."""
    dev: tyro.conf.Suppress[tuple[str, ...]] = ()
    dev_pairs: tyro.conf.Suppress[int] = 1
    fields: tyro.conf.Suppress[tuple[str, str] | None] = None
    encoding: tyro.conf.Suppress[str] = "utf-8"

    def __post_init__(self) -> None:
        for name, highest in (("tasks", None), ("seeds", MOST_SEED)):
            given: tuple[Any, ...] = getattr(self, name)
            if len(set(given)) < len(given):
                raise RunError(f"--{name} {' '.join(map(str, given))}: each may be given once.")
            if highest is not None and not all(0 <= seed <= highest for seed in given):
                raise RunError(f"--{name} {' '.join(map(str, given))}: expected numbers from 0 to {highest}.")
        super().__post_init__()

    @property
    def longest_output(self) -> int:
        """Maximum length of the outputs for the dev set."""
        return min(LONGEST_ANSWER, self.target_tokens)
