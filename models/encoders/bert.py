"""BERT: a bidirectional encoder, pretrained on masked words and on whether two texts belong together.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; the small sizes
are Turc et al. 2019, "Well-Read Students Learn Better".

What sets it apart from its neighbours: layers normalised after each addition (post-norm), learnt absolute positions, a
third embedding for sentence A or B, a pooler (dense and tanh) on [CLS], and a decoder tied to the word embeddings.

New weights are initialised as in the released code: from a normal distribution of standard deviation 0.02, truncated at
two standard deviations; biases are zero and norms one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, Table, linear_entries, norm_entries, same
from ..encoder import Encoder, check_length
from ..family import Architecture, EncoderConfig, Family
from ..heads.with_head import EncoderParts, Form, architectures, masked_words, masked_words_entries
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed, Linear
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments, gather_positions


def _size(layers: int, width: int, vocab_size: int = 30_522) -> dict[str, int]:
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
class BertConfig(EncoderConfig):
    """Sizes and settings of a BERT. The defaults are those of BERT-base, uncased."""

    MODEL_TYPE: ClassVar[str] = "bert"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bert-tiny": _size(2, 128),
        "bert-mini": _size(4, 256),
        "bert-small": _size(4, 512),
        "bert-medium": _size(8, 512),
        "bert-base": _size(12, 768),
        "bert-large": _size(24, 1024),
        "bert-base-cased": _size(12, 768, 28_996),
        "bert-large-cased": _size(24, 1024, 28_996),
    }

    token_types: int = 2


class Embeddings(nn.Module):
    """The sum of word, position and sentence vectors, normalised (Devlin et al. 2018, figure 2)."""

    config: EncoderConfig

    def setup(self) -> None:
        c = self.config
        embed = partial(Embed, width=c.table_width, embedding_init=c.initializer, dtype=c.dtype)
        self.word = embed(c.vocab_size, axis="vocab", padding_id=c.pad_token_id)
        self.position = embed(c.positions, axis="positions")
        self.token_type = embed(c.token_types, axis="types")
        self.norm = LayerNorm(c.norm_epsilon, dtype=c.dtype)
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        input_ids: Array,
        position_ids: Array | None,
        token_type_ids: Array | None = None,
        *,
        rows: Rows,
        deterministic: bool,
    ) -> Array:
        length = input_ids.shape[1]
        check_length(self.config, length)
        if position_ids is None:
            position_ids = jnp.arange(length)[None]
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, length), jnp.int32)
        hidden = self.word(input_ids) + self.token_type(token_type_ids) + self.position(position_ids)
        return self.drop(self.norm(hidden), rows, deterministic=deterministic)


class Block(nn.Module):
    """One encoder layer: attention, then feed-forward, each added and then normalised.

    Post-norm; Devlin et al. 2018, 3, after Vaswani et al. 2017, 3.1.
    """

    config: EncoderConfig

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
        attended = Dropout(c.dropout)(attended, rows, deterministic=deterministic)
        hidden = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden + attended)
        fed = Dropout(c.dropout)(feed_forward(hidden), rows, deterministic=deterministic)
        return LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden + fed)


class Bert(Encoder):
    """The encoder, with its pooler unless `pooler` is off."""

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.layers = Block(self.config)
        if self.pooler:
            self.pool = self.make_pooler()


class Pretraining(NamedTuple):
    """Logits of both pretraining tasks, in the compute dtype."""

    mlm_logits: Array  # [B, P, V], or [B, L, V] if no positions were given
    nsp_logits: Array  # [B, X, 2], or [B, 2] if no positions were given; class 0 is "the next sentence"


class BertForPreTraining(nn.Module):
    """The encoder with both pretraining heads: masked language model and next sentence prediction."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Bert(c)
        self.mlm = masked_words(c, FORMS["masked_lm"])
        self.nsp = Linear((2,), ("embed", "labels"), c.initializer, c.dtype)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        mlm_positions: Array | None = None,
        cls_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Pretraining:
        """Compute both tasks' logits. Arguments as for `Bert`, and these.

        Args:
            mlm_positions: [B, P] int32, the positions to predict; None for every position.
        """
        encoded = self.encoder(
            input_ids,
            segment_ids,
            position_ids,
            token_type_ids,
            cls_positions=cls_positions,
            rows=rows,
            deterministic=deterministic,
        )
        hidden = encoded.hidden if mlm_positions is None else gather_positions(encoded.hidden, mlm_positions)
        assert encoded.pooled is not None
        return Pretraining(self.mlm(hidden, self.encoder.embeddings.word), self.nsp(encoded.pooled))


# The two-way table between the parameters and the released checkpoints' names.


def embeddings_entries(c: EncoderConfig, prefix: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the entries of `Embeddings`, with stored names under `prefix` and parameters at `path`."""
    tables = (("word", c.vocab_size), ("position", c.positions), ("token_type", c.token_types))
    at = (*path, "embeddings")
    return [
        *(
            Entry(f"{prefix}embeddings.{name}_embeddings.weight", (*at, name, "embedding"), same(size, c.table_width))
            for name, size in tables
        ),
        *norm_entries(f"{prefix}embeddings.LayerNorm", (*at, "norm"), c.table_width),
    ]


def encoder_entries(c: EncoderConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the encoder's entries, with stored names under `prefix` and parameters at `path`."""
    n, width, heads = c.layers, (c.width,), (c.heads, c.width // c.heads)
    layer, at = f"{prefix}encoder.layer.{{layer}}.", (*path, "layers")
    return [
        *embeddings_entries(c, prefix, path),
        *linear_entries(f"{layer}attention.self.query", (*at, "attention", "query"), width, heads, n),
        *linear_entries(f"{layer}attention.self.key", (*at, "attention", "key"), width, heads, n),
        *linear_entries(f"{layer}attention.self.value", (*at, "attention", "value"), width, heads, n),
        *linear_entries(f"{layer}attention.output.dense", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}attention.output.LayerNorm", (*at, "attention_norm"), c.width, n),
        *linear_entries(f"{layer}intermediate.dense", (*at, "feed_forward", "inner"), width, (c.feed_forward,), n),
        *linear_entries(f"{layer}output.dense", (*at, "feed_forward", "outer"), (c.feed_forward,), width, n),
        *norm_entries(f"{layer}output.LayerNorm", (*at, "feed_forward_norm"), c.width, n),
        *(linear_entries(f"{prefix}pooler.dense", (*path, "pooler"), width, width) if pooler else []),
    ]


PARTS = EncoderParts(
    Bert,
    encoder_entries,
    prefix="bert.",
    classes="Bert",
    renamed=((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias")),
)
FORMS = {
    "masked_lm": Form(
        names=(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias",
            "cls.predictions.decoder",
        )
    ),
    "classification": Form(pooler=True),
    "tokens": Form(),
    "span": Form(names=("qa_outputs",)),
    "choice": Form(pooler=True),
}


def _pretraining_table(c: BertConfig) -> Table:
    words, tied = masked_words_entries(c, FORMS["masked_lm"], PARTS)
    nsp = linear_entries("cls.seq_relationship", ("nsp",), (c.width,), (2,))
    return PARTS.table(c, [*words, *nsp], tied, pooler=True)


FAMILY = Family(
    config=BertConfig,
    title="BERT",
    paper="Devlin et al. 2018",
    tokenizers=("wordpiece",),
    architectures=architectures(
        PARTS, FORMS, [Architecture("BertForPreTraining", "pretraining", BertForPreTraining, _pretraining_table)]
    ),
    objectives=("mlm+nsp", "mlm"),
)
