"""Endless batches that are functions of their number, made in Grain's threads; the position is a count of batches."""

from __future__ import annotations

from collections.abc import Iterator

import grain

from .rows.rows import Batch

LONGEST = 1 << 40  # batches


class NumberedBatches:
    """Iterate over the batches that a subclass makes.

    Args:
        threads: number of threads that prepare batches.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._done = 0
        self._iterator: Iterator[Batch] | None = None

    def make(self, number: int) -> Batch:
        """Make a batch; several threads call this."""
        raise NotImplementedError

    def __next__(self) -> Batch:
        if self._iterator is None:
            numbers = grain.MapDataset.range(self._done, LONGEST).map(self.make)
            options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
            self._iterator = iter(numbers.to_iter_dataset(options))
        batch = next(self._iterator)
        self._done += 1
        return batch

    def _continue(self, done: int) -> None:
        """Continue after that many batches."""
        self._done, self._iterator = done, None
