"""Fill masked words with a pretrained model: what `bestiary predict` does with a pretraining run."""

from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.checkpoints.folder import load_with_report
from ...models.heads.with_head import encoder_inputs
from ..errors import RunError

BEST = 5
"""Number of predictions shown for a masked word."""
ROWS = 32
"""Texts that are computed together."""


class MaskFiller:
    """A model that predicts masked words.

    Args:
        folder: checkpoint folder with a masked language model and its tokenizer.

    Raises:
        RunError: the model has no head for masked words, or there is no tokenizer.
    """

    def __init__(self, folder: Path):
        loaded, report = load_with_report(folder, head="masked_lm")
        if report.initialised:
            raise RunError(f"{folder}: this model does not predict masked words (it lacks {report.initialised[0]}).")
        if loaded.tokenizer is None:
            raise RunError(f"{folder}: there is no tokenizer to read text with.")
        self.tokenizer, self._params, self._most = loaded.tokenizer, loaded.params, loaded.config.max_length

        @jax.jit
        def best(params: Any, batch: dict[str, jax.Array], masks: jax.Array) -> tuple[jax.Array, jax.Array]:
            inputs = encoder_inputs(loaded.config, batch)
            logits = loaded.model.apply({"params": params}, *inputs, mlm_positions=masks)
            return jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits).astype(jnp.float32)), BEST)

        self._best = best

    def fill(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield for each text its `text` and `masks`: for each masked word, the best words with their probabilities.

        Args:
            texts: texts in which the tokenizer's mask token, [MASK] for instance, stands for a word.

        Raises:
            RunError: a text has no mask token, or more tokens than the model takes.
        """
        mask = self.tokenizer.tokens[self.tokenizer.mask_id]
        for some in batched(texts, ROWS):
            batch = self.tokenizer(some)
            places = batch["input_ids"] == self.tokenizer.mask_id
            for text, row, segments in zip(some, places, batch["segment_ids"], strict=True):
                if not row.any():
                    raise RunError(f"{text!r}: expected {mask} in place of a word.")
                if self._most is not None and segments.sum() > self._most:
                    raise RunError(f"{text!r}: {segments.sum()} tokens, but the model takes {self._most}.")
            # Lengths and numbers of masks are rounded up: few shapes to compile.
            counts = places.sum(1)
            masks = np.zeros((len(some), _rounded(counts.max(), 4)), np.int32)
            for row, found in enumerate(places):
                masks[row, : counts[row]] = np.flatnonzero(found)
            length = _rounded(places.shape[1], 32)
            length = length if self._most is None else min(length, self._most)
            wide = {name: np.zeros((len(some), length), np.int32) for name in batch}
            wide["input_ids"][:] = self.tokenizer.pad_id
            for name, values in batch.items():
                wide[name][:, : places.shape[1]] = values
            sure, words = jax.device_get(self._best(self._params, wide, masks))
            for row, text in enumerate(some):
                yield {
                    "text": text,
                    "masks": [
                        [
                            {"word": self.tokenizer.decode([int(word)]).strip(), "probability": round(float(value), 4)}
                            for word, value in zip(words[row, number], sure[row, number], strict=True)
                        ]
                        for number in range(counts[row])
                    ],
                }


def _rounded(number: int, step: int) -> int:
    return -(-int(number) // step) * step
