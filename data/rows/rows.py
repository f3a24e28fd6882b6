"""The interface of sources of training rows: addressed by number, planned window by window from lengths alone.

An epoch is divided into windows. A window's *plan* assigns examples to rows and positions; it is a pure function of
(lengths, settings, seed, epoch, window), so that planning reads no tokens. Rows are numbered across all windows and
epochs, and a row's tokens are read when it is requested.

The number of rows of a window is known only once it is planned, so that finding a row by its number alone means
planning all windows before it. A `Position` avoids that: it stores a row's number, epoch and window, and where these
began. It is the whole state of a stream of rows (stream.py): after a restart, on any number of hosts, only one window
is planned again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]

_PLANS_KEPT = 2


@dataclass(frozen=True)
class Position:
    """Position of a row. All fields follow from `row`; they are stored to avoid planning the windows before it again.

    Attributes:
        row: number of the row, counted from the first row of epoch 0.
        epoch: epoch of the row.
        epoch_row: number of the epoch's first row.
        window: window of the row, counted within the epoch.
        window_row: number of the window's first row.
    """

    row: int = 0
    epoch: int = 0
    epoch_row: int = 0
    window: int = 0
    window_row: int = 0


class WindowStatistics(Protocol):
    """Statistics of a plan; those of several windows add up."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    def __add__(self, other: Any, /) -> Any: ...


class Plan(Protocol):
    """The rows of one window."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def statistics(self) -> Any:
        """A `WindowStatistics`."""
        ...


class RowSource(Protocol):
    """Rows by number: the interface that a stream of batches needs of a data set.

    A source has no state that affects its results: two sources with the same `fingerprint` have the same rows under the
    same numbers, in every process and in any order of access. The position of a stream belongs to the stream.
    """

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two sources with the same rows under the same numbers."""
        ...

    def windows_in_epoch(self, epoch: int) -> int:
        """Return the number of windows of an epoch."""
        ...

    def rows_in_window(self, epoch: int, window: int) -> int:
        """Return the number of rows of a window, after planning it if needed."""
        ...

    def plan(self, epoch: int, window: int) -> Any:
        """Make the `Plan` of a window, from lengths alone."""
        ...

    def read_tokens(self, plan: Any, rows: np.ndarray | None = None) -> Any:
        """Read the tokens of a window, for `assemble`.

        Args:
            plan: plan of the window.
            rows: [n] the rows to read; the tokens of others may be left out. None: all of them.
        """
        ...

    def assemble(self, plan: Any, tokens: Any, rows: np.ndarray, first_row: int) -> Batch:
        """Assemble a batch of some rows of a window.

        Args:
            plan: plan of the window.
            tokens: tokens of the window, see `read_tokens`.
            rows: [B] numbers of the rows within the window.
            first_row: number of the window's first row within the epoch.

        Returns:
            name -> array [B, ...]. It includes `row_ids` [B, 2] uint32: (epoch, row within the epoch), which seeds
            masking.
        """
        ...

    def padding(self, rows: int) -> Batch:
        """Return a batch of empty rows: `segment_ids` and all weights are 0."""
        ...

    def statistics(self, epoch: int = 0, windows: int | None = None) -> Any:
        """Return the statistics of an epoch's plan: of its first `windows` windows, or of all with None."""
        ...


class WindowedRows[P: Plan]:
    """Base of row sources: caches plans, adds up their statistics, and finds rows by their number.

    A subclass defines the number of windows of an epoch (`windows_in_epoch`), makes the plan of a window
    (`_make_plan`), reads and assembles its rows (`read_tokens`, `assemble`, `padding`), and has a `fingerprint`.
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[int, int], P] = OrderedDict()
        self._statistics: dict[tuple[int, int], Any] = {}
        self._lock = threading.RLock()  # a prefetching thread plans too

    @cached_property
    def fingerprint(self) -> str:
        """See `RowSource.fingerprint`."""
        raise NotImplementedError

    def windows_in_epoch(self, epoch: int) -> int:
        """Return the number of windows of an epoch."""
        raise NotImplementedError

    def read_tokens(self, plan: P, rows: np.ndarray | None = None) -> Any:
        """See `RowSource.read_tokens`."""
        raise NotImplementedError

    def assemble(self, plan: P, tokens: Any, rows: np.ndarray, first_row: int) -> Batch:
        """See `RowSource.assemble`."""
        raise NotImplementedError

    def padding(self, rows: int) -> Batch:
        """See `RowSource.padding`."""
        raise NotImplementedError

    def _make_plan(self, epoch: int, window: int) -> P:
        raise NotImplementedError

    def _planned_epoch(self, epoch: int) -> int:
        """Return the epoch whose plans this one repeats: itself, unless a subclass overrides this."""
        return epoch

    def plan(self, epoch: int, window: int) -> P:
        """Plan the rows of one window. The last few plans are cached."""
        key = (self._planned_epoch(epoch), window)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
            else:
                self._plans[key] = self._make_plan(*key)
                self._statistics[key] = self._plans[key].statistics
                while len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return self._plans[key]

    def window_statistics(self, epoch: int, window: int) -> Any:
        """Return the statistics of a window's plan. Those of all windows planned so far are cached."""
        found = self._statistics.get((self._planned_epoch(epoch), window))
        return self.plan(epoch, window).statistics if found is None else found

    def rows_in_window(self, epoch: int, window: int) -> int:
        """Return the number of rows of a window, after planning it if needed."""
        return self.window_statistics(epoch, window).rows

    def statistics(self, epoch: int = 0, windows: int | None = None) -> Any:
        """Return the statistics of an epoch's plan: of its first `windows` windows, or of all with None."""
        count = self.windows_in_epoch(epoch)
        first, *others = range(count if windows is None else min(windows, count))
        total = self.window_statistics(epoch, first)
        for window in others:
            total += self.window_statistics(epoch, window)
        return total

    def locate(self, row: int, start: Position | None = None) -> Position:
        """Find the position of a row, starting from that of an earlier one and planning the windows in between."""
        at = Position() if start is None or start.row > row else start
        while row >= (end := at.window_row + self.rows_in_window(at.epoch, at.window)):
            at = next_window(self, at, end)
        return replace(at, row=row)

    def row(self, number: int) -> Batch:
        """Return one row by its number, counted across all epochs: the arrays of a batch without their first axis.

        It is for looking at single rows, since it reads a window for each. To read many, use a stream of batches.
        """
        at = self.locate(number)
        plan = self.plan(at.epoch, at.window)
        rows = np.array([at.row - at.window_row])
        batch = self.assemble(plan, self.read_tokens(plan, rows), rows, at.window_row - at.epoch_row)
        return {name: values[0] for name, values in batch.items()}


def next_window(source: RowSource, at: Position, row: int) -> Position:
    """Return the position of row `row`, the first of the window after that of `at`, without planning it."""
    if at.window + 1 < source.windows_in_epoch(at.epoch):
        return replace(at, row=row, window=at.window + 1, window_row=row)
    return Position(row, at.epoch + 1, row, 0, row)
