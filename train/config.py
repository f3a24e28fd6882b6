"""Settings that several commands share: of the loop, the optimiser and the devices. None needs JAX: --help is quick."""

from dataclasses import dataclass
from typing import Literal

from .errors import RunError

Decay = Literal["linear", "cosine", "constant", "inverse_sqrt"]


@dataclass(frozen=True)
class LoopConfig:
    """How often the loop looks up."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl, each the mean over those steps."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out data; 0: at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("evaluate_every", 0), ("checkpoint_every", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise RunError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and the learning rate's course."""

    optimizer: Literal["adamw", "lamb"] = "adamw"
    """AdamW (Loshchilov and Hutter 2017), or LAMB (You et al. 2019) for batches of thousands of rows."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    warmup: float = 0.01
    """Warm-up: a share of the steps if below 1, else a number of steps."""
    decay: Decay = "linear"
    """Course after the warm-up, down to zero at the last step; 'constant' stays at the peak, 'inverse_sqrt' falls with
    the root of the step (Vaswani et al. 2017, 5.3)."""
    cooldown: float = 0.0
    """End of the course: the rate comes down to zero in a line on top of its decay, over a share of the steps after the
    warm-up if below 1, else over a number of steps; 0 for none."""
    weight_decay: float = 0.01
    """Decoupled weight decay on kernels and embeddings, not on biases and normalisation scales."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    ema: float = 0.0
    """Decay of a running mean of the parameters, which is then what is evaluated and left behind; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise RunError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("warmup", "cooldown", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise RunError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")


@dataclass(frozen=True)
class SpreadConfig:
    """Which devices a run takes, and how."""

    parallel: Literal["mesh", "pmap"] = "mesh"
    """mesh: jit over a mesh, which can divide the model; pmap: a replica on each device, gradients averaged."""
    mesh: str = "data=-1"
    """Devices along data, fsdp and tensor: `data=4,fsdp=2`; -1 takes those that are left."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes run. Found by itself on TPU pods and under SLURM."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""
