"""Progress reports of long tasks, and numbers of things in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


def counted(number: int, what: str) -> str:
    """Return `1 document`, `2,000 documents`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Report:
    """One report of a long task.

    Attributes:
        task: name of the task.
        done: amount of work done, in `unit`.
        total: total amount of work, in `unit`; None if unknown.
        unit: unit of the amounts.
        seconds: seconds since the task began.
        resumed: part of `done` that an earlier run had finished; it does not count towards the rate.
        detail: additional text to show.
    """

    task: str
    done: float
    total: float | None
    unit: str
    seconds: float
    resumed: float = 0.0
    detail: str = ""

    @property
    def rate(self) -> float:
        """Units per second of this run's own work; 0 before anything is done."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds left at this rate, or None if unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0.0, self.total - self.done) / self.rate

    def __str__(self) -> str:
        of = f" of {self.total:,.1f}" if self.total is not None else ""
        left = f", {self.remaining:,.0f} s left" if self.remaining is not None and self.done < (self.total or 0) else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.task}: {self.done:,.1f}{of} {self.unit}, {self.rate:,.1f} {self.unit}/s{left}{detail}"


ProgressCallback = Callable[[Report], None]


class Reporter:
    """Call `callback` with the progress of one task, at most every `interval` seconds and once at the end."""

    def __init__(self, task: str, unit: str, callback: ProgressCallback | None, interval: float = 1.0):
        self.task, self.unit, self.callback, self.interval = task, unit, callback, interval
        self.start = time.monotonic()
        self.last = self.start

    def __call__(
        self, done: float, total: float | None, *, resumed: float = 0.0, detail: str = "", final: bool = False
    ) -> None:
        now = time.monotonic()
        if self.callback is None or (not final and now - self.last < self.interval):
            return
        self.last = now
        self.callback(Report(self.task, done, total, self.unit, now - self.start, resumed, detail))
