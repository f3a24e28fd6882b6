"""Features by ELMo, for `bestiary embed` and `bestiary probe`: of any words, since it reads their characters.

A text's words are what spaces separate. The marks of a sentence around them are not part of its vectors.
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

from ...models.recurrent.elmo_reader import ElmoReader, is_elmo
from ..arguments import parse_layers
from ..errors import RunError
from .config import FeatureConfig
from .extract import Extracted, Extractor, Settings, features_of, parse_pooling


def open_extractor(config: FeatureConfig, *, apart: bool = False) -> "Extractor | ElmoExtractor":
    """Return what extracts features with the model of a folder; `apart` keeps layers separate."""
    kind = ElmoExtractor if is_elmo(config.model) else Extractor
    return kind(config, apart=apart)


class ElmoExtractor:
    """An ELMo that extracts features; what `Extractor` is for encoders of tokens.

    Raises:
        RunError: it does not have these layers or this pooling, or an option has no meaning for it.
        CheckpointError: see `ElmoReader`.
    """

    def __init__(self, config: FeatureConfig, *, apart: bool = False):
        self._reader = ElmoReader(config.model)
        pooling = parse_pooling(config.pooling or "mean")
        if "cls" in pooling:
            raise RunError("--pooling cls: ELMo has no such token; choose mean, max or mean_sqrt_len, or token.")
        if config.prompt or config.dtype != "float32":
            raise RunError(f"{'--prompt' if config.prompt else '--dtype'}: it has no meaning for ELMo. Leave it out.")
        layers = parse_layers(config.layers, self._reader.config.layers)
        combine = None if apart else config.combine if len(layers) > 1 else "sum"
        longest = self._reader.longest + 2
        most = config.max_length or longest
        if not 3 <= most <= longest:
            raise RunError(f"--max-length {most}: expected 3 to {longest} words.")
        self.settings = Settings(
            *(config.model, layers, combine, pooling, bool(config.normalize and pooling), most),
            *(self._reader.lowercase, "", 0, config.dtype),
        )
        self.truncated = 0  # truncated words so far
        self._texts = 0  # so far

        def finish(states: jax.Array, segment_ids: jax.Array) -> jax.Array:
            firsts = jnp.ones((len(segment_ids), 1), jnp.int32)
            return features_of(states[jnp.array(layers)], segment_ids, firsts, self.settings)

        self._step = self._reader.compile(finish)

    def __call__(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> Extracted:
        """Compute the features of texts.

        Raises:
            RunError: they are pairs, which ELMo does not read together, or a text has no words.
        """
        if seconds is not None:
            raise RunError("--pairs together: ELMo reads one text at a time; give --pairs apart.")
        words = [(text.lower() if self.settings.lowercase else text).split() for text in texts]
        for number, own in enumerate(words, self._texts + 1):
            if not own:
                raise RunError(f"text {number}: it has no words, and so no vector. Leave it out.")
        self._texts += len(words)
        room = self.settings.max_length - 2
        self.truncated += sum(max(0, len(own) - room) for own in words)
        words = [own[:room] for own in words]
        found: list[Any] = [None] * len(words)
        for batch in self._reader.batches(words):
            for row, number in zip(self._step(batch), batch.numbers, strict=False):
                found[number] = row[0] if self.settings.pooling else row[1 : len(words[number]) + 1]
        starts = np.cumsum([0, *map(len, words)], dtype=np.int64)
        vectors = np.stack(found) if self.settings.pooling else np.concatenate(found)
        numbers = np.zeros(int(starts[-1]), np.int32)  # words have no ids here
        return Extracted(vectors, starts, numbers)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; it differs if the weights or the settings differ."""
        settings = json.dumps(self.settings._replace(encoder=Path())._asdict(), default=str)
        return hashlib.sha256(f"{settings} {self._reader.fingerprint}".encode()).hexdigest()
