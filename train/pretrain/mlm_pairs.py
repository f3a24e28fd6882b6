"""Masked language modelling and a task on pairs of texts: the sum of two losses.

The task is next sentence prediction, whether B follows A in the text or is from elsewhere (Devlin et al. 2018, 3.1), or
sentence order prediction, whether A and B are in order or swapped (Lan et al. 2019, 3.1).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import numpy as np

from ...data import DocumentStore, SentencePairRows, Tokenizer
from ...data.corpus.document_store import Split
from ...data.rows.sentence_pairs import LABELS, Pairs
from ...data.stream import RowSource
from ...models.heads.losses import prediction_sums
from ...models.heads.with_head import encoder_inputs
from ..errors import RunError
from .config import PretrainConfig
from .masking import Masking
from .mlm import make_masking, mask
from .objective import Batch, LossSums, Objective, Term
from .samples import fill_in


@dataclass(frozen=True, eq=False)
class MaskedWordsAndPairs(Objective):
    """Base of the two objectives. Their losses are "mlm" and `task`."""

    task: ClassVar[str]
    pairs: ClassVar[Pairs]

    masking: Masking
    tokenizer: Tokenizer
    head = "pretraining"
    own_rows: ClassVar = "pairs of sentences"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`.

        Raises:
            RunError: the tokenizer has no token between the texts of a pair.
        """
        if not tokenizer.template.between:
            folder = config.tokenizer_folder
            raise RunError(f"{folder}: a tokenizer without a token between the texts of a pair, as [SEP] is.")
        return cls(make_masking(config, tokenizer), tokenizer)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        return SentencePairRows(store, self.tokenizer, split, pairs=self.pairs, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Mask tokens."""
        return mask(self.masking, key, batch)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the numbers of masked tokens and of pairs."""
        return {"mlm": batch["mlm_weights"].sum(), self.task: batch[f"{LABELS[self.pairs]}_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the cross-entropies of the masked tokens and of the pairs."""
        logits = model.apply(
            {"params": params},
            *encoder_inputs(model.config, batch),
            mlm_positions=batch["mlm_positions"],
            cls_positions=batch["cls_positions"],
            rows=batch["rows"],
            **mode,
        )
        label = LABELS[self.pairs]
        return {
            "mlm": prediction_sums(logits.mlm_logits, batch["mlm_labels"], batch["mlm_weights"]),
            self.task: prediction_sums(
                getattr(logits, f"{self.task}_logits"), batch[f"{label}_labels"], batch[f"{label}_weights"]
            ),
        }

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Show texts with masked words and the model's predictions."""

        def apply(params: Any, batch: Batch) -> jax.Array:
            return model.apply({"params": params}, *encoder_inputs(model.config, batch)).mlm_logits

        return fill_in(apply, params, self.tokenizer, rows)


class MaskedWordsAndNextSentence(MaskedWordsAndPairs):
    """The objective `mlm+nsp`, with the losses "mlm" and "nsp"."""

    task, pairs = "nsp", "next"
    shown = ("mlm_loss", "mlm_accuracy", "nsp_accuracy")
    terms = (Term("mlm"), Term("nsp"))


class MaskedWordsAndSentenceOrder(MaskedWordsAndPairs):
    """The objective `mlm+sop`, with the losses "mlm" and "sop"."""

    task, pairs = "sop", "order"
    shown = ("mlm_loss", "mlm_accuracy", "sop_accuracy")
    terms = (Term("mlm"), Term("sop"))
