"""The training loop of all jobs: draw a batch, step, log, evaluate, checkpoint; stop cleanly, resume exactly.

A step is a pure function `(state, batch, replicas) -> (state, sums)`, which may read fixed arrays besides. Its sums are
read on the host one step late, after the next step was dispatched, so that the device does not wait for the host.
"""

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from .checkpoint import Checkpoints
from .config import LoopConfig
from .errors import RunError
from .learner import Learner, TrainState
from .machine.speed import Speed
from .machine.watchdog import Watchdog, wait_for_all
from .metrics import Meter, Sums, finite
from .progress import Progress, duration
from .run_folder import RunFolder
from .sharding import Parallelism, TrainStep

RESTART = 75
"""Exit status of a run that SIGTERM has stopped, and that may be started again: EX_TEMPFAIL of sysexits.h."""


class Stop:
    """Turn SIGTERM and SIGINT into a request to stop after the step in progress; a second SIGINT interrupts at once.

    While `preparing`, when there is no state to save yet, the first signal ends the process at once. With several
    processes only SIGTERM is a request, which all of them receive, and SIGINT interrupts.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.preparing = True
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.preparing and number == signal.SIGTERM:
            raise SystemExit(RESTART)
        if number == signal.SIGINT and (self.preparing or self.signal is not None or jax.process_count() > 1):
            raise KeyboardInterrupt
        self.signal = number

    @property
    def requested(self) -> bool:
        """Whether to abandon long work: never with several processes, which would not stop at the same place."""
        return self.signal is not None and jax.process_count() == 1

    def agreed(self, step: int) -> bool:
        """Tell whether to stop after `step`; with several processes, the answer is the same in all of them."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return self.requested


class Batches(Protocol):
    """An endless iterator over this process's part of the batches, whose state is JSON.

    `set_state` may return a remark for the user.
    """

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> str | None: ...


class Best(NamedTuple):
    """Settings of selecting the best evaluation and of early stopping."""

    metric: str  # of the held-out means; the largest value is the best
    patience: int  # evaluations without improvement until early stopping; 0: no early stopping
    keep: Callable[[int, Any], None]  # (step, state), called at every new best evaluation
    counts_after: int = 0  # evaluations up to this step do not count against the patience, as during the warmup


class InitialWeights(NamedTuple):
    """Parameters that a new run starts from."""

    load: Callable[[], Any]  # returns parameters on the host, a tree like the learner's
    described: str  # their source, for the log


class Training(NamedTuple):
    """The learner, data and evaluation of a run."""

    learner: Learner
    step: Callable[..., tuple[TrainState, Sums]]  # (state, batch, replicas, *fixed) -> (state, sums)
    steps: int  # total number of updates
    batches: Batches
    evaluate: Callable[[TrainState, Stop], dict[str, float] | None]  # held-out means; None if stopped
    shown: tuple[str, ...]  # metrics on the progress line
    counted: Mapping[str, str]  # metrics that are added up over the run (`total_...`) -> name of their rate per second
    evaluate_every: int | None = None  # steps between evaluations; None: as in the run's settings
    initial: InitialWeights | None = None  # None: those of the learner
    best: Best | None = None
    fixed: tuple[Any, ...] = ()  # see `Parallelism.compile_train`


class Fitted(NamedTuple):
    """Outcome of a run's training."""

    state: TrainState
    step: int  # updates done
    totals: dict[str, float]  # counted metrics, including earlier starts of the run
    timed: dict[str, float]  # the part of them from the timed steps
    seconds: float  # time of the timed steps: all but those that compile
    compiling: float  # seconds of compiling, including earlier starts of the run
    best: tuple[int, float] | None  # step and value of the best evaluation, if selected
    stopped: int | None  # the signal that ended the run early

    def rate(self, name: str) -> float | None:
        """Return the rate of a counted metric per second; None before a second step."""
        return self.timed.get(name, 0.0) / self.seconds if self.seconds else None

    @property
    def exit_status(self) -> int:
        """Exit status of the command: 0; after SIGTERM 75, to be started again; 130 after an interrupt."""
        if self.stopped is None:
            return 0
        return RESTART if self.stopped == signal.SIGTERM else 128 + self.stopped


class Session(Protocol):
    """Interface of a run for the loop."""

    @property
    def intervals(self) -> LoopConfig: ...
    @property
    def folder(self) -> RunFolder: ...
    @property
    def parallelism(self) -> Parallelism: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def stop(self) -> Stop: ...


FORMERLY: dict[str, str] = dict.fromkeys(("windows", "questions", "pieces"), "examples")
"""Counted metrics -> their names in checkpoints of earlier versions."""


class _Counters:
    """Add up counted metrics and time: in total, and since the last line of the log."""

    def __init__(self, names: Iterable[str], saved: dict[str, Any]):
        self.totals, self.timed = (
            {name: kept.get(name, kept.get(FORMERLY.get(name, ""), 0.0)) for name in names}
            for kept in (saved.get("totals", {}), saved.get("timed", {}))
        )
        self.seconds: float = saved.get("seconds", 0.0)
        self.compiling: float = saved.get("compiling", 0.0)
        self._clock = time.perf_counter()
        self.new_window()

    def new_window(self) -> None:
        self._window = dict.fromkeys(self.totals, 0.0)
        self._window_seconds, self._window_steps = 0.0, 0
        self._waited = 0.0
        self.saving = 0.0

    def restart_clock(self) -> None:
        """Leave out the time since the last step, spent on logging, evaluating or saving."""
        self._clock = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Add time of waiting for a batch."""
        self._waited += seconds

    def share_waiting(self) -> float:
        """Return the share of the window's time that was spent waiting for batches."""
        return min(1.0, self._waited / self._window_seconds) if self._window_seconds else 0.0

    def add(self, sums: Mapping[str, tuple[Any, Any]], *, timed: bool) -> None:
        """Count a step that has just ended; one that was compiled for is not timed."""
        now = time.perf_counter()
        for name in self.totals:
            seen = float(sums[name][0])
            self.totals[name] += seen
            if timed:
                self.timed[name] += seen
                self._window[name] += seen
        if timed:
            self.seconds += now - self._clock
            self._window_seconds += now - self._clock
            self._window_steps += 1
        else:
            self._waited = 0.0  # the first batch is waited for longest, and belongs to no timed step
        self._clock = now

    def rates(self) -> dict[str, float]:
        """Return the rates of the counted metrics in the window, per second; empty before any timed step."""
        if not self._window_steps:
            return {}
        return {name: seen / self._window_seconds for name, seen in self._window.items()}

    def seconds_per_step(self) -> float | None:
        """Return the mean time per step in the window; None before any timed step."""
        return self._window_seconds / self._window_steps if self._window_steps else None

    def state(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint, as JSON."""
        return {"totals": self.totals, "timed": self.timed, "seconds": self.seconds, "compiling": self.compiling}


class _EarlyStopping:
    """Track the best evaluation, and decide on early stopping."""

    def __init__(self, best: Best | None, saved: dict[str, Any]):
        self._best = best
        self.at: tuple[int, float] | None = tuple(saved["best"]) if saved.get("best") else None
        self._since: int = saved.get("since_best", 0)

    def update(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        """Keep the state if its evaluation is the best one."""
        if self._best is None:
            return
        value = values[self._best.metric]
        if self.at is None or value > self.at[1]:
            self.at, self._since = (step, value), 0
            self._best.keep(step, state)
        elif step > self._best.counts_after:
            self._since += 1

    @property
    def should_stop(self) -> bool:
        """Whether too many consecutive evaluations were no better."""
        return self._best is not None and 0 < self._best.patience <= self._since

    def state(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint, as JSON."""
        return {"best": self.at, "since_best": self._since}


PROFILED_FROM = 10
"""Steps after the start of a run at which --profile begins."""


class _InFlight(NamedTuple):
    """A step whose sums are still to be read."""

    step: int
    sums: Any
    batch: dict[str, np.ndarray]
    shape: Any  # of the batch
    compiled: bool  # whether it had to be compiled first


class Loop:
    """Train from the current step of a run to the last.

    Args:
        session: the run.
        training: learner, data and evaluation.
        checkpoints: checkpoints to write.
        state: initial state.
        start: number of updates already done.
        extra_state: what was saved along with the state, or None; `training.batches` is already restored.
    """

    def __init__(
        self,
        session: Session,
        training: Training,
        checkpoints: Checkpoints,
        *,
        state: TrainState,
        start: int,
        extra_state: dict[str, Any] | None,
    ):
        self._session, self._training, self._checkpoints = session, training, checkpoints
        self._state, self._start = state, start
        saved = extra_state or {"meter": None, "evaluation_due": False}
        self._evaluation_due: bool = saved["evaluation_due"]  # a stop interrupted it: the resumed run does it first
        self._meter = Meter(saved["meter"])
        self._counters = _Counters(training.counted, saved)
        self._early_stopping = _EarlyStopping(training.best, saved)
        self._rank: tuple[int, float] | None = None  # step of the last evaluation, and how good it was
        self._in_flight: _InFlight | None = None
        self._compiled: set[Any] = set()  # shapes of batches
        self._whole: int | None = start  # step whose state and position in the data belong together; None within a step
        self._saved = start
        self._speed = Speed(session.folder.main)
        self._traced_from: int | None = None
        stacks = session.folder.folder
        self._watchdog = Watchdog(session.intervals.hang_after, session.progress.warn, stacks)

    def run(self) -> Fitted:
        """Train.

        Raises:
            RunError: a step's metrics are not finite; the batch was saved.
        """
        self._watchdog.ended(self._start)
        with self._watchdog:
            try:
                return self._run()
            except Exception:
                self._save_in_an_emergency()
                raise
            finally:
                self._end_trace()

    def _save_in_an_emergency(self) -> None:
        """Save the state if it is whole: an evaluation or a log has failed. Of several processes, only one may know."""
        with suppress(Exception):  # the first error is reported; after another one here, nothing is whole
            self._flush_metrics()
        if self._whole is not None and self._whole > self._saved and jax.process_count() == 1:
            self._session.progress.line(f"step {self._whole} is saved before the error is reported")
            self._save(self._whole)
            self._checkpoints.finish()

    def _run(self) -> Fitted:
        training, intervals, stop = self._training, self._session.intervals, self._session.stop
        stop.preparing = False
        if self._evaluation_due and not self._evaluate(self._start):
            return self._fitted(self._start, stop.signal)
        self._evaluation_due = False
        if self._early_stopping.should_stop:
            return self._fitted(self._start, None)
        evaluate_every = intervals.evaluate_every if training.evaluate_every is None else training.evaluate_every
        train = self._session.parallelism.compile_train(training.step, training.learner.specs, *training.fixed)
        for step in range(self._start + 1, training.steps + 1):
            clock = time.perf_counter()
            self._whole = None
            batch = next(training.batches)
            self._counters.waited(time.perf_counter() - clock)
            self._profile(step)
            placed = self._session.parallelism.shard_batch(batch)
            shape = tuple((name, array.shape) for name, array in batch.items())
            compiles = shape not in self._compiled
            if compiles:
                self._speed.compiles(shape, lambda: train.trace(self._state, placed))  # noqa: B023
                self._flush_metrics()  # the step before takes its own time
                self._state, sums = self._compiling(step, batch, train, placed)
                self._compiled.add(shape)
            else:
                self._state, sums = train(self._state, placed)
                self._flush_metrics()
            self._in_flight = _InFlight(step, sums, batch, shape, compiles)
            self._whole = step
            self._watchdog.ended(step)
            last = step == training.steps
            stopping = stop.agreed(step)
            log = last or step % intervals.log_every == 0
            evaluate = last or (evaluate_every > 0 and step % evaluate_every == 0)
            save = last or step % intervals.checkpoint_every == 0 or (evaluate and intervals.keep_best > 0)
            self._evaluation_due = evaluate
            if log or evaluate or save or stopping:
                self._flush_metrics()
            if log:
                self._log(step)
            self._evaluation_due = evaluate and (stopping or not self._evaluate(step))
            ended = self._early_stopping.should_stop
            clock = time.perf_counter()
            if save or stopping or self._evaluation_due or ended:
                self._save(step)
            self._checkpoints.poll()
            self._counters.saving += time.perf_counter() - clock
            if log or evaluate or save:
                self._counters.restart_clock()
            if stopping or self._evaluation_due:
                return self._fitted(step, stop.signal)
            if ended:
                since = self._early_stopping.at[0] if self._early_stopping.at else 0
                self._say(step, f"no improvement since step {since}: early stopping")
                return self._fitted(step, None)
        return self._fitted(training.steps, None)

    def _profile(self, step: int) -> None:
        """Start or end the trace of some steps."""
        first, count = self._start + PROFILED_FROM, self._session.intervals.profile
        if not count or not self._session.folder.main:
            return
        if step == first:
            jax.profiler.start_trace(str(self._session.folder.folder / "profile"))
            self._traced_from = step
        elif self._traced_from is not None and step == min(first + count, self._training.steps):
            self._flush_metrics()
            self._end_trace()
            self._counters.restart_clock()

    def _end_trace(self) -> None:
        """End the trace, if one is running."""
        if self._traced_from is not None:
            first, self._traced_from = self._traced_from, None
            jax.profiler.stop_trace()
            self._session.progress.line(
                f"steps from {first} on are traced in {self._session.folder.folder / 'profile'}"
            )

    def _compiling(self, step: int, batch: Mapping[str, np.ndarray], train: TrainStep, placed: Any) -> Any:
        """Call a step for the first time with this shape, and say how long that took."""
        rows = "x".join(map(str, next(iter(batch.values())).shape))
        left = f"{self._training.steps - step + 1:,} of {self._training.steps:,} steps to do"
        self._session.progress.update(f"compiling the training step for rows of {rows}; {left}", force=True)
        clock = time.perf_counter()
        # Some processes may read the program from a cache while others compile it. The call compiles pmap's: these do
        # not begin together.
        if jax.process_count() > 1 and train.compile(self._state, placed):
            wait_for_all(f"compiled/{step}")
        found = train(self._state, placed)
        seconds = time.perf_counter() - clock
        self._counters.compiling += seconds
        self._session.progress.line(f"compiled the training step for rows of {rows} in {seconds:.1f} s; {left}")
        return found

    def _flush_metrics(self) -> None:
        """Wait for the step in flight, read its sums and count it."""
        if self._in_flight is None:
            return
        step, sums, batch, shape, compiled = self._in_flight
        whole, self._whole = self._whole, None  # a state that is not finite must not be saved
        sums, self._in_flight = jax.device_get(sums), None
        if not finite(sums):
            values = ", ".join(f"{name} {float(total):g}" for name, (total, _) in sums.items())
            path = self._session.folder.save_batch(step, batch)
            raise RunError(
                f"Step {step}: the loss or its gradient is not finite ({values}). The batch was saved as {path}. "
                "The last checkpoint is from before; a lower --learning-rate or a longer --warmup may help."
            )
        self._meter.add(sums)
        self._counters.add(sums, timed=not compiled)
        if not compiled:
            self._speed.ended(shape)
        self._whole = whole

    def _log(self, step: int) -> None:
        """Write and show the means since the last line."""
        training, rates = self._training, self._counters.rates()
        means = {name: value for name, value in self._meter.means().items() if name not in training.counted}
        means |= {"learning_rate": float(np.asarray(training.learner.rate(step - 1)))}
        means |= {f"total_{name}": total for name, total in self._counters.totals.items()}
        speeds = {f"{name}_per_second": rate for name, rate in rates.items()}
        between = self._counters.seconds_per_step()
        if between is not None:
            speeds |= self._speed.of_step(between) | {"share_waiting_for_data": self._counters.share_waiting()}
            speeds["seconds_saving"] = self._counters.saving
        self._session.folder.write_metrics(step, means, speeds)
        parts = [f"step {step}/{training.steps}", *(f"{n} {means[n]:.4g}" for n in training.shown if n in means)]
        parts += [f"{rate:,.0f} {training.counted[name]}" for name, rate in rates.items()]
        seconds = self._counters.seconds_per_step()
        if seconds is not None:
            parts.append(f"{duration((training.steps - step) * seconds)} left")
        done = step / training.steps
        self._session.progress.update("  ".join(parts), done=done, force=step == training.steps)
        self._meter.reset()
        self._counters.new_window()

    def _evaluate(self, step: int) -> bool:
        """Evaluate on held-out data; return False if stopped before the end."""
        values = self._training.evaluate(self._state, self._session.stop)
        self._watchdog.ended(step)
        if values is None:
            return False
        self._session.folder.write_metrics(step, {f"eval/{name}": value for name, value in values.items()})
        best = self._training.best
        rank = values[best.metric] if best is not None else -values["loss"] if "loss" in values else None
        self._rank = None if rank is None else (step, rank)
        self._say(step, "held out: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._early_stopping.update(step, values, self._state)
        return True

    def _save(self, step: int) -> None:
        extra_state = {
            "meter": self._meter.state(),
            **self._counters.state(),
            **self._early_stopping.state(),
            "evaluation_due": self._evaluation_due,
            "batches": self._training.batches.get_state(),
        }
        self._session.folder.before_checkpoint()
        rank = self._rank[1] if self._rank is not None and self._rank[0] == step else None
        self._checkpoints.save(step, self._state, extra_state, rank)
        self._saved = step

    def _say(self, step: int, text: str) -> None:
        self._session.progress.line(f"step {step}/{self._training.steps}  {text}")

    def _fitted(self, step: int, stopped: int | None) -> Fitted:
        self._checkpoints.finish()
        counters = self._counters
        best = self._early_stopping.at
        return Fitted(
            self._state, step, counters.totals, counters.timed, counters.seconds, counters.compiling, best, stopped
        )
