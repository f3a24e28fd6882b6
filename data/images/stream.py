"""Batches of images by number: reading, augmentation and preprocessing in Grain's threads, and exact resuming.

Batch t of B rows has rows t·B up to (t+1)·B of an endless numbering, in which every n rows are an epoch over the n
images in an order of its own. A row depends only on the seed and its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import DataError
from ..numbered_batches import NumberedBatches
from ..random import EpochOrders, RandomStream
from .augment import Augmentation, mixing_share
from .processor import Processor
from .sets import ImageSet

Batch = dict[str, np.ndarray]
ORDER, ROW = 1, 2  # purposes of random numbers


class Rows:
    """The numbered rows of training.

    Args:
        images: the images.
        processor: preprocessing; its output must have one size.
        augmentation: what is done at random.
        seed: random seed.

    Raises:
        DataError: preprocessing gives images of several sizes.
    """

    def __init__(self, images: ImageSet, processor: Processor, augmentation: Augmentation, seed: int):
        if processor.output is None:
            raise DataError("The preprocessing gives images of several sizes; expected one size for training.")
        self.images, self.processor, self.augmentation, self.seed = images, processor, augmentation, seed
        self._orders = EpochOrders(len(images.labels), seed, ORDER)

    def image_of(self, row: int) -> int:
        """Return the number of a row's image."""
        return self._orders[row]

    def batch(self, rows: range) -> Batch:
        """Assemble rows.

        Returns:
            pixel_values [B, H, W, C] float32, labels [B] int32 and rows [B] uint32, their numbers. With mixup also
            other_labels [B] int32, and shares [B] float32, the share of the first label.
        """
        numbers = [self.image_of(row) for row in rows]
        streams = [RandomStream(self.seed, ROW, row) for row in rows]
        batch: Batch = {
            "pixel_values": self._pixels(numbers, streams),
            "labels": self.images.labels[numbers],
            "rows": np.array([row % (1 << 32) for row in rows], np.uint32),
        }
        if self.augmentation.mixup:
            count = len(self.images.labels)
            shares = np.array([mixing_share(stream, self.augmentation.mixup) for stream in streams], np.float32)
            others = [int(stream.uniforms(1)[0] * count) for stream in streams]
            share = shares[:, None, None, None]
            mixed = self._pixels(others, streams)
            batch["pixel_values"] = share * batch["pixel_values"] + (1 - share) * mixed
            batch |= {"other_labels": self.images.labels[others], "shares": shares}
        return batch

    def _pixels(self, numbers: list[int], streams: list[RandomStream]) -> np.ndarray:
        processor = self.processor
        found = [
            self.augmentation(self.images.pixels(number, processor.channels), stream, processor)
            for number, stream in zip(numbers, streams, strict=True)
        ]
        return processor.normalise(np.stack(found))


class TrainingBatches(NumberedBatches):
    """Iterate over batches endlessly; the state is the number of rows done, as JSON.

    Args:
        rows: the rows.
        batch: rows per batch, B, over all hosts.
        index: index of this process's part of the rows.
        count: number of parts.
        threads: number of threads that prepare batches.
    """

    def __init__(self, rows: Rows, batch: int, *, index: int = 0, count: int = 1, threads: int = 2):
        super().__init__(threads)
        self._rows, self._batch = rows, batch
        self._images = rows.images.fingerprint
        self._index, self._share = index, batch // count

    def make(self, number: int) -> Batch:
        """Make this process's part of a batch."""
        first = number * self._batch + self._index * self._share
        return self._rows.batch(range(first, first + self._share))

    def get_state(self) -> dict[str, Any]:
        """Return the state for `set_state`."""
        return {"images": self._images, "rows": self._done * self._batch}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            DataError: the state belongs to other images, or to batches of a size that does not divide its rows.
        """
        if state.get("images") != self._images:
            raise DataError("The saved position belongs to other images. Start a new run, or put the data back.")
        if state["rows"] % self._batch:
            raise DataError(f"The saved position, row {state['rows']:,}, is inside a batch of {self._batch}.")
        self._continue(state["rows"] // self._batch)


def evaluation_batches(images: ImageSet, processor: Processor, batch: int) -> Iterator[Batch]:
    """Yield all images once, in order and without augmentation, in batches of one size.

    Yields:
        pixel_values [B, H, W, C] float32, labels [B] int32 and weights [B] float32, which are 0 for rows that only fill
        the last batch.
    """
    count = len(images.labels)
    for first in range(0, count, batch):
        numbers = np.arange(first, first + batch)
        weights = (numbers < count).astype(np.float32)
        numbers = np.minimum(numbers, count - 1)
        fitted = [processor.fit(images.pixels(number, processor.channels)) for number in numbers.tolist()]
        pixels = processor.normalise(np.stack(fitted))
        yield {"pixel_values": pixels, "labels": images.labels[numbers], "weights": weights}
