"""A run of a training command: everything around its loop, shared by all jobs.

    with start_run(config, FREE) as run:
        ...                                     data, model, optimiser
        fitted = run.fit(Training(...))         from the current step to the last
        if fitted.stopped is None:
            run.finish(model, params, tokenizer, results)
        return fitted.exit_status

A run starts from, in this order: (1) its own newest whole checkpoint, (2) a checkpoint named to resume from,
(3) weights named to initialise from, (4) scratch.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jax

from ..models import save
from .checkpoint import Checkpoints, Restored, check_space, read_params, restore_from, write_params
from .config import LoopConfig, ParallelConfig
from .errors import RunError
from .learner import TrainState, count_bytes, ema_or_params, on_host, with_params
from .loop import Fitted, Loop, Stop, Training
from .machine.agreement import require_agreement
from .progress import Progress, duration
from .run_folder import RunFolder, flatten, to_json
from .sharding import Parallelism, start_parallelism


class RunConfig(Protocol):
    """Settings that every run has."""

    @property
    def out(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def parallelism(self) -> ParallelConfig: ...
    @property
    def resume_from(self) -> Path | None: ...


@dataclass(frozen=True)
class Run:
    """A run that has started; see `start_run`."""

    config: RunConfig
    folder: RunFolder
    parallelism: Parallelism
    progress: Progress
    stop: Stop
    started: float = field(default_factory=time.perf_counter)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and messages for all processes."""
        return jax.process_index() == 0

    @property
    def intervals(self) -> LoopConfig:
        """Intervals of logging, evaluating and saving."""
        return self.config.loop

    @property
    def devices(self) -> str:
        """Description of the devices."""
        asked = self.config.parallelism
        return f"{devices_in_words()} (--parallel {asked.parallel} --mesh {asked.mesh})"

    def fit(self, training: Training) -> Fitted:
        """Train from the current step to the last, and report if the run is stopped.

        Raises:
            RunError: the checkpoint to resume from does not fit, or a step's metrics are not finite.
            OSError: the checkpoints do not fit on the disk.
        """
        learner = training.learner
        abstract = self.parallelism.abstract(learner.make, learner.specs)
        if self.main:
            kept = self.intervals.keep + self.intervals.keep_best + 1
            check_space(self.folder.checkpoints, kept * count_bytes(abstract))
        # A checkpoint that does not fit, or of other data, is refused before anything is written.
        self.folder.fetch_checkpoints()
        new = not self.folder.checkpoints.exists()
        named = self._named_checkpoint(training.steps, abstract) if new else None
        if named is not None:
            training.batches.set_state(named.extra_state["batches"])
        require_agreement("The data", {"training data": training.batches.get_state(), "steps": training.steps})
        self.folder.begin()
        checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=self.intervals.keep,
            keep_best=self.intervals.keep_best,
            report=self.progress.line,
            before=self.folder.publish_lines,
            saved=self.folder.publish,
        )
        with closing(checkpoints):
            restored = checkpoints.restore(abstract) or named or self._named_checkpoint(training.steps, abstract)
            if restored is None:
                state, start, extra_state = self._new_state(training), 0, None
            else:
                state, start, extra_state = restored
                self.progress.line(f"resuming from step {start}")
            for number in self.folder.rewind(start):
                self.progress.line(
                    f"{self.folder.folder / 'metrics.jsonl'}, line {number} was damaged; it was left out"
                )
            if extra_state is not None:
                remark = training.batches.set_state(extra_state["batches"])
                if remark is not None:
                    self.progress.line(remark)
            fitted = Loop(self, training, checkpoints, state=state, start=start, extra_state=extra_state).run()
        if fitted.stopped is not None:
            self.progress.line(f"stopped and saved at step {fitted.step}; give the same command again to resume")
        return fitted

    def _named_checkpoint(self, steps: int, abstract: Any) -> Restored | None:
        """Return the checkpoint of --resume-from, if given."""
        named = self.config.resume_from
        if named is None:
            return None
        restored = restore_from(named, abstract, self.progress.line)
        if restored.step >= steps:
            raise RunError(
                f"{named} is at step {restored.step}, and this run has {steps}: nothing is left to do. Raise --steps."
            )
        return restored

    def _new_state(self, training: Training) -> TrainState:
        learner, initial = training.learner, training.initial
        state = self.parallelism.initialise(learner.make, learner.specs)
        if initial is None:
            return state
        state = with_params(state, learner, initial.load())
        self.progress.line(f"starting from {initial.described}")
        return state

    def keep_best(self, _: int, state: TrainState) -> None:
        """Save the parameters of the best evaluation so far, for `best_params`."""
        params = on_host(ema_or_params(state))
        if self.main:
            self.folder.require_lock()
            write_params(self._best, params)

    def best_params(self) -> Any:
        """Return the parameters last saved by `keep_best`, on the host. All processes must call it."""
        self.folder.share(self._best.name)
        return read_params(self._best)

    @property
    def _best(self) -> Path:
        return self.folder.folder / "best.safetensors"

    def results(self, task: str, fitted: Fitted, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of results.json.

        Args:
            task: name of the task.
            fitted: outcome of the training.
            figures: results of the job itself.
        """
        return {
            "task": task,
            "seed": self.config.seed,
            "steps": fitted.step,
            **figures,
            "seconds_in_steps": fitted.seconds,
            "seconds_compiling": fitted.compiling,
            "devices": devices_in_words(),
            "versions": {name: version(name) for name in ("bestiary", "jax", "flax", "optax")},
        }

    def export(self, name: str, model: Any, params: Any, tokenizer: Any) -> Path:
        """Export a model as a checkpoint folder of the run folder, in process 0. Arguments as for `finish`."""
        exported = self.folder.folder / name
        if self.main:
            self.folder.require_lock()
            save(exported, model, params, tokenizer)
        return exported

    def finish(
        self, model: Any, params: Any, tokenizer: Any, results: Mapping[str, Any], lines: Iterable[str] = ()
    ) -> None:
        """Export the model as a checkpoint folder, write curves.png, results.json and samples.txt, in process 0.

        Args:
            model: a model with a checkpoint format.
            params: its parameters on the host.
            tokenizer: saved along with them.
            results: content of results.json.
            lines: lines to show; they may be slow to compute, since everything else is written before.
        """
        if not self.main:
            return
        exported = self.export("model", model, params, tokenizer)
        self.folder.finish(results)
        shown = []
        for line in lines:
            self.progress.line(line)
            shown.append(line)
        self.folder.write_samples(shown)
        self.progress.line(f"done in {duration(time.perf_counter() - self.started)}; the model is in {exported}")


SHARED = ("parallelism.parallel", "parallelism.mesh", "parallelism.processes")
"""Ends of settings that may change when a run is resumed, but not between its processes."""

_planner: ContextVar[Callable[[RunConfig], AbstractContextManager[Run]] | None] = ContextVar("planner", default=None)


@contextmanager
def planning(start: Callable[[RunConfig], AbstractContextManager[Run]]) -> Iterator[None]:
    """Let `start_run` return another run within, for which nothing is trained: that of `bestiary plan`."""
    token = _planner.set(start)
    try:
        yield
    finally:
        _planner.reset(token)


@contextmanager
def start_run(
    config: RunConfig,
    free: Iterable[str],
    *,
    command: Any = None,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    stop: Stop | None = None,
) -> Iterator[Run]:
    """Start or resume a run: join the other processes, and check the run folder. Nothing is written yet.

    Args:
        config: settings of the run.
        free: names of settings that may change when the run is resumed, such as `loop.keep` for nested ones.
        command: whole configuration of the command, if `config` is only a part of it.
        upgrade: converts the settings in config.json of earlier versions.
        stop: ends the run early; None for signals.

    Raises:
        RunError: the devices or the run folder do not fit.
    """
    planner = _planner.get()
    if planner is not None:
        with planner(config) as run:
            yield run
        return
    with stop or Stop() as stop:  # before JAX's own handler of SIGTERM, by which several processes coordinate
        parallelism = start_parallelism(config.parallelism)
        progress = Progress(shown=jax.process_index() == 0)
        settings = config if command is None else command
        folder = RunFolder(config.out, settings, frozenset(free), upgrade, config.loop.track, progress.line)
        with closing(folder):
            flat = flatten(to_json(settings))
            together = {name: value for name, value in flat.items() if name not in free or name.endswith(SHARED)}
            require_agreement("The settings", together)
            yield Run(config, folder, parallelism, progress, stop)


def devices_in_words() -> str:
    """Describe the devices, such as `8 x NVIDIA H100`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
