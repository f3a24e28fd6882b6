"""The loop that every task shares: draw a batch, step, log, evaluate, checkpoint; stop cleanly, resume exactly.

A step is a pure function `(state, batch) -> (state, sums)`. Its sums are read on the host one step late, after the next
step was sent off, so that the device does not wait for the host.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np
from jax.experimental import multihost_utils

from .checkpoint import Checkpoints
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


@dataclass
class Fitted:
    """What `fit` returns."""

    state: Any  # the running state
    step: int  # updates done
    tokens: float  # real tokens seen, all starts together
    timed_tokens: float  # those of them that were seen in `seconds`
    seconds: float  # spent in steps, without each start's first, which compiles
    stopped: int | None  # the signal that ended the run early


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
    progress: Progress,
    stop: Stop,
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
        progress: shows lines.
        stop: asked after every step.

    Raises:
        RunError: a step's metrics are not finite; the batch was saved.
    """
    past = beside or {"meter": None, "tokens": 0.0, "timed_tokens": 0.0, "seconds": 0.0, "evaluation_due": False}
    meter, tokens, timed_tokens, seconds = Meter(past["meter"]), past["tokens"], past["timed_tokens"], past["seconds"]
    window_tokens = window_seconds = 0.0
    window_steps = 0
    waiting: tuple[int, Any, dict[str, np.ndarray]] | None = None
    clock = time.perf_counter()
    compiling = True

    def settle() -> None:
        """Bring the last step's sums home, and stop the clock on it."""
        nonlocal waiting, tokens, timed_tokens, seconds, window_tokens, window_seconds, window_steps, clock, compiling
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
        real = float(sums["tokens"][0])
        now = time.perf_counter()
        tokens += real
        if not compiling:
            seconds += now - clock
            timed_tokens += real
            window_seconds += now - clock
            window_tokens += real
            window_steps += 1
        clock, compiling = now, False

    def save(number: int, evaluation_due: bool) -> None:
        beside = {
            "meter": meter.state(),
            "tokens": tokens,
            "timed_tokens": timed_tokens,
            "seconds": seconds,
            "evaluation_due": evaluation_due,
            "batches": batches.get_state(),
        }
        checkpoints.save(number, spread.leave(state), beside)

    def held_out(number: int) -> bool:
        """Evaluate; True if it was stopped half-way."""
        values = evaluate(state, stop)
        if values is not None:
            run.write_metrics(number, {f"eval/{name}": value for name, value in values.items()})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            progress.line(f"step {number}/{steps}  held out: {shown}")
        return values is None

    stop.preparing = False
    if past["evaluation_due"] and held_out(start):
        return Fitted(state, start, tokens, timed_tokens, seconds, stop.signal)
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
            means = {name: value for name, value in meter.means().items() if name != "tokens"}
            means |= {"learning_rate": float(learning_rate(number - 1)), "tokens": tokens}
            line = f"step {number}/{steps}  " + "  ".join(f"{name} {means[name]:.4g}" for name in show)
            speeds = {}
            if window_steps:
                speeds = {"tokens_per_second": window_tokens / window_seconds}
                left = duration((steps - number) * window_seconds / window_steps)
                line += f"  {speeds['tokens_per_second']:,.0f} real tokens/s  {left} left"
            run.write_metrics(number, means, speeds)
            progress.update(line, force=last)
            meter.reset()
            window_tokens, window_seconds, window_steps = 0.0, 0.0, 0
        evaluation_due = evaluation and (stopping or held_out(number))
        if saving or stopping or evaluation_due:
            save(number, evaluation_due)
        checkpoints.poll()
        if log or evaluation or saving:
            clock = time.perf_counter()
        if stopping or evaluation_due:
            checkpoints.finish()
            return Fitted(state, number, tokens, timed_tokens, seconds, stop.signal)
    checkpoints.finish()
    return Fitted(state, steps, tokens, timed_tokens, seconds, None)
