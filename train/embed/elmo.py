"""Features by ELMo, for `bestiary embed` and `bestiary probe`: of any words, since it reads their characters.

The model is a folder of `bestiary pretrain --objective bilm`, or one with bilm-tf's options.json and its HDF5 file. A
text's words are what spaces separate. Every text is read from a state of zeros, between the marks of a sentence, which
are not part of its vectors; bilm-tf's own code lets the state go on from text to text.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.json_files import read_object
from ...models import load
from ...models.checkpoints.config import require_checkpoint
from ...models.recurrent.bilm_tf import read_bilm
from ...models.recurrent.elmo import Elmo, character_ids
from ..arguments import parse_layers
from ..errors import RunError
from .config import FeatureConfig
from .extract import Extracted, Extractor, Settings, features_of, parse_pooling

OPTIONS = "options.json"
LENGTHS = (16, 32, 64, 128, 256, 512)
"""Lengths of batches, in words with the marks; a text goes into the shortest that it fits."""
BATCH_WORDS = 1024


def is_elmo(folder: Path) -> bool:
    """Tell whether a folder holds an ELMo, of either kind."""
    if (folder / OPTIONS).is_file():
        return True
    path = folder / "config.json"
    return path.is_file() and read_object(path).get("model_type") == "elmo"


def open_extractor(config: FeatureConfig, *, apart: bool = False) -> "Extractor | ElmoExtractor":
    """Return what extracts features with the model of a folder; `apart` keeps layers separate."""
    kind = ElmoExtractor if is_elmo(config.model) else Extractor
    return kind(config, apart=apart)


class ElmoExtractor:
    """An ELMo that extracts features; what `Extractor` is for encoders of tokens.

    Raises:
        RunError: it does not have these layers or this pooling, or an option has no meaning for it.
        CheckpointError: see `models.load` and `read_bilm`.
    """

    def __init__(self, config: FeatureConfig, *, apart: bool = False):
        folder = config.model
        if (folder / OPTIONS).is_file():
            files = sorted(folder.glob("*.hdf5"))
            if len(files) != 1:
                raise RunError(f"{folder}: expected one .hdf5 file beside {OPTIONS}, found {len(files)}.")
            model, params = read_bilm(folder / OPTIONS, files[0])
            self._files, self._marks = [folder / OPTIONS, files[0]], ("<S>", "</S>")
            self._lowercase = False
        else:
            require_checkpoint(folder)
            loaded = load(folder)
            model, params = Elmo(loaded.config), loaded.params["encoder"]
            self._files, self._marks = [folder / "config.json", folder / "model.safetensors"], ("</S>", "</S>")
            tokenizer: Any = loaded.tokenizer
            self._lowercase = bool(tokenizer is not None and tokenizer.lowercase)
        c = model.config
        pooling = parse_pooling(config.pooling or "mean")
        if "cls" in pooling:
            raise RunError("--pooling cls: ELMo has no such token; choose mean, max or mean_sqrt_len, or token.")
        if config.prompt or config.dtype != "float32":
            raise RunError(f"{'--prompt' if config.prompt else '--dtype'}: it has no meaning for ELMo. Leave it out.")
        layers = parse_layers(config.layers, c.layers)
        combine = None if apart else config.combine if len(layers) > 1 else "sum"
        most = config.max_length or LENGTHS[-1]
        if not 3 <= most <= LENGTHS[-1]:
            raise RunError(f"--max-length {most}: expected 3 to {LENGTHS[-1]} words.")
        self.settings = Settings(
            *(folder, layers, combine, pooling, bool(config.normalize and pooling), most),
            *(self._lowercase, "", 0, config.dtype),
        )
        self.truncated = 0  # truncated words so far
        self._texts = 0  # so far
        self._most = c.most_characters
        self._params = jax.device_put(params)

        @jax.jit
        def step(params: Any, ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
            found = model.apply({"params": params}, ids)[0]  # [B, N + 1, L, 2 E]
            hidden = jnp.moveaxis(found[:, list(layers)], 1, 0)
            return features_of(hidden, segment_ids, jnp.ones((len(ids), 1), jnp.int32), self.settings)

        self._step = step

    def __call__(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> Extracted:
        """Compute the features of texts.

        Raises:
            RunError: they are pairs, which ELMo does not read together, or a text has no words.
        """
        if seconds is not None:
            raise RunError("--pairs together: ELMo reads one text at a time; give --pairs apart.")
        words = [(text.lower() if self._lowercase else text).split() for text in texts]
        for number, own in enumerate(words, self._texts + 1):
            if not own:
                raise RunError(f"text {number}: it has no words, and so no vector. Leave it out.")
        self._texts += len(words)
        room = self.settings.max_length - 2
        self.truncated += sum(max(0, len(own) - room) for own in words)
        words = [own[:room] for own in words]
        found: list[Any] = [None] * len(words)
        for shorter, length in zip((0, *LENGTHS), LENGTHS, strict=False):
            mine = [number for number, own in enumerate(words) if shorter < len(own) + 2 <= length]
            count = max(1, BATCH_WORDS // length)
            for start in range(0, len(mine), count):
                some = mine[start : start + count]
                ids = np.zeros((count, length, self._most), np.int32)
                made = character_ids([[self._marks[0], *words[n], self._marks[1]] for n in some], self._most)
                ids[: len(some), : made.shape[1]] = made
                segment_ids = np.zeros((count, length), np.int32)
                for row, number in enumerate(some):
                    segment_ids[row, 1 : len(words[number]) + 1] = 1
                vectors = np.asarray(self._step(self._params, ids, segment_ids))
                for row, number in zip(vectors, some, strict=False):
                    found[number] = row[0] if self.settings.pooling else row[1 : len(words[number]) + 1]
        starts = np.cumsum([0, *map(len, words)], dtype=np.int64)
        vectors = np.stack(found) if self.settings.pooling else np.concatenate(found)
        numbers = np.zeros(int(starts[-1]), np.int32)  # words have no ids here
        return Extracted(vectors, starts, numbers)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; it differs if the weights or the settings differ."""
        digest = hashlib.sha256(json.dumps(self.settings._replace(encoder=Path())._asdict(), default=str).encode())
        for path in self._files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
