"""Settings shared by several commands: loop, optimiser and devices. Does not import JAX, so that --help is fast."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from .errors import RunError, check_setting
from .machine.tracking import Tracker, require_tracker

if TYPE_CHECKING:
    from ..models.lora import LoraConfig

Attention = Literal["hopper", "tpu", "cudnn", "xla"]
"""Names of attention backends, those of `kernels.BACKENDS`; here, since that module imports JAX."""
Optimizer = Literal["adamw", "lamb", "stable-adamw", "adafactor", "muon", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "inverse_sqrt", "t5", "wsd"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and the learning-rate schedule."""

    optimizer: Optimizer = "adamw"
    """Optimiser: adamw (Loshchilov and Hutter 2017); lamb (You et al. 2019) for batches of thousands of rows;
    stable-adamw (Wortsman et al. 2023), ModernBERT's, whose clipping by tensor replaces --clip-norm; adafactor (Shazeer
    and Stern 2018), T5's, whose steps are relative to the parameters' size (a rate of 1e-3 to 1e-2); muon (Jordan et
    al. 2024) for the matrices of the layers, with Adam for everything else; sgd, with a momentum of --beta1, by which
    ViT's paper fine-tunes (a rate of 1e-3 to 6e-2, no --weight-decay)."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached at the end of the warmup."""
    warmup: float = 0.01
    """Length of the linear warmup: a fraction of the steps if below 1, else a number of steps."""
    schedule: Schedule = "linear"
    """Learning-rate schedule after the warmup: linear or cosine, down to zero at the last step; constant stays at the
    peak; inverse_sqrt falls with the square root of the step (Vaswani et al. 2017, 5.3); t5 is constant for 10,000
    steps and then does so (Raffel et al. 2020, 3.1.2: a --learning-rate of 0.01, no --warmup); wsd
    (warmup-stable-decay) stays at the peak, then falls as 1 - sqrt of the share of --cooldown that is done (Hägele et
    al. 2024)."""
    cooldown: float = 0.0
    """Length of a final decay to zero: a fraction of the steps after the warmup if below 1, else a number of steps. It
    is linear, on top of the schedule, or the decay of wsd. 0: none, or 0.1 for wsd."""
    weight_decay: float = 0.01
    """Decoupled weight decay on kernels and embeddings, not on biases and normalisation scales."""
    independent_decay: bool = False
    """Weight decay independent of the learning rate's peak: a step takes --weight-decay times the schedule's fraction
    of its peak from a weight, as in the code of ViT's baselines. Off: that times the learning rate."""
    decay_embeddings: bool = True
    """Apply weight decay to embeddings too. Off: to kernels alone."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment, or of the momentum of sgd."""
    beta2: float = 0.999
    """Decay rate of Adam's second moment."""
    epsilon: float = 1e-6
    """Added to the square root of the second moment."""
    bias_correction: bool = True
    """Correct the bias of Adam's moments towards zero in the first steps. Off: as in the released code of BERT, ALBERT
    and ELECTRA, whose first steps are several times larger; for --optimizer adamw and lamb."""
    clip_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the parameters, which is then evaluated and exported; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            check_setting(self, name, above=0)
        for name in ("warmup", "cooldown", "weight_decay", "clip_norm"):
            check_setting(self, name, least=0)
        for name in ("beta1", "beta2", "ema"):
            check_setting(self, name, least=0, below=1)
        if not self.bias_correction and self.optimizer not in ("adamw", "lamb"):
            raise RunError(f"--no-bias-correction goes with --optimizer adamw or lamb, not {self.optimizer}.")


def upgrade_optim(stored: Any) -> Any:
    """Convert the settings of an optimiser in an earlier version's config.json to this version's."""
    if not isinstance(stored, dict) or "decay" not in stored:
        return stored
    return {"schedule" if name == "decay" else name: value for name, value in stored.items()}


@dataclass(frozen=True)
class LoopConfig:
    """Intervals of logging, evaluating and saving."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl; each line has the means over these steps, and totals since the start."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out data; 0: only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep; with 1, there is none to go back to if it is damaged."""
    keep_best: int = 0
    """Number of checkpoints to keep besides, those of the best evaluations: by the metric that selects the best model,
    or else by the held-out loss. Every evaluation then saves one; one that is stopped before its end has no rank."""
    track: Tracker | None = None
    """Record the metrics with wandb or trackio too, if installed: offline, unless WANDB_MODE says otherwise."""
    hang_after: int = 1800
    """Seconds without the end of a step or an evaluation after which the stacks of all threads are reported, and which
    process is behind; 0: never."""
    profile: int = 0
    """Number of steps, from the tenth on, to trace for TensorBoard's profiler (`profile/` in the run folder)."""

    def __post_init__(self) -> None:
        require_tracker(self.track)
        for name in ("log_every", "checkpoint_every", "keep"):
            check_setting(self, name, least=1)
        for name in ("evaluate_every", "keep_best", "hang_after", "profile"):
            check_setting(self, name, least=0)


@dataclass(frozen=True)
class ParallelConfig:
    """Division of a run over devices and processes."""

    parallel: Literal["mesh", "pmap"] = "mesh"
    """mesh: jit over a mesh, which can divide the model; pmap: a replica on each device, gradients averaged."""
    mesh: str = "data=-1"
    """Number of devices along data (rows), fsdp (rows, and parameters), tensor (heads, vocabulary, feed-forward) and
    sequence (positions of a row): `data=4,fsdp=2`; -1 takes the remaining ones."""
    coordinator: str | None = None
    """Address of process 0, HOST:PORT, if there are several processes. On TPU pods and under SLURM it is detected."""
    processes: int | None = None
    """Number of processes, with --coordinator."""
    process: int | None = None
    """Index of this process, from 0, with --coordinator."""
    join_timeout: int = 300
    """Seconds to wait for the other processes at the start."""

    def __post_init__(self) -> None:
        check_setting(self, "join_timeout", least=1)


@dataclass(frozen=True)
class AdaptConfig:
    """Options for training only some parameters of a model."""

    lora_rank: int = 0
    """LoRA: rank of the adapters; the model's own weights are frozen. 0: no adapters."""
    lora_alpha: float = 16.0
    """LoRA: an adapter's output is scaled by alpha / rank."""
    rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones."""
    lora_dropout: float = 0.0
    """LoRA: dropout rate of an adapter's inputs."""
    lora_targets: tuple[str, ...] = ("query", "value")
    """LoRA: linear layers to adapt: query, key, value, output, attention, feed-forward, all-linear, the end of a name
    in the checkpoint (as in peft's target_modules), or a regular expression for such a name."""
    bitfit: bool = False
    """BitFit: train only the biases and the head."""

    def __post_init__(self) -> None:
        check_setting(self, "lora_rank", least=0)
        if self.lora_rank and self.bitfit:
            raise RunError("--lora-rank and --bitfit are mutually exclusive.")
        if self.lora_rank:
            self.lora()

    def lora(self) -> "LoraConfig":
        """Return the settings of the adapters; raise LoraError if they are invalid."""
        from ..models.lora import LoraConfig

        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.rslora)


# Settings of every run that change neither its numbers nor what it exports: they may change when it is resumed.
FREE = (
    "out",
    "remat",
    "scan_layers",
    "loop.keep",
    "loop.keep_best",
    "loop.track",
    "loop.checkpoint_every",
    "loop.hang_after",
    "loop.profile",
    *(f"parallelism.{setting.name}" for setting in fields(ParallelConfig)),
)
