"""What a source of training rows is: rows found by their number, planned window by window from lengths alone.

An epoch is parted into windows. A window's *plan* says which examples stand in which row and where; it is made from
lengths, a pure function of (data, settings, seed, epoch, window), so that no token is read for it. Rows are numbered
through all windows and epochs, and a row's tokens are read when it is asked for.

How many rows a window has is known once it is planned, so finding a row by its number alone means planning all windows
before it. A `Position` spares that: it names a row by its number, epoch and window, and says where these began. It is
the whole state of a stream of rows (stream.py): after a restart, on any number of hosts, one window is planned anew.
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
        row: its number, counted from the first row of epoch 0.
        epoch: the epoch it is in.
        epoch_row: the number of the epoch's first row.
        window: the window it is in, counted within the epoch.
        window_row: the number of the window's first row.
    """

    row: int = 0
    epoch: int = 0
    epoch_row: int = 0
    window: int = 0
    window_row: int = 0


class WindowStatistics(Protocol):
    """What a plan made of its data; those of several windows add up."""

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
    """Rows by their number: what a stream of batches asks of a data set.

    The source itself has no state that changes what it gives: two of the same `fingerprint` give the same rows under
    the same numbers, in every process, and may be asked in any order. The position of a stream belongs to the stream.
    """

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal: equal for two sources with the same rows under the same numbers."""
        ...

    def windows_in_epoch(self, epoch: int) -> int:
        """Number of windows of an epoch."""
        ...

    def rows_in_window(self, epoch: int, window: int) -> int:
        """Number of rows of a window, which is planned for it unless that was done before."""
        ...

    def plan(self, epoch: int, window: int) -> Any:
        """The `Plan` of a window, from lengths alone."""
        ...

    def read_tokens(self, plan: Any, rows: np.ndarray | None = None) -> Any:
        """The tokens of a window, as `assemble` takes them.

        Args:
            plan: of the window.
            rows: [n] the rows that are wanted of it; the tokens of others may be left out. None: all of them.
        """
        ...

    def assemble(self, plan: Any, tokens: Any, rows: np.ndarray, first_row: int) -> Batch:
        """The batch of some rows of a window.

        Args:
            plan: of the window.
            tokens: of the window, see `read_tokens`.
            rows: [B] their numbers within the window.
            first_row: the number within the epoch of the window's first row.

        Returns:
            name -> array [B, ...]. `row_ids` [B, 2] uint32 is among them: (epoch, row within the epoch), which masking
            draws by.
        """
        ...

    def padding(self, rows: int) -> Batch:
        """A batch of rows that hold nothing: `segment_ids` and all weights are 0."""
        ...

    def statistics(self, epoch: int = 0, windows: int | None = None) -> Any:
        """What the plan of an epoch makes of its data: of its first windows, or of all with None."""
        ...


class WindowedRows[P: Plan]:
    """A `RowSource` but for what its rows are: plans are kept and counted here, and rows found by their number.

    A subclass says how many windows an epoch has (`windows_in_epoch`), makes the plan of one (`_make_plan`), reads and
    assembles its rows (`read_tokens`, `assemble`, `padding`), and has a `fingerprint`.
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
        """Number of windows of an epoch."""
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
        """The epoch whose plans this one repeats: itself, unless a subclass says otherwise."""
        return epoch

    def plan(self, epoch: int, window: int) -> P:
        """The rows of one window. The last few plans are kept."""
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
        """What the plan of a window makes of its data. Those of all windows planned so far are kept."""
        found = self._statistics.get((self._planned_epoch(epoch), window))
        return self.plan(epoch, window).statistics if found is None else found

    def rows_in_window(self, epoch: int, window: int) -> int:
        """Number of rows of a window, which is planned for it unless that was done before."""
        return self.window_statistics(epoch, window).rows

    def statistics(self, epoch: int = 0, windows: int | None = None) -> Any:
        """What the plan of an epoch makes of its data: of its first `windows` windows, or of all with None."""
        count = self.windows_in_epoch(epoch)
        first, *others = range(count if windows is None else min(windows, count))
        total = self.window_statistics(epoch, first)
        for window in others:
            total += self.window_statistics(epoch, window)
        return total

    def locate(self, row: int, start: Position | None = None) -> Position:
        """The position of a row, found from that of an earlier one by planning the windows between."""
        at = Position() if start is None or start.row > row else start
        while row >= (end := at.window_row + self.rows_in_window(at.epoch, at.window)):
            at = next_window(self, at, end)
        return replace(at, row=row)

    def row(self, number: int) -> Batch:
        """One row by its number, counted through all epochs; the arrays of a batch without their first axis.

        For looking at single rows: it reads a window for each. A stream of batches is the way to read many.
        """
        at = self.locate(number)
        plan = self.plan(at.epoch, at.window)
        rows = np.array([at.row - at.window_row])
        batch = self.assemble(plan, self.read_tokens(plan, rows), rows, at.window_row - at.epoch_row)
        return {name: values[0] for name, values in batch.items()}


def next_window(source: RowSource, at: Position, row: int) -> Position:
    """The position of the first row, number `row`, of the window after that of `at`; nothing is planned for it."""
    if at.window + 1 < source.windows_in_epoch(at.epoch):
        return replace(at, row=row, window=at.window + 1, window_row=row)
    return Position(row, at.epoch + 1, row, 0, row)
