"""Settings of `bestiary multitask`. Does not import JAX, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import FREE as EVERY_FREE
from ..config import Attention, LoopConfig, OptimConfig, ParallelConfig
from ..errors import MOST_SEED, RunError, check_setting, check_text


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one model for several tasks: UniT, of images, of texts, and of questions about images."""

    config: Path
    """TOML file of the tasks, and of the model's parts: [image], [text], [decoder] and a [tasks.NAME] for each task.
    Its paths are relative to its folder."""
    steps: int = 2000
    """Number of updates; each takes a batch of one task, drawn by the tasks' shares."""
    batch_size: int = 64
    """Examples per update."""
    accumulate: int = 1
    """Number of gradient-accumulation micro-batches: parts of a batch that are computed in turn, to save memory. The
    results stay the same."""
    seed: int = 0
    """Seed of new parameters, of the order of the tasks and their examples, of augmentation and dropout."""
    threads: int = 2
    """Number of threads that read images and assemble batches."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation; parameters are always float32. auto: bfloat16 on an accelerator, float32 on a
    CPU."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more computation."""
    scan_layers: bool | None = None
    """Compile one layer of each stack and loop over it. Off: unroll the layers, with the same results and faster steps,
    but longer compilation. None: unroll stacks of up to 8 layers."""
    attention: Attention | None = None
    """Attention backend. None: the fastest that supports the call."""
    select: Literal["last", "best"] = "last"
    """Which checkpoint to export: the last, or that of the best evaluation, by the tasks' mean accuracy."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            learning_rate=5e-4, warmup=0.1, schedule="cosine", weight_decay=1e-4, decay_embeddings=False, epsilon=1e-8
        )
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    out: Path
    """Run folder. To resume a run that was stopped, give the same command again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, from which a new run continues, with optimiser state and data
    position."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_setting(self, "seed", least=0, most=MOST_SEED)
        for name in ("steps", "batch_size", "accumulate", "threads"):
            check_setting(self, name, least=1)
        if self.batch_size % self.accumulate:
            raise RunError(f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}.")


# Settings that change neither the numbers of a run nor what it exports: they may change when it is resumed.
FREE = tuple(f"run.{name}" for name in (*EVERY_FREE, "threads"))


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Print the answers of a task, one JSON object per example."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a checkpoint folder of such a model."""
    task: str
    """Name of the task."""
    image: tuple[Path, ...] = ()
    """Images, or folders of images."""
    text: tuple[str, ...] = ()
    """Texts of a task of texts."""
    text_pair: tuple[str, ...] = ()
    """Second texts of pairs, one per --text."""
    question: tuple[str, ...] = ()
    """Questions: one per image, one for all images, or several about one. Without --image, they are answered without
    seeing any."""
    top: int = 5
    """Number of classes to show, the most probable first."""
    batch_size: int = 32
    """Examples that are computed together."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            check_setting(self, name, least=1)
        for name in ("text", "text_pair", "question"):
            check_text(f"--{name.replace('_', '-')}", getattr(self, name))
