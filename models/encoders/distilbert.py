"""DistilBERT: a BERT with half the layers, distilled from the full one.

Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter".

What sets it apart from its neighbours: no token types and no pooler; no dropout on the output of attention;
classification and multiple choice by a dense layer and ReLU on [CLS]; separate dropout rates for classifiers and spans.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, linear_entries, norm_entries, same
from ..encoder import Encoder, check_length
from ..family import EncoderConfig, Family
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments


def _size(layers: int, width: int, vocab_size: int = 30_522) -> dict[str, Any]:
    """Return the fields of a size. All have heads of 64 and a feed-forward width of four times their own."""
    return {
        "layers": layers,
        "width": width,
        "heads": width // 64,
        "feed_forward": 4 * width,
        "vocab_size": vocab_size,
        "positions": 512,
    }


@dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """Sizes and settings of a DistilBERT. The defaults are those of the base model, uncased."""

    MODEL_TYPE: ClassVar[str] = "distilbert"
    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "width": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "feed_forward": "hidden_dim",
        "positions": "max_position_embeddings",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "sequence_dropout": "seq_classif_dropout",
        "span_dropout": "qa_dropout",
        "initializer_range": "initializer_range",
        "pad_token_id": "pad_token_id",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.REQUIRED,
        "sinusoidal_pos_embds": (False,),
        "tie_weights_": (True,),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The two smallest sizes are half of BERT's (Turc et al. 2019): the paper has the base size.
        "distilbert-tiny": _size(1, 128),
        "distilbert-mini": _size(2, 256),
        "distilbert-base": _size(6, 768),
        "distilbert-base-cased": _size(6, 768, 28_996),
        "distilbert-base-multilingual-cased": _size(6, 768, 119_547),
    }

    layers: int = 6
    sequence_dropout: float = 0.2
    """dropout rate of the inputs of a classifier of whole examples"""
    span_dropout: float = 0.1
    """dropout rate of the inputs of a span head"""

    def head_dropout(self, head: str) -> float:
        """See `EncoderConfig.head_dropout`."""
        if head in ("classification", "choice"):
            return self.sequence_dropout
        return self.span_dropout if head == "span" else self.dropout

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """See `EncoderConfig.dropout_fields`."""
        return {**super().dropout_fields(rate), "sequence_dropout": rate, "span_dropout": rate}


class Embeddings(nn.Module):
    """The sum of word and position vectors, normalised."""

    config: DistilBertConfig

    def setup(self) -> None:
        c = self.config
        embed = partial(Embed, width=c.width, embedding_init=c.initializer, dtype=c.dtype)
        self.word = embed(c.vocab_size, axis="vocab", padding_id=c.pad_token_id)
        self.position = embed(c.positions, axis="positions")
        self.norm = LayerNorm(c.norm_epsilon, dtype=c.dtype)
        self.drop = Dropout(c.dropout)

    def __call__(self, input_ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        length = input_ids.shape[1]
        check_length(self.config, length)
        if position_ids is None:
            position_ids = jnp.arange(length)[None]
        hidden = self.word(input_ids) + self.position(position_ids)
        return self.drop(self.norm(hidden), rows, deterministic=deterministic)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added and then normalised; dropout only after the second."""

    config: DistilBertConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Rows,
        *,
        deterministic: bool,
    ) -> Array:
        """Transform hidden states [B, L, E] -> [B, L, E]."""
        c = self.config
        attention = Attention(
            c.width, c.heads, c.attention_dropout, c.initializer, c.dtype, c.attention_implementation, name="attention"
        )
        feed_forward = FeedForward(c.feed_forward, c.activation, c.initializer, c.dtype, name="feed_forward")

        attended = attention(hidden, segment_ids, rows, deterministic=deterministic)
        hidden = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden + attended)
        fed = Dropout(c.dropout)(feed_forward(hidden), rows, deterministic=deterministic)
        return LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden + fed)


class DistilBert(Encoder):
    """The encoder."""

    config: DistilBertConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)
    pooler: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.layers = Block(self.config)


def encoder_entries(c: DistilBertConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the encoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    n, width, heads = c.layers, (c.width,), (c.heads, c.width // c.heads)
    layer, at = f"{prefix}transformer.layer.{{layer}}.", (*path, "layers")
    tables = (("word", c.vocab_size), ("position", c.positions))
    return [
        *(
            Entry(
                f"{prefix}embeddings.{name}_embeddings.weight",
                (*path, "embeddings", name, "embedding"),
                same(size, c.width),
            )
            for name, size in tables
        ),
        *norm_entries(f"{prefix}embeddings.LayerNorm", (*path, "embeddings", "norm"), c.width),
        *linear_entries(f"{layer}attention.q_lin", (*at, "attention", "query"), width, heads, n),
        *linear_entries(f"{layer}attention.k_lin", (*at, "attention", "key"), width, heads, n),
        *linear_entries(f"{layer}attention.v_lin", (*at, "attention", "value"), width, heads, n),
        *linear_entries(f"{layer}attention.out_lin", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}sa_layer_norm", (*at, "attention_norm"), c.width, n),
        *linear_entries(f"{layer}ffn.lin1", (*at, "feed_forward", "inner"), width, (c.feed_forward,), n),
        *linear_entries(f"{layer}ffn.lin2", (*at, "feed_forward", "outer"), (c.feed_forward,), width, n),
        *norm_entries(f"{layer}output_layer_norm", (*at, "feed_forward_norm"), c.width, n),
    ]


PARTS = EncoderParts(DistilBert, encoder_entries, prefix="distilbert.", classes="DistilBert", pooler=False)
CLASSIFIER = Form(transform="relu", names=("pre_classifier", "classifier"))
FORMS = {
    "masked_lm": Form(names=("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector")),
    "classification": CLASSIFIER,
    "choice": CLASSIFIER,
    "tokens": Form(),
    "span": Form(names=("qa_outputs",)),
}
FAMILY = Family(
    config=DistilBertConfig,
    title="DistilBERT",
    paper="Sanh et al. 2019",
    tokenizers=("wordpiece",),
    architectures=architectures(PARTS, FORMS),
    objectives=("mlm",),
    like=("bert", "spanbert"),
)
