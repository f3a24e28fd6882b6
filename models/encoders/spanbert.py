"""SpanBERT: BERT, pretrained to predict masked spans, also from nothing but the tokens at their boundaries.

Joshi et al. 2020, "SpanBERT: Improving Pre-training by Representing and Predicting Spans".

What sets it apart from BERT: the pretraining alone. The span boundary objective (3.2) predicts each token of a masked
span from the hidden states of the two tokens beside the span and the token's place in it; there is no next sentence
prediction. The encoder, its task heads and the released checkpoints are BERT's, cased; config.json says "bert".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, Table, linear_entries, norm_entries, same
from ..family import Architecture, Family
from ..heads.with_head import architectures, masked_words, masked_words_entries
from ..layers.activations import ACTIVATIONS
from ..layers.linear import Embed, Linear, add_bias, partitioned
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments, gather_positions
from . import bert

CASED = 28_996  # tokens of BERT's cased vocabulary


@dataclass(frozen=True)
class SpanBertConfig(bert.BertConfig):
    """Sizes and settings of a SpanBERT. The defaults are those of the base model."""

    MODEL_TYPE: ClassVar[str] = "spanbert"
    STORED_TYPE: ClassVar[str] = "bert"
    KEYS: ClassVar[Mapping[str, str]] = {
        **bert.BertConfig.KEYS,
        "span_targets": "max_pair_targets",
        "span_position_size": "pair_positional_embedding_size",
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The small sizes are BERT's (Turc et al. 2019): the paper has large, and base was released.
        f"spanbert-{size}": {**bert.BertConfig.PRESETS[f"bert-{size}"], "vocab_size": CASED}
        for size in ("tiny", "mini", "small", "medium", "base", "large")
    }

    vocab_size: int = CASED
    span_targets: int = 15
    """longest span, in tokens, that is predicted from its boundaries"""
    span_position_size: int = 200
    """size of the vectors of places within a span"""


class SpanTargets(NamedTuple):
    """Tokens to predict from the boundaries of their spans."""

    left: Array  # [B, P] int32, position of the last token before the span
    right: Array  # [B, P] int32, position of the first token after the span
    offsets: Array  # [B, P] int32, place of the token in the span, from 0


class SpanBoundaryHead(nn.Module):
    """Two dense layers, each with activation and norm, then products with the word embeddings, and a bias (3.2)."""

    config: SpanBertConfig

    @nn.compact
    def __call__(self, hidden: Array, targets: SpanTargets, words: Embed) -> Array:
        """Compute logits [B, P, V] from hidden states [B, L, E], in the compute dtype."""
        c = self.config
        axes, activation = ("embed", "embed_out"), ACTIVATIONS[c.activation]
        places = Embed(c.span_targets, c.span_position_size, "positions", c.initializer, c.dtype, name="position")
        sides = [gather_positions(hidden, side) for side in (targets.left, targets.right)]
        inner = jnp.concatenate([*sides, places(targets.offsets).astype(hidden.dtype)], axis=-1)
        for part in ("first", "second"):
            inner = Linear((c.width,), axes, c.initializer, c.dtype, name=part)(inner)
            inner = LayerNorm(c.norm_epsilon, c.dtype, name=f"{part}_norm")(activation(inner))
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "vocab"), (words.count,), jnp.float32)
        return add_bias(words.attend(inner), bias).astype(c.dtype)


class Pretraining(NamedTuple):
    """Logits of both pretraining tasks, in the compute dtype."""

    mlm_logits: Array  # [B, P, V], or [B, L, V] if no positions were given
    sbo_logits: Array | None  # [B, P, V]; None if no targets were given


class SpanBertForPreTraining(nn.Module):
    """The encoder with both pretraining heads: masked language model and span boundary objective."""

    config: SpanBertConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = bert.Bert(c, pooler=False)
        self.mlm = masked_words(c, bert.FORMS["masked_lm"])
        self.sbo = SpanBoundaryHead(c)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        mlm_positions: Array | None = None,
        span_targets: SpanTargets | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Pretraining:
        """Compute both tasks' logits. Arguments as for `Bert`, and these.

        Args:
            mlm_positions: [B, P] int32, the positions to predict; None for every position.
            span_targets: the tokens to predict from the boundaries of their spans; None for none.
        """
        inputs = (input_ids, segment_ids, position_ids, token_type_ids)
        hidden = self.encoder(*inputs, rows=rows, deterministic=deterministic).hidden
        chosen = hidden if mlm_positions is None else gather_positions(hidden, mlm_positions)
        words = self.encoder.embeddings.word
        if self.is_initializing():
            span_targets = SpanTargets(*[jnp.zeros((len(hidden), 1), jnp.int32)] * 3)
        sbo = None if span_targets is None else self.sbo(hidden, span_targets, words)
        return Pretraining(self.mlm(chosen, words), sbo)


def _pretraining_table(c: SpanBertConfig) -> Table:
    """Return the table, with the names of the released pretraining code."""
    words, tied = masked_words_entries(c, bert.FORMS["masked_lm"], bert.PARTS)
    name, width = "cls.pair_target_predictions", (c.width,)
    dense = f"{name}.mlp_layer_norm"
    inputs = 2 * c.width + c.span_position_size
    entries = [
        *words,
        Entry(
            f"{name}.position_embeddings.weight",
            ("sbo", "position", "embedding"),
            same(c.span_targets, c.span_position_size),
        ),
        *linear_entries(f"{dense}.linear1", ("sbo", "first"), (inputs,), width),
        *norm_entries(f"{dense}.layer_norm1", ("sbo", "first_norm"), c.width),
        *linear_entries(f"{dense}.linear2", ("sbo", "second"), width, width),
        *norm_entries(f"{dense}.layer_norm2", ("sbo", "second_norm"), c.width),
        Entry(f"{name}.bias", ("sbo", "bias"), same(c.vocab_size)),
    ]
    tied = {**tied, f"{name}.decoder.weight": bert.PARTS.words(c)}
    return bert.PARTS.table(c, entries, tied, pooler=False)


PRETRAINING = Architecture("SpanBertForPreTraining", "pretraining", SpanBertForPreTraining, _pretraining_table)
FAMILY = Family(
    config=SpanBertConfig,
    title="SpanBERT",
    paper="Joshi et al. 2020",
    tokenizers=("wordpiece",),
    architectures=architectures(bert.PARTS, bert.FORMS, [PRETRAINING]),
    objectives=("span+sbo", "mlm"),
)
