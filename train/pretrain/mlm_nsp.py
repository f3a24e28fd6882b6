"""Masked language modelling and next sentence prediction: the sum of BERT's two losses (Devlin et al. 2018, 3.1)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from ...data import DocumentStore, SentencePairRows, Tokenizer
from ...data.corpus.document_store import Split
from ...data.stream import RowSource
from ...models.family import Family
from ...models.heads.losses import PredictionSums, prediction_sums
from ...models.heads.with_head import encoder_inputs
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
        """Return None: there is only one kind of rows."""

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`.

        Raises:
            RunError: the requested rows contain no pairs.
        """
        if config.rows is not None:
            raise RunError(f"--rows {config.rows}: --objective mlm+nsp has rows of its own, pairs of sentences.")
        if not tokenizer.template.between:
            folder = config.tokenizer_folder
            raise RunError(f"{folder}: a tokenizer without a token between the texts of a pair, as [SEP] is.")
        return cls(make_masking(config, tokenizer), tokenizer)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        return SentencePairRows(store, self.tokenizer, split, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Mask tokens."""
        return mask(self.masking, key, batch)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the numbers of masked tokens and of pairs."""
        return {"mlm": batch["mlm_weights"].sum(), "nsp": batch["next_sentence_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> dict[str, PredictionSums]:
        """Compute the cross-entropies of the masked tokens and of the pairs."""
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
        """Show texts with masked words and the model's predictions."""

        def apply(params: Any, batch: Batch) -> jax.Array:
            return model.apply({"params": params}, *encoder_inputs(model.config, batch)).mlm_logits

        return fill_in(apply, params, self.tokenizer, rows)
