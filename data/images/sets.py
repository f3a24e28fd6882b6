"""Sets of labelled images: in memory, or in files that are decoded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..random import RandomStream
from .decode import decode


class ImageSet(Protocol):
    """Images by number, with the number of the class of each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """[n] int32, the class of each image."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells this set from one with other images, labels or order."""
        ...

    def pixels(self, number: int, channels: int | None = 3) -> np.ndarray:
        """Return an image, [height, width, channels] uint8; `channels` as for `decode`."""
        ...

    def name(self, number: int) -> str:
        """Return what an image is called, for messages."""
        ...

    def only(self, numbers: np.ndarray) -> ImageSet:
        """Return the set of some of the images."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory.

    Attributes:
        array: [n, height, width, channels] uint8, with 1 or 3 channels.
        labels: [n] int32.
        classes: names of the classes.
        source: the file, for messages.
    """

    array: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str

    @property
    def fingerprint(self) -> str:
        """See `ImageSet`."""
        digest = hashlib.blake2b(repr((self.array.shape, self.classes)).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.array))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()

    def pixels(self, number: int, channels: int | None = 3) -> np.ndarray:
        """See `ImageSet`."""
        found = self.array[number]
        if channels is None or channels == found.shape[-1]:
            return found
        if channels == 3:
            return np.repeat(found, 3, axis=-1)
        from PIL import Image

        return np.asarray(Image.fromarray(found).convert("L"))[..., None]

    def name(self, number: int) -> str:
        """See `ImageSet`."""
        return f"{self.source}, image {number}"

    def only(self, numbers: np.ndarray) -> ArrayImages:
        """See `ImageSet`."""
        return ArrayImages(self.array[numbers], self.labels[numbers], self.classes, self.source)


@dataclass(frozen=True)
class EncodedImages:
    """Images in files, or in members of an archive.

    Attributes:
        names: name of each, which `read` takes.
        labels: [n] int32.
        classes: names of the classes.
        read: name -> content; called by several threads.
        source: the folder or archive, for messages; empty if the names say it.
    """

    names: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[str], bytes]
    source: str

    @property
    def fingerprint(self) -> str:
        """See `ImageSet`. Of the names and labels: the files are not all read for it."""
        digest = hashlib.blake2b(repr((list(self.names), self.classes)).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()

    def pixels(self, number: int, channels: int | None = 3) -> np.ndarray:
        """See `ImageSet`."""
        return decode(self.read(self.names[number]), self.name(number), channels)

    def name(self, number: int) -> str:
        """See `ImageSet`."""
        return f"{self.source}/{self.names[number]}" if self.source else self.names[number]

    def only(self, numbers: np.ndarray) -> EncodedImages:
        """See `ImageSet`."""
        return EncodedImages(
            [self.names[int(n)] for n in numbers], self.labels[numbers], self.classes, self.read, self.source
        )


def hold_out(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a set at random into (the others, a fraction of each class, at least one image if it has two)."""
    order = RandomStream(seed, len(images.labels)).permutation(len(images.labels))
    held = np.zeros(len(order), bool)
    for label in range(len(images.classes)):
        mine = order[images.labels[order] == label]
        count = max(1, round(fraction * len(mine))) if len(mine) > 1 else 0
        held[mine[:count]] = True
    return images.only(np.flatnonzero(~held)), images.only(np.flatnonzero(held))
