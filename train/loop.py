"""The loop that every task shares: draw a batch, step, log, evaluate, checkpoint; stop cleanly, resume exactly.

A step is a pure function `(state, batch) -> (state, sums)`. Its sums are read on the host one step late, after the next
step was sent off, so that the device does not wait for the host.
"""

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np
from jax.experimental import multihost_utils

from .checkpoint import Checkpoints
from .config import LoopConfig
from .errors import RunError
from .metrics import Meter, finite
from .progress import Progress, duration
from .run_folder import RunFolder
from .sharding import Spread


@flax.struct.dataclass
class TrainState:
    """Everything on the devices that the next step depends on.

    step: [] int32, updates done. params and opt_state: trees of float32. key: [2] uint32, the run's PRNG key data; a
    step draws from it folded with `step`, masking from it folded with each row's numbers.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


class Batches(Protocol):
    """An endless iterator of this process's share of the batches, whose state is JSON."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Best(NamedTuple):
    """What the best evaluation is, what is done at it, and how many without a better one end the run."""

    metric: str
    """Of the held-out means."""
    larger: bool
    """Whether a larger value is the better one."""
    patience: int
    """Evaluations without a better value after which the run ends; 0: it never ends early."""
    keep: Callable[[int, Any], None]
    """(step, running state), called at every evaluation that is better than all before it."""
    counts_after: int = 0
    """Updates whose evaluations do not count against the patience, as while the learning rate rises."""


class Fitted(NamedTuple):
    """What `fit` returns."""

    state: Any  # the running state
    step: int  # updates done
    totals: dict[str, float]  # what was counted, all starts together
    timed: dict[str, float]  # the part of it that was seen in `seconds`
    seconds: float  # spent in steps, without each start's first, which compiles
    best: tuple[int, float] | None  # step and value of the best evaluation, where one was asked for
    stopped: int | None  # the signal that ended the run early

    def rate(self, name: str) -> float | None:
        """What was counted as `name`, a second; None before a second step."""
        return self.timed.get(name, 0.0) / self.seconds if self.seconds else None


class Stop:
    """Turns SIGTERM and SIGINT into a request to stop after the step in progress; a second SIGINT interrupts at once.

    While `preparing`, when there is no state to save yet, the first signal ends the process at once. With several
    processes only SIGTERM is a request, which all of them hear of, and SIGINT interrupts.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.preparing = True
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.preparing and number == signal.SIGTERM:
            raise SystemExit(0)
        if number == signal.SIGINT and (self.preparing or self.signal is not None or jax.process_count() > 1):
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; with several processes, all of them give the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return jax.process_count() == 1 and self.signal is not None


class _Counts:
    """Adds up what a run sees and how long it takes: in all, and since the last line of the log."""

    def __init__(self, names: Iterable[str], past: dict[str, Any]):
        self.totals = dict.fromkeys(names, 0.0) | past.get("totals", {})
        self.timed = dict.fromkeys(names, 0.0) | past.get("timed", {})
        self.seconds: float = past.get("seconds", 0.0)
        self._compiling = True
        self._clock = time.perf_counter()
        self.new_window()

    def new_window(self) -> None:
        self.window = dict.fromkeys(self.totals, 0.0)
        self.window_seconds, self.window_steps = 0.0, 0

    def restart_clock(self) -> None:
        """Leave out what was done since the last step: logging, evaluating, saving."""
        self._clock = time.perf_counter()

    def add(self, sums: Mapping[str, tuple[Any, Any]]) -> None:
        """Count a step that has just ended. The first of a start compiles, and is not timed."""
        now = time.perf_counter()
        for name in self.totals:
            seen = float(sums[name][0])
            self.totals[name] += seen
            if not self._compiling:
                self.timed[name] += seen
                self.window[name] += seen
        if not self._compiling:
            self.seconds += now - self._clock
            self.window_seconds += now - self._clock
            self.window_steps += 1
        self._clock, self._compiling = now, False

    def rates(self) -> dict[str, float]:
        """Of the window, a second; empty before anything was timed."""
        if not self.window_steps:
            return {}
        return {f"{name}_per_second": seen / self.window_seconds for name, seen in self.window.items()}

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint, as JSON."""
        return {"totals": self.totals, "timed": self.timed, "seconds": self.seconds}


class _Judge:
    """Remembers the best evaluation."""

    def __init__(self, best: Best | None, past: dict[str, Any]):
        self._best = best
        self.at: tuple[int, float] | None = tuple(past["best"]) if past.get("best") else None
        self._since: int = past.get("since_best", 0)

    def judge(self, number: int, values: dict[str, float], state: Any) -> None:
        """Keep the state if its evaluation is the best one."""
        if self._best is None:
            return
        value = values[self._best.metric]
        if self.at is None or (value > self.at[1] if self._best.larger else value < self.at[1]):
            self.at, self._since = (number, value), 0
            self._best.keep(number, state)
        elif number > self._best.counts_after:
            self._since += 1

    def given_up(self) -> bool:
        """Whether too many evaluations in turn were no better."""
        return self._best is not None and 0 < self._best.patience <= self._since

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint, as JSON."""
        return {"best": self.at, "since_best": self._since}


def fit(
    *,
    config: LoopConfig,
    steps: int,
    run: RunFolder,
    checkpoints: Checkpoints,
    spread: Spread,
    train: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Batches,
    start: int,
    beside: dict[str, Any] | None,
    evaluate: Callable[[Any, Stop], dict[str, float] | None],
    learning_rate: Callable[[int], Any],
    show: tuple[str, ...],
    counts: dict[str, str],
    progress: Progress,
    stop: Stop,
    best: Best | None = None,
) -> Fitted:
    """Train from step `start` to `steps`.

    Args:
        config: intervals.
        steps: total number of updates.
        run: where metrics go.
        checkpoints: where the state goes.
        spread: how arrays come and go.
        train: compiled step on the running state.
        state: running state at `start`.
        batches: iterator, already at `start`.
        start: updates that were already done.
        beside: what was saved beside the state at `start`, or None.
        evaluate: running state -> held-out means, or None if it was stopped half-way; a resumed run then does it first.
        learning_rate: step -> rate, for the log.
        show: the metrics on the progress line.
        counts: metrics that are counted over the run, and what a second's worth of each is called.
        progress: shows lines.
        stop: asked after every step.
        best: which evaluation is kept, and whether the run ends when none is better.

    Raises:
        RunError: a step's metrics are not finite; the batch was saved.
    """
    past = beside or {"meter": None, "evaluation_due": False}
    meter, counted, judge = Meter(past["meter"]), _Counts(counts, past), _Judge(best, past)
    waiting: tuple[int, Any, dict[str, np.ndarray]] | None = None

    def settle() -> None:
        """Bring the last step's sums home, and stop the clock on it."""
        nonlocal waiting
        if waiting is None:
            return
        number, sums, batch = waiting
        sums, waiting = spread.fetch(sums), None
        if not finite(sums):
            values = ", ".join(f"{name} {float(total):g}" for name, (total, _) in sums.items())
            path = run.save_batch(number, batch)
            raise RunError(
                f"Step {number}: the loss or its gradient is not finite ({values}). The batch was saved as {path}. "
                "The last checkpoint is from before; a lower --learning-rate or a longer --warmup may help."
            )
        meter.add(sums)
        counted.add(sums)

    def save(number: int, evaluation_due: bool) -> None:
        beside = {
            "meter": meter.state(),
            **counted.state(),
            **judge.state(),
            "evaluation_due": evaluation_due,
            "batches": batches.get_state(),
        }
        checkpoints.save(number, spread.leave(state), beside)

    def held_out(number: int) -> bool:
        """Evaluate; True if it was stopped half-way."""
        values = evaluate(state, stop)
        if values is None:
            return True
        run.write_metrics(number, {f"eval/{name}": value for name, value in values.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        progress.line(f"step {number}/{steps}  held out: {shown}")
        judge.judge(number, values, state)
        return False

    def fitted(number: int, stopped: int | None) -> Fitted:
        return Fitted(state, number, counted.totals, counted.timed, counted.seconds, judge.at, stopped)

    stop.preparing = False
    if past["evaluation_due"] and held_out(start):
        return fitted(start, stop.signal)
    if judge.given_up():
        return fitted(start, None)
    if start < steps:
        progress.update(f"compiling the training step; {steps - start} of {steps} steps to do", force=True)
    for number in range(start + 1, steps + 1):
        batch = next(batches)
        state, sums = train(state, spread.put(batch))
        settle()
        waiting = (number, sums, batch)
        last = number == steps
        stopping = stop.agreed(number)
        log = last or number % config.log_every == 0
        evaluation = last or (config.evaluate_every > 0 and number % config.evaluate_every == 0)
        saving = last or number % config.checkpoint_every == 0
        if log or evaluation or saving or stopping:
            settle()
        if log:
            means = {name: value for name, value in meter.means().items() if name not in counts}
            means |= {"learning_rate": float(learning_rate(number - 1)), **counted.totals}
            line = f"step {number}/{steps}  " + "  ".join(f"{name} {means[name]:.4g}" for name in show)
            rates = counted.rates()
            if rates:
                line += "".join(f"  {rates[f'{name}_per_second']:,.0f} {called}" for name, called in counts.items())
                line += f"  {duration((steps - number) * counted.window_seconds / counted.window_steps)} left"
            run.write_metrics(number, means, rates)
            progress.update(line, force=last)
            meter.reset()
            counted.new_window()
        evaluation_due = evaluation and (stopping or held_out(number))
        given_up = judge.given_up()
        if saving or stopping or evaluation_due or given_up:
            save(number, evaluation_due)
        checkpoints.poll()
        if log or evaluation or saving:
            counted.restart_clock()
        if stopping or evaluation_due:
            checkpoints.finish()
            return fitted(number, stop.signal)
        if given_up:
            since = judge.at[0] if judge.at else 0
            progress.line(f"step {number}/{steps}  no better evaluation since step {since}: ended early")
            checkpoints.finish()
            return fitted(number, None)
    checkpoints.finish()
    return fitted(steps, None)
