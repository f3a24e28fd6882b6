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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ...data.multitask.mixture import Mixture
from ...kernels.platform import compiling_for
from ..errors import RunError
from ..loop import Stop, Training
from ..machine.chips import Target
from ..progress import Progress
from ..run import Run, RunConfig, planning
from ..run_folder import RunFolder
from ..sharding import Parallelism, Replicas, TrainStep, make_mesh

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
    task: str = ""  # whose batches it takes, of several

    def compile(self) -> Any:
        """Compile it."""
        return self.traced.lower(lowering_platforms=(LOWERED.get(self.platform, self.platform),)).compile()


class Planned(Exception):
    """Raised where the training would begin."""

    def __init__(self, steps: list[Step]):
        super().__init__("planned")
        self.steps = steps


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


class PlannedPmap(PlannedParallelism):
    """`jax.pmap` over devices that are not there: every device has the whole state, as it says by `shard_map`."""

    def _shardings(self, shapes: Any, specs: Any) -> Any:
        del specs
        return jax.tree.map(lambda _: NamedSharding(self.mesh, P()), shapes)

    def compile_train(self, step: Callable[..., tuple[Any, Any]], specs: Any, *fixed: Any) -> TrainStep:
        def replica(state: Any, batch: Any, *fixed: Any) -> tuple[Any, Any]:
            return step(state, batch, Replicas("data"), *fixed)

        whole = P(), P("data"), *(P() for _ in fixed)
        run = jax.jit(
            jax.shard_map(replica, mesh=self.mesh, in_specs=whole, out_specs=P(), check_vma=False), donate_argnums=0
        )
        return TrainStep(run, run.trace, fixed)


@dataclass(frozen=True)
class PlannedRun(Run):
    """A run whose `fit` traces the training step, once for each task, and ends the command."""

    platform: str = "tpu"

    def fit(self, training: Training) -> NoReturn:
        parallelism, learner = self.parallelism, training.learner
        state = parallelism.abstract(learner.make, learner.specs)
        train = parallelism.compile_train(training.step, learner.specs, *training.fixed)
        of = training.batches
        batches = of.one_of_each() if isinstance(of, Mixture) else {"": next(of)}
        steps = []
        for task, values in batches.items():
            batch = parallelism.shard_batch(values)
            traced = train.trace(state, batch)
            steps.append(Step(traced, self.platform, dict(parallelism.mesh.shape), state, batch, training.fixed, task))
        raise Planned(steps)


KERNELS = ("tpu", "hopper")


def trace(main: Callable[[Any], int], config: Any, target: Target, attention: str | None, folder: Path) -> list[Step]:
    """Run a command up to its training; return its step, or those of its tasks.

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
        of = PlannedParallelism if run.parallelism.parallel == "mesh" else PlannedPmap
        parallelism = of(make_mesh(run.parallelism.mesh, target.devices))
        if of is PlannedPmap and parallelism.mesh.shape["data"] != len(target.devices):
            raise RunError(f"--parallel pmap: --mesh {run.parallelism.mesh} must put all devices on the data axis.")
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
            return planned.steps
    raise RunError("Nothing is trained: the command ended before its first step.")
