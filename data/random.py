"""Random numbers for shuffling and planning, the same on every machine and in every version of NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class RandomStream:
    """Random numbers drawn from a key of integers.

    `Generator`'s methods may change between versions of NumPy; a bit generator's raw output, which is all that is used
    here, may not.
    """

    def __init__(self, *key: int):
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def words(self, count: int) -> np.ndarray:
        """Return [count] uint64."""
        return self._bits.random_raw(count)

    def uniforms(self, count: int) -> np.ndarray:
        """Return [count] float64 in [0, 1)."""
        return (self.words(count) >> np.uint64(11)) * 2.0**-53

    def permutation(self, count: int) -> np.ndarray:
        """Return [count] int64."""
        return np.argsort(self.words(count), kind="stable")

    def tuples(self, size: int) -> Iterator[list[float]]:
        """Yield endlessly `size` numbers in [0, 1) at a time."""
        while True:
            yield from self.uniforms(1024 * size).reshape(1024, size).tolist()

    def coins(self, counts: np.ndarray) -> np.ndarray:
        """Draw the number of heads in counts[i] coin tosses, [n] int64; every toss is a bit, so it is exact."""
        result = np.zeros(len(counts), np.int64)
        tossed = np.flatnonzero(counts)
        if tossed.size:
            words_each = -(-counts[tossed] // 64)
            words = self.words(int(words_each.sum()))
            starts = np.cumsum(words_each) - words_each
            spare = (words_each * 64 - counts[tossed]).astype(np.uint64)
            words[starts] >>= spare
            result[tossed] = np.add.reduceat(np.bitwise_count(words), starts, dtype=np.int64)
        return result


class EpochOrders:
    """The order of n things in each epoch of an endless numbering, drawn when it is asked for.

    Args:
        count: number of things.
        key: key of the random numbers, before the epoch's number.
    """

    def __init__(self, count: int, *key: int):
        self.count, self._key = count, key
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, place: int) -> int:
        """Return the thing at a place of the numbering."""
        epoch, within = divmod(place, self.count)
        order = self._orders.get(epoch)
        if order is None:  # two threads may both draw it, which gives the same
            order = self.draw(epoch)
            self._orders = {**{e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}, epoch: order}
        return int(order[within])

    def draw(self, epoch: int) -> np.ndarray:
        """Draw an epoch's order, [count] int64."""
        return RandomStream(*self._key, epoch).permutation(self.count)
