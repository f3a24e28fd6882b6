"""Labelled examples of one task, each with an image, a text or both, and their batches by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..images.augment import Augmentation
from ..images.processor import Processor
from ..images.sets import ImageSet
from ..random import EpochOrders, RandomStream

Batch = dict[str, np.ndarray]
ORDER, ROW = 1, 2  # purposes of random numbers
MULTIPLE = 16  # tokens: of which the length of a batch's rows is a multiple, or it is the longest that there may be
WINDOW = 16  # batches whose examples are sorted by length


class Pictures(NamedTuple):
    """The images of examples."""

    images: ImageSet
    of: np.ndarray  # [n] int64, number of each example's image, -1 for none


class Texts(NamedTuple):
    """The texts of examples as tokens, special tokens included; an example without a text has none."""

    ids: Sequence[np.ndarray]  # int32 [length] each
    types: Sequence[np.ndarray]
    pad_id: int
    longest: int | None = None  # maximum length of a row, padding included; None: any


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        labels: [n] int32.
        classes: names of the classes.
        pictures: the images, or None.
        texts: the texts, or None.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    pictures: Pictures | None = None
    texts: Texts | None = None

    @property
    def count(self) -> int:
        """Number of examples, n."""
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, [n] int64; zeros without texts."""
        if self.texts is None:
            return np.zeros(self.count, np.int64)
        return np.array([len(ids) for ids in self.texts.ids], np.int64)

    @property
    def fingerprint(self) -> str:
        """What tells these examples from others."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.labels))
        if self.pictures is not None:
            digest.update(self.pictures.images.fingerprint.encode())
            digest.update(np.ascontiguousarray(self.pictures.of))
        if self.texts is not None:
            digest.update(np.ascontiguousarray(self.lengths))
            for ids in self.texts.ids:
                digest.update(np.ascontiguousarray(ids))
        return digest.hexdigest()

    def only(self, numbers: np.ndarray) -> Examples:
        """Return some of the examples."""
        pictures, texts = self.pictures, self.texts
        return replace(
            self,
            labels=self.labels[numbers],
            pictures=None if pictures is None else pictures._replace(of=pictures.of[numbers]),
            texts=None
            if texts is None
            else texts._replace(ids=[texts.ids[n] for n in numbers], types=[texts.types[n] for n in numbers]),
        )

    def batch(
        self,
        numbers: Sequence[int],
        processor: Processor | None,
        augmentation: Augmentation | None = None,
        streams: Sequence[RandomStream] = (),
    ) -> Batch:
        """Assemble examples.

        Args:
            numbers: of the examples, B of them.
            processor: preprocessing of the images, if there are any; its output has one size.
            augmentation: what is done to images at random, if anything.
            streams: the rows' random numbers, for the augmentation.

        Returns:
            labels [B] int32. Of images: pixel_values [B, H, W, C] float32, zeros for none, and has_image [B] int32. Of
            texts: input_ids, segment_ids (1 for tokens, 0 for padding) and token_type_ids [B, L] int32.
        """
        batch: Batch = {"labels": self.labels[np.asarray(numbers)]}
        if self.pictures is not None:
            assert processor is not None
            batch |= self._pixels(self.pictures, numbers, processor, augmentation, streams)
        if self.texts is not None:
            ids, types = ([of[n] for n in numbers] for of in (self.texts.ids, self.texts.types))
            length = max(1, -(-max(map(len, ids)) // MULTIPLE)) * MULTIPLE
            length = length if self.texts.longest is None else min(length, self.texts.longest)
            batch["input_ids"] = np.full((len(ids), length), self.texts.pad_id, np.int32)
            batch["segment_ids"], batch["token_type_ids"] = (np.zeros((len(ids), length), np.int32) for _ in range(2))
            for row, (own, own_types) in enumerate(zip(ids, types, strict=True)):
                batch["input_ids"][row, : len(own)] = own
                batch["segment_ids"][row, : len(own)] = 1
                batch["token_type_ids"][row, : len(own)] = own_types
        return batch

    def _pixels(
        self,
        pictures: Pictures,
        numbers: Sequence[int],
        processor: Processor,
        augmentation: Augmentation | None,
        streams: Sequence[RandomStream],
    ) -> Batch:
        assert processor.output is not None
        pixels = np.zeros((len(numbers), *processor.output, processor.channels), np.uint8)
        of = pictures.of[np.asarray(numbers)]
        for row in np.flatnonzero(of >= 0).tolist():
            image = pictures.images.pixels(int(of[row]), processor.channels)
            pixels[row] = processor.fit(image) if augmentation is None else augmentation(image, streams[row], processor)
        values = processor.normalise(pixels)
        values[of < 0] = 0.0
        return {"pixel_values": values, "has_image": (of >= 0).astype(np.int32)}


class TaskRows:
    """The numbered rows of a task's training: every n rows are an epoch over its n examples, in an order of its own.

    Examples of similar length are neighbours, so that batches have little padding: within a window of batches they are
    sorted by length, and then the batches are shuffled. Windows begin where batches do, which within an epoch differs
    from epoch to epoch unless the batch divides n.

    Args:
        examples: the examples.
        processor: preprocessing of the images, if there are any.
        augmentation: what is done to images at random.
        batch: rows per batch.
        seed: random seed.
        task: number of the task, which tells its random numbers from other tasks'.
    """

    def __init__(
        self,
        examples: Examples,
        processor: Processor | None,
        augmentation: Augmentation,
        *,
        batch: int,
        seed: int,
        task: int,
    ):
        self.examples, self._processor, self._augmentation = examples, processor, augmentation
        self._key = seed, task
        self._orders = _ByLength(examples.lengths, batch, *self._key)

    def batch(self, rows: range) -> Batch:
        """Assemble rows: see `Examples.batch`, and rows [B] uint32, their numbers."""
        streams = [RandomStream(*self._key, ROW, row) for row in rows]
        numbers = [self._orders[row] for row in rows]
        batch = self.examples.batch(numbers, self._processor, self._augmentation, streams)
        return batch | {"rows": np.array([row % (1 << 32) for row in rows], np.uint32)}


class _ByLength(EpochOrders):
    def __init__(self, lengths: np.ndarray, batch: int, *key: int):
        super().__init__(len(lengths), *key, ORDER)
        self._lengths, self._batch = lengths, batch

    def draw(self, epoch: int) -> np.ndarray:
        order = super().draw(epoch)
        if not self._lengths.any():
            return order
        size, random = WINDOW * self._batch, RandomStream(*self._key, epoch, 1)
        for first in range(-epoch * self.count % self._batch, self.count, size):
            part = order[first : first + size]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            whole = len(part) // self._batch * self._batch
            batches = part[:whole].reshape(-1, self._batch)
            shuffled = batches[random.permutation(len(batches))].reshape(-1)
            order[first : first + size] = np.concatenate([shuffled, part[whole:]])
        return order


def evaluation_batches(
    examples: Examples, processor: Processor | None, size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield all examples once, in batches of one size and few lengths.

    Yields:
        (numbers of the examples, the batch, whose rows beyond these repeat the last of them)
    """
    order = np.argsort(examples.lengths, kind="stable")
    for first in range(0, examples.count, size):
        numbers = order[first : first + size]
        filled = np.concatenate([numbers, np.repeat(numbers[-1:], size - len(numbers))])
        yield numbers, examples.batch(filled.tolist(), processor)
