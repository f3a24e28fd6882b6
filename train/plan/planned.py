"""A run that is planned: the command's own code up to the training, whose step is then compiled instead of run."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from ...kernels.platform import compiling_for
from ..errors import RunError
from ..loop import Stop, Training
from ..machine.chips import Target
from ..progress import Progress
from ..run import Run, RunConfig, planning
from ..run_folder import RunFolder
from ..sharding import Parallelism, make_mesh

LOWERED = {"gpu": "cuda"}
"""Platforms by the names that programs are lowered for, where they differ."""


class Step(NamedTuple):
    """The training step of a command for a target, traced but not compiled."""

    traced: Any
    platform: str
    mesh: dict[str, int]
    state: Any  # TrainState of ShapeDtypeStructs with shardings
    batch: dict[str, Any]
    fixed: tuple[Any, ...]

    def compile(self) -> Any:
        """Compile it."""
        return self.traced.lower(lowering_platforms=(LOWERED.get(self.platform, self.platform),)).compile()


class Planned(Exception):
    """Raised where the training would begin."""

    def __init__(self, step: Step):
        super().__init__("planned")
        self.step = step


class PlannedParallelism(Parallelism):
    """Parallelism over devices that are not there: arrays are only shapes with shardings."""

    def share(self, rows: int) -> tuple[int, int]:
        """Return the smallest part that a process could read; `shard_batch` makes it whole again."""
        if rows % self.divisor:
            raise RunError(
                f"A batch of {rows} rows cannot be divided over {self.divisor} devices (mesh axes data x fsdp)."
            )
        self._parts = rows
        return 0, rows

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> Any:
        def one(value: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = value.shape[0] * self._parts, *value.shape[1:]
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(value.dtype), sharding=self.batch_sharding)

        return {name: one(value) for name, value in batch.items()}

    def place(self, params: Any, specs: Any) -> Any:
        shardings = self._shardings(params, specs)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)


@dataclass(frozen=True)
class PlannedRun(Run):
    """A run whose `fit` traces the training step, and ends the command."""

    platform: str = "tpu"

    def fit(self, training: Training) -> NoReturn:
        parallelism, learner = self.parallelism, training.learner
        state = parallelism.abstract(learner.make, learner.specs)
        batch = parallelism.shard_batch(next(training.batches))
        traced = parallelism.compile_train(training.step, learner.specs, *training.fixed).trace(state, batch)
        raise Planned(Step(traced, self.platform, dict(parallelism.mesh.shape), state, batch, training.fixed))


KERNELS = ("tpu", "hopper")


def trace(main: Callable[[Any], int], config: Any, target: Target, attention: str | None, folder: Path) -> Step:
    """Run a command up to its training; return its step.

    Args:
        main: the command.
        config: its settings.
        target: chips to plan for.
        attention: --attention of the settings.
        folder: an empty folder for the run.

    Raises:
        RunError: what the command raises.
    """

    if attention == "cudnn":
        raise RunError("--attention cudnn: only a machine with such a GPU compiles it; plan with hopper, or without.")

    @contextmanager
    def start(run: RunConfig) -> Iterator[Run]:
        if run.parallelism.parallel != "mesh":
            raise RunError("--parallel pmap: it is planned as --mesh data=-1, whose program does the same.")
        parallelism = PlannedParallelism(make_mesh(run.parallelism.mesh, target.devices))
        with closing(RunFolder(folder / "run", run, frozenset())) as run_folder:
            yield PlannedRun(
                run, run_folder, parallelism, Progress(shown=False), Stop(), time.perf_counter(), target.chip.platform
            )

    with ExitStack() as stack:
        stack.enter_context(planning(start))
        stack.enter_context(compiling_for(target.chip.platform))
        if attention in KERNELS:
            stack.enter_context(import_module(f"....kernels.{attention}.backend", __name__).compiling())
        try:
            main(config)
        except Planned as planned:
            return planned.step
    raise RunError("Nothing is trained: the command ended before its first step.")
