"""ALBERT: BERT with one set of parameters for all layers, and small word vectors.

Lan et al. 2019, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations".

What sets it apart from its neighbours: layers share parameters, all of them or in groups; word, position and sentence
vectors are smaller than the hidden states, and a linear map leads from one size to the other (3.1); masked words are
predicted in the smaller size; the second pretraining task is whether two texts are in order (SOP) instead of whether
they belong together; GELU by its tanh approximation. Version 2 of the released models was trained without dropout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, Table, linear_entries, norm_entries
from ..encoder import Encoder
from ..family import Architecture, EncoderConfig, Family
from ..heads.with_head import EncoderParts, Form, architectures, masked_words, masked_words_entries
from ..layers.dropout import Dropout
from ..layers.linear import Linear
from ..layers.segments import Rows, Segments, gather_positions, row_numbers, rows_at
from .bert import Block, Embeddings, embeddings_entries


def _size(layers: int, width: int, heads: int, dropout: float = 0.0) -> dict[str, Any]:
    """Return the fields of a size: word vectors of 128, four times the width in feed-forward, one set of parameters."""
    size = {"layers": layers, "width": width, "heads": heads, "feed_forward": 4 * width}
    return {**size, "dropout": dropout, "attention_dropout": dropout}


@dataclass(frozen=True)
class AlbertConfig(EncoderConfig):
    """Sizes and settings of an ALBERT. The defaults are the reference implementation's, for keys that a file lacks."""

    MODEL_TYPE: ClassVar[str] = "albert"
    KEYS: ClassVar[Mapping[str, str]] = {
        **EncoderConfig.KEYS,
        "classifier_dropout": "classifier_dropout_prob",
        "embedding_size": "embedding_size",
        "groups": "num_hidden_groups",
        "inner": "inner_group_num",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.REQUIRED,
        # Experiments of the authors, off in all released files.
        "net_structure_type": (0,),
        "gap_size": (0,),
        "num_memory_blocks": (0,),
        "down_scale_factor": (1,),
        "layers_to_keep": ([],),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The two small sizes are BERT's (Turc et al. 2019): the paper has base to xxlarge.
        "albert-tiny": _size(2, 128, 2),
        "albert-mini": _size(4, 256, 4),
        "albert-base": _size(12, 768, 12),
        "albert-large": _size(24, 1024, 16),
        "albert-xlarge": _size(24, 2048, 16),
        "albert-xxlarge": _size(12, 4096, 64),
        "albert-base-v1": _size(12, 768, 12, dropout=0.1),
        "albert-large-v1": _size(24, 1024, 16, dropout=0.1),
        "albert-xlarge-v1": _size(24, 2048, 16, dropout=0.1),
        "albert-xxlarge-v1": _size(12, 4096, 64),
    }

    vocab_size: int = 30_000
    width: int = 4096
    heads: int = 64
    feed_forward: int = 16_384
    token_types: int = 2
    activation: str = "gelu_new"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = 0.1
    embedding_size: int = 128
    """size of the word, position and sentence vectors"""
    groups: int = 1
    """number of groups of consecutive layers that share parameters"""
    inner: int = 1
    """number of sets of parameters in a group, which its layers take in turn; must divide the number of layers"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner < 1 or self.layers % self.inner:
            raise ValueError(f"AlbertConfig: {self.layers} layers are not a multiple of inner layers {self.inner}")
        if not 1 <= self.groups <= self.layers // self.inner:
            most = self.layers // self.inner
            raise ValueError(f"AlbertConfig: expected 1 to {most} groups of layers, found {self.groups}")

    @property
    def table_width(self) -> int:
        """Size of the vectors of words, positions and token types."""
        return self.embedding_size

    @property
    def sets(self) -> tuple[int, ...]:
        """Number of the set of parameters that each layer uses."""
        rounds = self.layers // self.inner / self.groups
        return tuple(
            int(layer // self.inner / rounds) * self.inner + layer % self.inner for layer in range(self.layers)
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`. The file counts rounds of `inner` layers, this class layers."""
        rounds, inner = stored.get("num_hidden_layers", cls.layers), stored.get("inner_group_num", cls.inner)
        if isinstance(rounds, int) and isinstance(inner, int) and inner > 0:
            stored = {**stored, "num_hidden_layers": rounds * inner}
        return super().from_json(stored, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        return super().to_json() | {"num_hidden_layers": self.layers // self.inner}


class Albert(Encoder):
    """The encoder, with its pooler unless `pooler` is off."""

    config: AlbertConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        self.project = Linear((c.width,), ("embed", "embed_out"), c.initializer, c.dtype)
        self.layers = Block(c)
        if self.pooler:
            self.pool = self.make_pooler()

    def enter(self, embedded: Array) -> Array:
        """Compute the input of the first layer [B, L, E] from the embeddings."""
        return self.project(embedded)


class Pretraining(NamedTuple):
    """Logits of both pretraining tasks, in the compute dtype."""

    mlm_logits: Array  # [B, P, V], or [B, L, V] if no positions were given
    sop_logits: Array  # [B, X, 2], or [B, 2] if no positions were given; class 1 is "swapped"


class AlbertForPreTraining(nn.Module):
    """The encoder with both pretraining heads: masked language model and sentence order prediction (3.1)."""

    config: AlbertConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Albert(c)
        self.mlm = masked_words(c, FORMS["masked_lm"])
        self.drop = Dropout(c.head_dropout("sop"))
        self.sop = Linear((2,), ("embed", "labels"), c.initializer, c.dtype)

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
        """Compute both tasks' logits. Arguments as for `Albert`, and these.

        Args:
            mlm_positions: [B, P] int32, the positions to predict; None for every position.
        """
        rows = row_numbers(rows, input_ids)
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
        own = rows_at(rows, jnp.zeros(len(input_ids), jnp.int32) if cls_positions is None else cls_positions)
        order = self.sop(self.drop(encoded.pooled, own, deterministic=deterministic))
        return Pretraining(self.mlm(hidden, self.encoder.embeddings.word), order)


def encoder_entries(c: AlbertConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the encoder's entries, with stored names under `prefix` and parameters at `path`."""
    n, width, heads = c.groups * c.inner, (c.width,), (c.heads, c.width // c.heads)
    layer, at = f"{prefix}encoder.albert_layer_groups.{{layer}}.albert_layers.{{inner}}.", (*path, "layers")
    stack = [
        *linear_entries(f"{layer}attention.query", (*at, "attention", "query"), width, heads, n),
        *linear_entries(f"{layer}attention.key", (*at, "attention", "key"), width, heads, n),
        *linear_entries(f"{layer}attention.value", (*at, "attention", "value"), width, heads, n),
        *linear_entries(f"{layer}attention.dense", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}attention.LayerNorm", (*at, "attention_norm"), c.width, n),
        *linear_entries(f"{layer}ffn", (*at, "feed_forward", "inner"), width, (c.feed_forward,), n),
        *linear_entries(f"{layer}ffn_output", (*at, "feed_forward", "outer"), (c.feed_forward,), width, n),
        *norm_entries(f"{layer}full_layer_layer_norm", (*at, "feed_forward_norm"), c.width, n),
    ]
    return [
        *embeddings_entries(c, prefix, path),
        *linear_entries(f"{prefix}encoder.embedding_hidden_mapping_in", (*path, "project"), (c.embedding_size,), width),
        *(entry._replace(inner=c.inner) for entry in stack),
        *(linear_entries(f"{prefix}pooler", (*path, "pooler"), width, width) if pooler else []),
    ]


PARTS = EncoderParts(Albert, encoder_entries, prefix="albert.", classes="Albert")
FORMS = {
    "masked_lm": Form(names=("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder")),
    "classification": Form(pooler=True),
    "tokens": Form(),
    "span": Form(names=("qa_outputs",)),
    "choice": Form(pooler=True),
}


def _pretraining_table(c: AlbertConfig) -> Table:
    words, tied = masked_words_entries(c, FORMS["masked_lm"], PARTS)
    sop = linear_entries("sop_classifier.classifier", ("sop",), (c.width,), (2,))
    return PARTS.table(c, [*words, *sop], tied, pooler=True)


FAMILY = Family(
    config=AlbertConfig,
    title="ALBERT",
    paper="Lan et al. 2019",
    tokenizers=("unigram",),
    architectures=architectures(
        PARTS, FORMS, [Architecture("AlbertForPreTraining", "pretraining", AlbertForPreTraining, _pretraining_table)]
    ),
    objectives=("mlm+sop", "mlm"),
    below=("embeddings", "project"),
)
