"""Batches of several tasks, one task a batch, drawn by fixed shares.

The task of batch t is a function of the seed and t; batch t is then the next one of its task's own rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import DataError
from ..numbered_batches import NumberedBatches
from ..random import RandomStream
from .examples import Batch, TaskRows

DRAWN = 1024  # tasks that are drawn together
MIXTURE = 3  # purpose of random numbers


class Mixture(NumberedBatches):
    """Iterate over batches endlessly; the state is the number of batches done, as JSON.

    A batch's arrays are called TASK/NAME.

    Args:
        tasks: name -> the rows of a task.
        shares: of each task, numbers above 0 of any sum.
        batch: rows per batch over all hosts.
        seed: random seed.
        index: index of this process's part of the rows.
        count: number of parts.
        threads: number of threads that prepare batches.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskRows],
        shares: Mapping[str, float],
        batch: int,
        *,
        seed: int,
        index: int = 0,
        count: int = 1,
        threads: int = 2,
    ):
        super().__init__(threads)
        self._tasks, self._names, self._batch, self._seed = tasks, list(tasks), batch, seed
        self._index, self._share = index, batch // count
        weights = np.array([shares[name] for name in self._names], np.float64)
        self._bounds = np.cumsum(weights / weights.sum())
        self._before: list[np.ndarray] = [np.zeros(len(self._names), np.int64)]  # batches of each task before a window
        marks = [f"{name} {shares[name]} {rows.examples.fingerprint}" for name, rows in tasks.items()]
        self._of = hashlib.blake2b("\n".join(marks).encode(), digest_size=16).hexdigest()

    def place(self, batch: int) -> tuple[str, int]:
        """Return a batch's task, and its number among the batches of this task."""
        window, within = divmod(batch, DRAWN)
        before = self._before
        while len(before) <= window:  # several threads may each make a longer list, of the same numbers
            counts = np.bincount(self._drawn(len(before) - 1), minlength=len(self._names))
            self._before = before = [*before, before[-1] + counts]
        tasks = self._drawn(window)
        task = int(tasks[within])
        return self._names[task], int(before[window][task] + (tasks[:within] == task).sum())

    def _drawn(self, window: int) -> np.ndarray:
        """Draw the tasks of a window of batches, [DRAWN] int64."""
        uniforms = RandomStream(self._seed, len(self._names), MIXTURE, window).uniforms(DRAWN)
        return np.minimum(np.searchsorted(self._bounds, uniforms, side="right"), len(self._names) - 1)

    def make(self, number: int) -> Batch:
        """Make this process's part of a batch."""
        name, number = self.place(number)
        first = number * self._batch + self._index * self._share
        rows = self._tasks[name].batch(range(first, first + self._share))
        return {f"{name}/{key}": values for key, values in rows.items()}

    def one_of_each(self) -> dict[str, Batch]:
        """Return this process's part of the first batch of each task."""
        numbers = range(self._index * self._share, (self._index + 1) * self._share)
        return {
            name: {f"{name}/{key}": values for key, values in rows.batch(numbers).items()}
            for name, rows in self._tasks.items()
        }

    def get_state(self) -> dict[str, Any]:
        """Return the state for `set_state`."""
        return {"tasks": self._of, "batches": self._done}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            DataError: the state belongs to other data or shares.
        """
        if state.get("tasks") != self._of:
            raise DataError("The saved position belongs to other tasks or data. Start a new run, or put them back.")
        self._continue(state["batches"])


def of_task(batch: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a batch's task, and its arrays by their names within it."""
    (task,) = {name.partition("/")[0] for name in batch}
    return task, {name.partition("/")[2]: values for name, values in batch.items()}
