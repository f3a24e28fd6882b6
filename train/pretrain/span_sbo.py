"""Masked spans, predicted from their context and from their boundaries alone (Joshi et al. 2020, 3).

Each example masks spans of whole words until its budget is full. The loss "mlm" predicts their tokens as masked words;
the loss "sbo", the span boundary objective, predicts them from the two tokens beside the span and the place in it. Each
has its own denominator, as in the original (spanbert_loss.py), which adds one to the second.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import numpy as np

from ...data import DocumentStore, SentencePairRows, Tokenizer
from ...data.corpus.document_store import Split
from ...data.stream import RowSource
from ...models.checkpoints.folder import read_config
from ...models.encoders.spanbert import SpanBertConfig, SpanTargets
from ...models.heads.losses import prediction_sums
from ...models.heads.with_head import encoder_inputs
from .config import PretrainConfig
from .mlm import require_special_tokens
from .objective import Batch, LossSums, Objective, Term
from .samples import fill_in
from .spans import SpanMasking


@dataclass(frozen=True, eq=False)
class MaskedSpans(Objective):
    """The objective `span+sbo`, with the losses "mlm" and "sbo"."""

    masking: SpanMasking
    tokenizer: Tokenizer
    head = "pretraining"
    shown = ("mlm_loss", "mlm_accuracy", "sbo_loss")
    terms = (Term("mlm"), Term("sbo", added=1.0))
    units: ClassVar = ("span",)
    own_rows: ClassVar = "of single texts"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        require_special_tokens(config, tokenizer)
        assert config.mask_rate is not None
        if config.init_from is None:
            architecture = SpanBertConfig.preset(config.model)
        else:
            architecture = SpanBertConfig.from_json(read_config(config.init_from))
        masking = SpanMasking(
            config.mask_rate,
            tokenizer.mask_id,
            tokenizer.special,
            tokenizer.continuation,
            architecture.span_targets,
        )
        return cls(masking, tokenizer)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`. No example is shortened at random."""
        return SentencePairRows(store, self.tokenizer, split, pairs="none", short_fraction=0.0, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Mask spans; adds the arrays of `MaskedSpanTokens` [B, P], as `mlm_*` and `sbo_*`."""
        spans = self.masking(key, batch["input_ids"], batch["segment_ids"], batch["row_ids"])
        return {
            **batch,
            "input_ids": spans.masked.input_ids,
            "mlm_positions": spans.masked.positions,
            "mlm_labels": spans.masked.labels,
            "mlm_weights": spans.masked.weights,
            **{f"sbo_{name}": getattr(spans, name) for name in ("left", "right", "offsets", "weights")},
        }

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the numbers of masked tokens, and of those that are predicted from boundaries."""
        return {"mlm": batch["mlm_weights"].sum(), "sbo": batch["sbo_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the cross-entropies of both predictions."""
        logits = model.apply(
            {"params": params},
            *encoder_inputs(model.config, batch),
            mlm_positions=batch["mlm_positions"],
            span_targets=SpanTargets(batch["sbo_left"], batch["sbo_right"], batch["sbo_offsets"]),
            rows=batch["rows"],
            **mode,
        )
        return {
            "mlm": prediction_sums(logits.mlm_logits, batch["mlm_labels"], batch["mlm_weights"]),
            "sbo": prediction_sums(logits.sbo_logits, batch["mlm_labels"], batch["sbo_weights"]),
        }

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Show texts with masked words and the model's predictions."""

        def apply(params: Any, batch: Batch) -> jax.Array:
            return model.apply({"params": params}, *encoder_inputs(model.config, batch)).mlm_logits

        return fill_in(apply, params, self.tokenizer, rows)
