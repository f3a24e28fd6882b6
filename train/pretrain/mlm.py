"""Masked language modelling: predict masked tokens from their context (Devlin et al. 2018, 3.1).

Rows are BERT's without pairs, or RoBERTa's full sentences and document sentences (Liu et al. 2019, 4.2). The rows
determine the rules of masking: BERT masks a fixed number of tokens other than special ones; RoBERTa masks any tokens,
in a number that is right on average, and its random tokens are never special ones. ModernBERT (Warner et al. 2024)
masks each token independently, more of them in training than in evaluation.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from ...data import DocumentStore, FullSentenceRows, SentencePairRows, Tokenizer
from ...data.corpus.document_store import Split
from ...data.stream import RowSource
from ...models.heads.losses import prediction_sums
from ...models.heads.with_head import encoder_inputs
from ..errors import RunError
from .config import PretrainConfig, RowKind
from .masking import Masking, Rules
from .model import asked_family
from .objective import Batch, LossSums, Objective, Term
from .samples import fill_in


@dataclass(frozen=True, eq=False)
class MaskedWords(Objective):
    """The objective `mlm`, with the loss "mlm"."""

    masking: Masking
    tokenizer: Tokenizer
    kind: RowKind
    evaluation_rate: float
    head = "masked_lm"
    shown = ("mlm_accuracy",)
    terms = (Term("mlm"),)

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        kind, family = config.rows or "sentences", asked_family(config)
        rules: Rules = "bert" if kind == "sentences" else "roberta"
        if family.masks == "independent" and config.masking == "token":
            rules = "independent"
        masking = make_masking(config, tokenizer, rules)
        own = family.evaluation_mask_rate
        return cls(masking, tokenizer, kind, masking.rate if own is None else own)

    def held_out(self) -> Self:
        """Return the objective with the fraction of tokens to predict in evaluation."""
        masking = dataclasses.replace(self.masking, rate=self.evaluation_rate)
        return dataclasses.replace(self, masking=masking)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        if self.kind == "sentences":
            return SentencePairRows(store, self.tokenizer, split, pairs="none", **settings)
        across = self.kind == "full-sentences"
        return FullSentenceRows(store, self.tokenizer, split, cross_documents=across, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Mask tokens."""
        return mask(self.masking, key, batch)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the number of predictions."""
        return {"mlm": batch["mlm_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the cross-entropy of the masked tokens."""
        logits = model.apply(
            {"params": params},
            *encoder_inputs(model.config, batch),
            mlm_positions=batch["mlm_positions"],
            rows=batch["rows"],
            **mode,
        )
        return {"mlm": prediction_sums(logits, batch["mlm_labels"], batch["mlm_weights"])}

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Show texts with masked words and the model's predictions."""

        def apply(params: Any, batch: Batch) -> jax.Array:
            return model.apply({"params": params}, *encoder_inputs(model.config, batch))

        return fill_in(apply, params, self.tokenizer, rows)


def make_masking(config: PretrainConfig, tokenizer: Tokenizer, rules: Rules = "bert", **shares: float) -> Masking:
    """Return the masking of a run's settings, for a vocabulary.

    Args:
        config: settings completed by `with_defaults`.
        tokenizer: has the vocabulary.
        rules: rules of masking.
        shares: `keep` and `random` of `Masking`, if they are not BERT's.

    Raises:
        RunError: see `require_special_tokens`.
    """
    assert config.masking is not None
    assert config.mask_rate is not None
    require_special_tokens(config, tokenizer)
    ids = (tokenizer.mask_id, tokenizer.special, tokenizer.continuation)
    return Masking(config.masking, config.mask_rate, *ids, rules, **shares)


def require_special_tokens(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Check that a tokenizer has what masked language modelling needs.

    Raises:
        RunError: the tokenizer lacks special tokens, so that masked language modelling has no inputs.
    """
    template, roles = tokenizer.template, tokenizer.special_ids
    lacking = [f"{role} token" for role in ("mask", "pad") if role not in roles]
    lacking += [f"token {where} a text" for where in ("before", "after") if not getattr(template, where)]
    if lacking:
        raise RunError(
            f"{config.tokenizer_folder}: a tokenizer without a {', a '.join(lacking)}. Masked language modelling needs "
            "all of these, such as [MASK], [PAD], [CLS] and [SEP]."
        )


def mask(masking: Masking, key: jax.Array, batch: Batch) -> Batch:
    """Return the batch with masked tokens, and `mlm_positions`, `mlm_labels` and `mlm_weights` [B, P]."""
    masked = masking(key, batch["input_ids"], batch["segment_ids"], batch["row_ids"])
    return {
        **batch,
        "input_ids": masked.input_ids,
        "mlm_positions": masked.positions,
        "mlm_labels": masked.labels,
        "mlm_weights": masked.weights,
    }
