"""The stream of batches: Grain's iterator interface, prefetching and checkpoints for rows addressed by number.

Batch t of B rows consists of rows t*B up to (t+1)*B of the data set's numbering, across windows and epochs, and host h
of H takes the h-th of H equal parts. A batch therefore does not depend on the number of hosts, and the iterator's
state, a row's position, is the same on all of them: a run can continue with another number of hosts or another batch
size.

Shuffling is part of the plan (rows/rows.py), so there is none here. Rows are not batched here either: they are
assembled a whole batch at a time, which is much faster.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import grain
import grain.experimental
import numpy as np

from .errors import DataError
from .rows.rows import Batch, Position, RowSource, next_window


def training_batches(
    dataset: RowSource,
    *,
    batch_rows: int,
    host_index: int = 0,
    host_count: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator[Batch]:
    """Iterate over batches endlessly, epoch after epoch.

    Args:
        dataset: the rows.
        batch_rows: B, over all hosts; `host_count` must divide it. A batch has B / host_count rows on this host.
        host_index: index of this host.
        host_count: number of hosts.
        prefetch: number of batches that a thread prepares ahead; 0 for none.

    Returns:
        An iterator with `get_state()` and `set_state(state)`. The state is a small dictionary of numbers and a
        string, suitable for JSON, and the same on every host; `set_state` raises `DataError` for the state of a data
        set with other rows.
    """
    return iter(_pipeline(dataset, batch_rows, host_index, host_count, prefetch, None, None))


def evaluation_batches(
    dataset: RowSource,
    *,
    batch_rows: int,
    host_index: int = 0,
    host_count: int = 1,
    prefetch: int = 4,
    rows: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterate once over the rows of epoch 0, or the first `rows` of them; always the same ones.

    Every batch has the same shape: the last one is filled up with padding rows, whose `segment_ids` and weights are 0.
    """
    return iter(_pipeline(dataset, batch_rows, host_index, host_count, prefetch, 1, rows))


def _pipeline(
    dataset: RowSource,
    batch_rows: int,
    host_index: int,
    host_count: int,
    prefetch: int,
    epochs: int | None,
    rows: int | None,
) -> grain.IterDataset[Batch]:
    if batch_rows < 1 or batch_rows % host_count:
        raise DataError(f"A batch of {batch_rows} rows does not divide among {host_count} hosts.")
    if not 0 <= host_index < host_count:
        raise DataError(f"Host {host_index} of {host_count}: expected a number from 0 to {host_count - 1}.")
    stream = _Batches(dataset, batch_rows, host_index, host_count, epochs, rows)
    return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=prefetch)


class _Batches(grain.IterDataset[Batch]):
    def __init__(
        self,
        dataset: RowSource,
        batch_rows: int,
        host_index: int,
        host_count: int,
        epochs: int | None,
        rows: int | None,
    ):
        super().__init__()
        self.dataset, self.batch_rows, self.epochs, self.rows = dataset, batch_rows, epochs, rows
        share = batch_rows // host_count
        self.share = range(host_index * share, (host_index + 1) * share)

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator[Batch]):
    """`_at` is the position of the next batch's first row; `_plan` and `_tokens` belong to the window last read."""

    def __init__(self, of: _Batches):
        super().__init__()
        self._of = of
        self._at = Position()
        self._plan: Any | None = None
        self._tokens: Any = None

    def __next__(self) -> Batch:
        data, size, share = self._of.dataset, self._of.batch_rows, self._of.share
        parts: list[Batch] = []
        at, filled = self._at, 0
        while filled < size and not self._over(at):
            rows_here = data.rows_in_window(at.epoch, at.window)
            offset = at.row - at.window_row
            count = min(size - filled, rows_here - offset, self._left(at))
            mine = range(max(share.start, filled), min(share.stop, filled + count))
            if mine:
                plan, tokens = self._window(at)
                rows = np.arange(offset + mine.start - filled, offset + mine.stop - filled)
                parts.append(data.assemble(plan, tokens, rows, at.window_row - at.epoch_row))
            filled += count
            at = self._advanced(at, count)
        if not filled:
            raise StopIteration
        self._at = at
        missing = len(share) - sum(len(part["row_ids"]) for part in parts)
        if missing:
            parts.append(data.padding(missing))
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {"rows_of": self._of.dataset.fingerprint, **asdict(self._at)}

    def set_state(self, state: dict[str, Any]) -> None:
        rows_of, position = state.get("rows_of"), {name: state.get(name) for name in asdict(Position())}
        if rows_of != self._of.dataset.fingerprint or None in position.values():
            raise DataError(
                "The saved position belongs to other data: the corpus, the tokenizer, the seed, the sequence length or "
                "the way of packing has changed. Start a new run, or put them back."
            )
        self._at = Position(**{name: int(value) for name, value in position.items() if value is not None})
        self._plan = self._tokens = None

    def _over(self, at: Position) -> bool:
        return (self._of.epochs is not None and at.epoch >= self._of.epochs) or self._left(at) <= 0

    def _left(self, at: Position) -> int:
        return self._of.batch_rows if self._of.rows is None else self._of.rows - at.row

    def _advanced(self, at: Position, count: int) -> Position:
        """Move `count` rows on, at most to the window's end, which is the start of the next, not planned yet."""
        data, row = self._of.dataset, at.row + count
        if row < at.window_row + data.rows_in_window(at.epoch, at.window):
            return replace(at, row=row)
        return next_window(data, at, row)

    def _window(self, at: Position) -> tuple[Any, Any]:
        data = self._of.dataset
        plan = data.plan(at.epoch, at.window)
        tokens = self._tokens
        if tokens is None or self._plan is not plan:
            tokens = data.read_tokens(plan, self._rows_here(at, plan))
            self._plan, self._tokens = plan, tokens
        return plan, tokens

    def _rows_here(self, at: Position, plan: Any) -> np.ndarray | None:
        """Return this host's rows of a window, from the position on; None for all."""
        if len(self._of.share) == self._of.batch_rows:
            return None
        rows = np.arange(plan.rows)
        place = (rows + at.window_row - self._at.row) % self._of.batch_rows
        mine = rows[(place >= self._of.share.start) & (place < self._of.share.stop)]
        return mine[mine >= at.row - at.window_row]
