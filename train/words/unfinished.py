"""What a stopped run of `bestiary words train` goes on from: one file beside its vectors, until these are there.

Everything random is a function of the seed and of the number of the batches done, so that the tables and the place in
the text are all there is to keep.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...data.files import replacing
from ...models.words.word2vec import Tables
from ..errors import RunError
from .config import WordsConfig

EVERY = 60.0
"""Seconds between two saves, or twenty times what a save takes, if that is more."""


class Place(NamedTuple):
    """A place in the training, between two groups of batches."""

    epoch: int = 0
    groups: int = 0  # done of this epoch
    number: int = 0  # done of all epochs
    words: int = 0  # read in all epochs
    losses: float = 0.0  # their sum in this epoch
    pairs: float = 0.0  # the number of pairs in this epoch


class Unfinished:
    """The file.

    Args:
        config: settings of the run.
        words: the words of the text.
        ids: [T] int32, the text.
        sentences: [T] int32, number of each word's sentence.
    """

    def __init__(self, config: WordsConfig, words: Sequence[str], ids: np.ndarray, sentences: np.ndarray):
        self.path = config.out.with_name(f"{config.out.name}.unfinished.npz")
        settings = {name: value for name, value in asdict(config).items() if name not in ("out", "corpus")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        digest.update("\n".join(words).encode())
        for array in (ids, sentences):
            digest.update(np.ascontiguousarray(array).data)
        self._fingerprint = digest.hexdigest()
        self._next = time.monotonic() + EVERY

    def read(self) -> tuple[Tables, Place] | None:
        """Return the tables and the place of a run that was stopped; None if there is none.

        Raises:
            RunError: the file is of other settings or another text, or damaged.
        """
        if not self.path.is_file():
            return None
        try:
            with self.path.open("rb") as handle, np.load(handle) as stored:
                found = str(stored["fingerprint"])
                tables = Tables(jnp.asarray(stored["inputs"]), jnp.asarray(stored["outputs"]))
                place = Place(*stored["counts"].tolist(), *stored["sums"].tolist())
        except Exception as error:  # of a zip archive, its arrays and their headers
            raise RunError(f"{self.path}: damaged ({error}). Remove it to start anew.") from None
        if found != self._fingerprint:
            raise RunError(
                f"{self.path}: of a run with other settings or another text, which was stopped. Give the same again "
                "to resume it, remove the file to start anew, or choose another --out."
            )
        return tables, place

    def due(self) -> bool:
        """Tell whether it is time to save."""
        return time.monotonic() >= self._next

    def save(self, tables: Tables, place: Place) -> None:
        """Write the file, atomically."""
        started = time.monotonic()
        inputs, outputs = jax.device_get(tables)
        with replacing(self.path) as unfinished, unfinished.open("wb") as handle:
            np.savez(
                handle, fingerprint=self._fingerprint, inputs=inputs, outputs=outputs, counts=place[:4], sums=place[4:]
            )
        ended = time.monotonic()
        self._next = ended + max(EVERY, 20 * (ended - started))

    def remove(self) -> None:
        """Remove the file: the vectors are there."""
        self.path.unlink(missing_ok=True)
