"""What all tasks are fine-tuned with. No JAX here: `--help` is to be quick."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..config import LoopConfig, OptimConfig, SpreadConfig
from ..errors import RunError

if TYPE_CHECKING:
    from ...models.lora import LoraConfig


@dataclass(frozen=True)
class AdaptConfig:
    """What is trained of a model, if not all of it."""

    lora_rank: int = 0
    """LoRA: the inner width of the adapters; the model's own weights stay as they are. 0: no adapters."""
    lora_alpha: float = 16.0
    """LoRA: what an adapter gives is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """LoRA: share of an adapter's inputs that is dropped."""
    lora_targets: tuple[str, ...] = ("query", "value")
    """LoRA: which linear maps: query, key, value, output, attention, feed-forward, all-linear, the end of a name in the
    checkpoint (as peft's target_modules), or a regular expression for such a name."""
    bitfit: bool = False
    """BitFit: train the biases (and the head) alone."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise RunError(f"--lora-rank is {self.lora_rank}; it must be at least 1, or 0 for no adapters.")
        if self.lora_rank and self.bitfit:
            raise RunError("--lora-rank and --bitfit exclude each other.")
        if self.lora_rank:
            self.lora()

    def lora(self) -> "LoraConfig":
        """The adapters' settings; `LoraError` says what is wrong with them."""
        from ...models.lora import LoraConfig

        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What all tasks are fine-tuned with."""

    model: Path
    """Checkpoint folder to start from (config.json, model.safetensors, tokenizer files); with another head than the
    task's, its encoder is taken."""
    epochs: float = 3.0
    """Times that the training examples are gone through."""
    steps: int = 0
    """Updates, instead of --epochs."""
    batch_size: int = 32
    """Examples of an update."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; the numbers stay the same."""
    max_length: int = 128
    """Tokens of an example, at most; what is longer is cut."""
    train_examples: int = 0
    """Train on so many examples, drawn by the seed; 0: all."""
    seed: int = 0
    """Of the new head, the order of the examples and dropout."""
    dropout: float | None = None
    """Share of hidden values and of attention probabilities that is dropped. None: what the checkpoint says."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; parameters are float32 always. auto: bfloat16 on an accelerator, float32 on a CPU."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    scan_layers: bool | None = None
    """Compile one layer and loop over it; off writes all layers out: same numbers and faster steps, longer compilation.
    None: models of up to 8 layers are written out."""
    attention: str | None = None
    """Backend of the attention kernel; None takes the fastest that supports the call."""
    freeze_layers: int = 0
    """The embeddings and so many of the lowest layers stay as they are."""
    layer_decay: float = 1.0
    """Each layer's learning rate is that of the layer above it times this; pooler and head have the full rate."""
    adapt: Annotated[AdaptConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(learning_rate=5e-5, warmup=0.1, weight_decay=0.0, epsilon=1e-8)
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    evaluate_epochs: float = 1.0
    """Epochs between evaluations, where --evaluate-every is 0."""
    patience: int = 0
    """End after so many evaluations in turn that are no better than the best; 0: never before the last step."""
    take: Literal["last", "best"] | None = None
    """Which weights the run leaves behind: the last, or those of the best evaluation. None: best with --patience."""

    out: Path
    """Run folder. A run that was stopped goes on when the same command is given again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, that a new run goes on from, with optimiser and data position."""
    spread: Annotated[SpreadConfig, tyro.conf.arg(name="")] = field(default_factory=SpreadConfig)

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "accumulate": 1, "max_length": 4, "steps": 0, "train_examples": 0, "patience": 0}
        for name, value in {**least, "freeze_layers": 0}.items():
            if getattr(self, name) < value:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {value}.")
        if not (self.steps or self.epochs > 0):
            raise RunError(f"--epochs is {self.epochs}; it must be above 0.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise RunError(f"--dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not 0 < self.layer_decay <= 1:
            raise RunError(f"--layer-decay is {self.layer_decay}; it must be above 0 and at most 1.")
        if not self.evaluate_epochs > 0:
            raise RunError(f"--evaluate-epochs is {self.evaluate_epochs}; it must be above 0.")


# Settings that change neither the numbers of a run nor what it leaves behind: they may differ when it is started again.
FREE_HERE = (
    "out",
    "remat",
    "scan_layers",
    "loop.keep",
    "loop.checkpoint_every",
    *(f"spread.{f.name}" for f in dataclasses.fields(SpreadConfig)),
)
FREE = frozenset(f"run.{name}" for name in FREE_HERE)
