"""Reading sentences by an ELMo: of a folder of `bestiary pretrain --objective bilm`, or of bilm-tf's files.

Every sentence is read from a state of zeros, between the marks of a sentence; bilm-tf's own code lets the state go on
from one to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...data.json_files import read_object
from ..checkpoints.config import fingerprint, require_checkpoint
from ..checkpoints.folder import CheckpointError, load
from .bilm_tf import read_bilm
from .elmo import Elmo, character_ids

OPTIONS = "options.json"
LENGTHS = (16, 32, 64, 128, 256, 512)
"""Lengths of batches, in words with the marks; a sentence goes into the shortest that it fits."""
BATCH_WORDS = 1024


def is_elmo(folder: Path) -> bool:
    """Tell whether a folder holds an ELMo, of either kind."""
    if (folder / OPTIONS).is_file():
        return True
    path = folder / "config.json"
    return path.is_file() and read_object(path).get("model_type") == "elmo"


def elmo_files(folder: Path) -> tuple[Path, Path]:
    """Return the files of an ELMo, of either kind: its config, and its weights.

    Raises:
        CheckpointError: it is no ELMo.
        FileNotFoundError: there is no such folder.
    """
    if (folder / OPTIONS).is_file():
        weights = sorted(folder.glob("*.hdf5"))
        if len(weights) != 1:
            raise CheckpointError(f"{folder}: expected one .hdf5 file beside {OPTIONS}, found {len(weights)}.")
        return folder / OPTIONS, weights[0]
    require_checkpoint(folder)
    if not is_elmo(folder):
        raise CheckpointError(f"{folder}: not an ELMo, of `bestiary pretrain --objective bilm` or bilm-tf.")
    return folder / "config.json", folder / "model.safetensors"


class Read(NamedTuple):
    """A batch of sentences."""

    numbers: list[int]  # of the sentences in the first rows; further rows are empty
    characters: np.ndarray  # [B, L, most characters] int32
    segment_ids: np.ndarray  # [B, L] int32, 1 where a sentence's words are, without its marks


class ElmoReader:
    """An ELMo that reads sentences, in batches of few shapes.

    Attributes:
        config: its config.
        lowercase: whether its words are in lower case.
        longest: words of a sentence at most.

    Args:
        folder: the model's folder.

    Raises:
        CheckpointError: it is no ELMo; see `models.load` and `read_bilm`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        config, weights = elmo_files(folder)
        if config.name == OPTIONS:
            self._model, params = read_bilm(config, weights)
            self._marks, self.lowercase = ("<S>", "</S>"), False
        else:
            loaded = load(folder)
            self._model, params = Elmo(loaded.config), loaded.params["encoder"]
            self._marks = ("</S>", "</S>")
            self.lowercase = bool(loaded.tokenizer is not None and loaded.tokenizer.lowercase)
        self.config = self._model.config
        self.longest = LENGTHS[-1] - 2
        self._params = jax.device_put(params)

    def compile(self, finish: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[Read], np.ndarray]:
        """Return what reads a batch and computes `finish` of it.

        Args:
            finish: (states [K, B, L, 2 E] of the words and all layers, segment_ids) -> an array of B rows.
        """

        @jax.jit
        def run(params: Any, characters: jax.Array, segment_ids: jax.Array) -> jax.Array:
            found = self._model.apply({"params": params}, characters)[0]
            return finish(jnp.moveaxis(found, 1, 0), segment_ids)

        return lambda batch: np.asarray(run(self._params, batch.characters, batch.segment_ids))

    def batches(self, sentences: Sequence[Sequence[str]]) -> Iterator[Read]:
        """Yield batches of all sentences that have words, at most `longest`."""
        most = self.config.most_characters
        for shorter, length in zip((0, *LENGTHS), LENGTHS, strict=False):
            mine = [number for number, own in enumerate(sentences) if own and shorter < len(own) + 2 <= length]
            count = max(1, BATCH_WORDS // length)
            for start in range(0, len(mine), count):
                some = mine[start : start + count]
                ids, segment_ids = np.zeros((count, length, most), np.int32), np.zeros((count, length), np.int32)
                made = character_ids([[self._marks[0], *sentences[n], self._marks[1]] for n in some], most)
                ids[: len(some), : made.shape[1]] = made
                for row, number in enumerate(some):
                    segment_ids[row, 1 : len(sentences[number]) + 1] = 1
                yield Read(some, ids, segment_ids)

    def states(self, sentences: Sequence[Sequence[str]], report: Callable[[int], None] = lambda _: None) -> np.ndarray:
        """Compute the states of all words.

        Args:
            sentences: words of each; a sentence longer than `longest` is read in parts.
            report: called with the number of words that are done.

        Returns:
            [T, K, 2 E] float32, of the T words of all sentences in order: the word itself, then each layer's.
        """
        parts = [
            [word.lower() if self.lowercase else word for word in own[at : at + self.longest]]
            for own in sentences
            for at in range(0, len(own), self.longest)
        ]
        starts = np.cumsum([0, *map(len, parts)])
        found = np.zeros((int(starts[-1]), self.config.layers + 1, 2 * self.config.width), np.float32)
        done = 0
        for batch in self.batches(parts):
            for row, number in zip(self._states(batch), batch.numbers, strict=False):
                found[starts[number] : starts[number + 1]] = row[1 : len(parts[number]) + 1]
                done += len(parts[number])
            report(done)
        return found

    @cached_property
    def _states(self) -> Callable[[Read], np.ndarray]:
        return self.compile(lambda states, _: jnp.moveaxis(states, 0, 2))

    @cached_property
    def fingerprint(self) -> str:
        """See `checkpoints.config.fingerprint`."""
        return fingerprint(self._folder)
