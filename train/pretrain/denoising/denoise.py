"""Denoising: the decoder writes the whole text, which the encoder reads with masked words and sentences out of order.

Lewis et al. 2020, 2.2 and 5.1; the noise is in infilling.py. Rows are full sentences, as fairseq's `complete` blocks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from ....data import DocumentStore, FullSentenceRows, Tokenizer
from ....data.corpus.document_store import Split
from ....data.stream import RowSource
from ...errors import RunError
from ..config import PretrainConfig
from ..mlm import require_special_tokens
from ..objective import Batch, Term
from .infilling import Infilling
from .restoring import Restoring, both_sides, row_keys

STOP = "."


@dataclass(frozen=True, eq=False)
class Denoising(Restoring):
    """The objective `denoise`, with the loss "denoise"."""

    noise: Infilling
    name = "denoise"
    shown = ("denoise_accuracy",)
    terms = (Term("denoise"),)
    units: ClassVar = ("span",)
    own_rows: ClassVar = "full sentences"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        assert config.mask_rate is not None
        require_special_tokens(config, tokenizer)
        stops = np.array([token.lstrip("▁Ġ#") == STOP for token in tokenizer.tokens])
        if not stops.any():
            raise RunError(
                f"{config.tokenizer_folder or 'the tokenizer'}: no token is a full stop, at which --objective denoise "
                "divides text into sentences."
            )
        noise = Infilling(config.mask_rate, tokenizer.mask_id, tokenizer.special, tokenizer.continuation, stops)
        return cls(tokenizer, config.z_loss, tokenizer.sep_id, noise)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        return FullSentenceRows(store, self.tokenizer, split, cross_documents=True, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Permute sentences and mask words."""
        rows = jax.vmap(self._row)(row_keys(key, batch["row_ids"]), batch["input_ids"], batch["segment_ids"])
        return {**batch, **rows}

    def _row(self, key: jax.Array, ids: jax.Array, segments: jax.Array) -> Batch:
        length = (segments > 0).sum(dtype=jnp.int32)
        source, source_length = self.noise(key, ids, length)
        return both_sides(source, source_length, ids, length, self.start, self.tokenizer.pad_id)
