"""Settings shared by all fine-tuning tasks. Does not import JAX, so that `--help` is fast."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ...models.checkpoints.config import fingerprint, require_checkpoint
from ..config import FREE as EVERY_FREE
from ..config import AdaptConfig, Attention, LoopConfig, OptimConfig, ParallelConfig, upgrade_optim
from ..errors import MOST_SEED, RunError, check_setting


@dataclass(frozen=True)
class TeacherConfig:
    """Options for learning from a larger model that was fine-tuned on the same task."""

    teacher: Path | None = None
    """Distillation: folder of a run that fine-tuned another, larger model on the same task, or its model/. The model
    then learns to predict as this teacher does, too. It needs the same vocabulary and classes; any family will do."""
    temperature: float = 2.0
    """Distillation: temperature of both models' predictions."""
    teacher_weight: float = 0.5
    """Distillation: weight w of the teacher's predictions: the loss is (1 - w) times the task's plus w times the
    divergence from the teacher's, times the square of --temperature (for values, the squared difference)."""
    teacher_fingerprint: tyro.conf.Suppress[str | None] = None  # by which a resumed run knows its teacher

    def __post_init__(self) -> None:
        check_setting(self, "temperature", above=0)
        check_setting(self, "teacher_weight", above=0, most=1)
        if self.teacher is None and (self.temperature, self.teacher_weight) != (2.0, 0.5):
            raise RunError("--temperature and --teacher-weight go with --teacher.")
        found = None if self.teacher is None else fingerprint(self.folder)
        object.__setattr__(self, "teacher_fingerprint", found)

    @property
    def folder(self) -> Path:
        """Checkpoint folder of the teacher.

        Raises:
            FileNotFoundError: there is none.
        """
        assert self.teacher is not None
        folder = self.teacher / "model" if (self.teacher / "task.json").is_file() else self.teacher
        require_checkpoint(folder)
        return folder


@dataclass(frozen=True)
class FinetuneLoopConfig(LoopConfig):
    """Intervals of fine-tuning, which evaluates by epochs."""

    evaluate_every: int = 0
    """Steps between evaluations on held-out data; 0: by --evaluate-epochs."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings shared by all fine-tuning tasks."""

    model: Path
    """Checkpoint folder to start from (config.json, model.safetensors, tokenizer files). If it has another head than
    the task needs, only its encoder is used."""
    epochs: float = 3.0
    """Number of passes over the training examples."""
    steps: int = 0
    """Number of updates, instead of --epochs."""
    batch_size: int = 32
    """Examples per update."""
    accumulate: int = 1
    """Number of gradient-accumulation micro-batches: parts of a batch that are computed in turn, to save memory. The
    results stay the same."""
    max_length: int = 128
    """Maximum length of an example, in tokens, special tokens included; longer examples are truncated. Short examples
    are packed into shared rows."""
    train_examples: int = 0
    """Number of training examples to sample; 0: all."""
    eval_examples: int = 0
    """Number of examples to evaluate on, always the same ones; 0: all. Test sets are not sampled."""
    no_test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out the test set: neither read nor predicted."""
    seed: int = 0
    """Seed of the new head, the order of the examples and dropout."""
    seeds: tuple[int, ...] = ()
    """One run per seed, instead of --seed, each in its own folder OUT/seed-N; OUT gets a table of mean and standard
    deviation."""
    dropout: float | None = None
    """Dropout rate of hidden states and attention probabilities. None: that of the checkpoint."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation; parameters are always float32. auto: bfloat16 on an accelerator, float32 on a
    CPU."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more computation."""
    scan_layers: bool | None = None
    """Compile one layer and loop over it. Off: unroll the layers, with the same results and faster steps, but longer
    compilation. None: unroll models of up to 8 layers."""
    attention: Attention | None = None
    """Attention backend. None: the fastest that supports the call."""
    freeze_layers: int = 0
    """Freeze the embeddings and this many of the lowest layers; 0: freeze nothing. Layers that share parameters
    (ALBERT) can only be frozen together."""
    layer_decay: float = 1.0
    """Factor from each layer's learning rate to that of the layer below; pooler and head have the full rate. Parameters
    that layers share (ALBERT) have the rate of the highest of them."""
    electra_layer_decay: bool = False
    """Decay the layers' learning rates once more below the head, as ELECTRA's released code does: the top layer's
    factor is then the square of --layer-decay."""
    auxiliary_lm: float = 0.0
    """For a decoder: weight of an additional loss, that of predicting each next token of the examples (0.5 in Radford
    et al. 2018, 3.2). It is a mean over an example's tokens, then over the examples."""
    delimiters: bool | None = None
    """For a decoder: put the new tokens _start_, _delimiter_ and _classify_ before, between and after texts (Radford et
    al. 2018, 3.3). None: for GPT, as in its paper, unless adapters are trained."""
    adapt: Annotated[AdaptConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptConfig)
    distil: Annotated[TeacherConfig, tyro.conf.arg(name="")] = field(default_factory=TeacherConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(learning_rate=5e-5, warmup=0.1, weight_decay=0.0, epsilon=1e-8)
    )
    loop: Annotated[FinetuneLoopConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneLoopConfig)
    evaluate_epochs: float = 1.0
    """Epochs between evaluations, unless --evaluate-every says otherwise; there is always one at the end."""
    patience: int = 0
    """Early stopping: stop after this many consecutive evaluations that are no better than the best; 0: never."""
    select: Literal["last", "best"] | None = None
    """Which checkpoint to export: the last, or that of the best evaluation. None: best with --patience, else last."""

    out: Path
    """Run folder. To resume a run that was stopped, give the same command again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, from which a new run continues, with optimiser state and data
    position."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_setting(self, "seed", least=0, most=MOST_SEED)
        if len(set(self.seeds)) < len(self.seeds) or not all(0 <= seed <= MOST_SEED for seed in self.seeds):
            raise RunError(
                f"--seeds {' '.join(map(str, self.seeds))}: expected numbers from 0 to {MOST_SEED}, each once."
            )
        for name in ("batch_size", "accumulate"):
            check_setting(self, name, least=1)
        for name in ("steps", "train_examples", "eval_examples", "patience", "freeze_layers"):
            check_setting(self, name, least=0)
        check_setting(self, "max_length", least=4)
        if not self.steps:
            check_setting(self, "epochs", above=0)
        check_setting(self, "dropout", least=0, below=1)
        check_setting(self, "layer_decay", above=0, most=1)
        check_setting(self, "auxiliary_lm", least=0)
        if self.electra_layer_decay and self.layer_decay == 1:
            raise RunError("--electra-layer-decay goes with --layer-decay, such as 0.8.")
        check_setting(self, "evaluate_epochs", above=0)


NEW_TAGGER = "bilstm"
"""What --model is for a new tagger, where no folder has this name."""


@dataclass(frozen=True)
class TaggingOptimConfig(OptimConfig):
    """The optimiser of a tagger, pretrained or new."""

    learning_rate: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride] (set below)
    """Peak learning rate, reached at the end of the warmup. None: 5e-5, or 2e-3 for a new tagger."""


@dataclass(frozen=True, kw_only=True)
class TaggingConfig(FinetuneConfig):
    """Settings of fine-tuning a tagger, or of training a new one."""

    model: Path = Path(NEW_TAGGER)
    """Checkpoint folder to start from (config.json, model.safetensors, tokenizer files). If it has another head than
    the task needs, only its encoder is used. Or bilstm: a new tagger of LSTMs in both directions over vectors of the
    training data's words, those that occur at least twice, and over --features."""
    features: Path | None = None
    """For bilstm: folder of an ELMo, of `bestiary pretrain --objective bilm` or bilm-tf's options.json and HDF5 file.
    It stays as it is; a trained mix of its layers extends each word's vector."""
    vectors: Path | None = None
    """For a new bilstm: file of word vectors, such as `bestiary words train` writes: initial vectors of words, those of
    all its words. None: 100 numbers drawn at random."""
    epochs: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride] (set below)
    """Number of passes over the training examples. None: 3, or 20 for a new tagger."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TaggingOptimConfig(warmup=0.1, weight_decay=0.0, epsilon=1e-8)
    )

    def __post_init__(self) -> None:
        if self.epochs is None:
            object.__setattr__(self, "epochs", 20.0 if self.new else 3.0)
        if self.optim.learning_rate is None:
            object.__setattr__(self, "optim", replace(self.optim, learning_rate=2e-3 if self.new else 5e-5))
        super().__post_init__()
        if not self.new:
            if self.vectors is not None:
                raise RunError(f"--vectors is for new embeddings; --model {self.model} has its own. Leave it out.")
            return
        without = {
            "--freeze-layers": self.freeze_layers,
            "--layer-decay": self.layer_decay != 1.0,
            "--lora-rank": self.adapt.lora_rank,
            "--bitfit": self.adapt.bitfit,
            "--teacher": self.distil.teacher,
            "--auxiliary-lm": self.auxiliary_lm,
            "--delimiters": self.delimiters,
            "--scan-layers": self.scan_layers,
        }
        for flag, given in without.items():
            if given:
                raise RunError(f"{flag} is for pretrained models; --model {NEW_TAGGER} is new. Leave it out.")

    @property
    def new(self) -> bool:
        """Whether the tagger is new; a run's folder of this name, as of --out, is no checkpoint."""
        return str(self.model) == NEW_TAGGER and not any(self.model.glob("model*.safetensors*"))


def finished_run(folder: Path) -> Path:
    """Return the folder of a finished fine-tuning run.

    Raises:
        RunError: it is another folder.
    """
    if (folder / "task.json").is_file() and (folder / "model" / "config.json").is_file():
        return folder
    parent = folder.resolve().parent
    meant = f" Did you mean {folder.parent}?" if (parent / "task.json").is_file() else ""
    raise RunError(f"{folder}: not the folder of a finished fine-tuning run (no task.json and model/ in it).{meant}")


# Settings that change neither the numbers of a run nor what it exports: they may change when it is resumed.
FREE = tuple(f"run.{name}" for name in EVERY_FREE)


def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
    """Convert a run folder's settings to this version's."""
    renamed = {"take": "select", "spread": "parallelism"}
    new = {"eval_examples": stored.get("eval_examples", 0), "no_test": False, "seeds": []}
    run = {renamed.get(name, name): value for name, value in stored.get("run", {}).items()}
    run |= {"optim": upgrade_optim(run.get("optim"))}
    return {**{name: value for name, value in stored.items() if name != "eval_examples"}, "run": new | run}
