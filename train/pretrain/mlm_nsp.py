"""Masked words and next sentences: BERT's two losses, added up (Devlin et al. 2018, 3.1)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from ...data import DocumentStore, SentencePairRows, Tokenizer
from ...data.corpus.document_store import Split
from ...data.stream import RowSource
from ...models.family import Family
from ...models.heads import encoder_inputs
from ...models.losses import PredictionSums, prediction_sums
from ..errors import RunError
from .config import PretrainConfig
from .masking import Masking
from .mlm import make_masking, mask
from .objective import Batch
from .samples import fill_in


@dataclass(frozen=True, eq=False)
class MaskedWordsAndNextSentence:
    """The objective `mlm+nsp`, with the losses "mlm" and "nsp": whether sentence B follows A in the text."""

    masking: Masking
    tokenizer: Tokenizer
    head = "pretraining"
    shown = ("mlm_loss", "mlm_accuracy", "nsp_accuracy")

    @staticmethod
    def default_rows(family: Family) -> None:
        """No choice is left."""

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """With a run's settings.

        Raises:
            RunError: rows were asked for that hold no pairs.
        """
        if config.rows is not None:
            raise RunError(f"--rows {config.rows}: --objective mlm+nsp has rows of its own, pairs of sentences.")
        return cls(make_masking(config, tokenizer), tokenizer)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """As `Objective.rows`."""
        return SentencePairRows(store, self.tokenizer, split, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Hide tokens."""
        return mask(self.masking, key, batch)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Number of hidden tokens, and of pairs."""
        return {"mlm": batch["mlm_weights"].sum(), "nsp": batch["next_sentence_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> dict[str, PredictionSums]:
        """Cross-entropy of the hidden tokens and of the pairs."""
        logits = model.apply(
            {"params": params},
            *encoder_inputs(model.config, batch),
            mlm_positions=batch["mlm_positions"],
            cls_positions=batch["cls_positions"],
            rows=batch["rows"],
            **mode,
        )
        return {
            "mlm": prediction_sums(logits.mlm_logits, batch["mlm_labels"], batch["mlm_weights"]),
            "nsp": prediction_sums(logits.nsp_logits, batch["next_sentence_labels"], batch["next_sentence_weights"]),
        }

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Texts with words hidden and filled in."""
        return fill_in(lambda *inputs: model.apply(*inputs).mlm_logits, params, self.tokenizer, rows)
