"""A tagger before the Transformer: LSTMs of both directions over word vectors, and over a frozen encoder's states.

Huang et al. 2015, "Bidirectional LSTM-CRF Models for Sequence Tagging"; with the states of an ELMo as in Peters et al.
2018, 3.3: a word's vector is extended by a trained mix of the encoder's layers.

The frozen encoder is no part of the model. Its states come with the batch, `features`, since they never change: they
are computed once. A state starts anew at every example of a packed row.

    logits = model.apply({"params": params}, input_ids, segment_ids, position_ids, features)     # [B, L, C]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.config import read_labels, write_labels
from ..checkpoints.tables import Entry, same
from ..encoder import Encoded
from ..family import Family, FamilyConfig
from ..heads.pooling import mix
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.dropout import Dropout
from ..layers.linear import Embed, partitioned
from ..layers.segments import Rows, row_numbers
from .recurrence import CellWeights, cell_entries, read_rows

CELL = "lstm"


@dataclass(frozen=True)
class BiLstmConfig(FamilyConfig):
    """Sizes and settings. The defaults are those of Peters et al. 2018 (A.4), with one layer."""

    MODEL_TYPE: ClassVar[str] = "bilstm"
    SIZES: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "embedding_width", "width", "layers", "features", "dropout", "initializer_range"),
    )
    KEYS: ClassVar[Mapping[str, str]] = {name: name for name in SIZES}
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = ("model_type", "architectures", "id2label", "label2id", "num_labels")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bilstm": {}}

    vocab_size: int = 20_000
    """number of words, V"""
    embedding_width: int = 100
    """size of the vectors of words"""
    width: int = 400
    """size of a layer's output of both directions together, E"""
    layers: int = 1
    """number of layers, N"""
    features: tuple[int, ...] = ()
    """number K of a frozen encoder's layers, and the size F of their states; (): there is no such encoder"""
    dropout: float = 0.5
    """dropout rate of each layer's input and of the output"""
    initializer_range: float = 0.1
    """standard deviation of new vectors of words"""
    num_labels: int = 2
    """number of classes"""
    label_names: tuple[str, ...] | None = None
    """names of the classes"""

    sets: ClassVar[None] = None  # each layer has parameters of its own
    token_types: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.width % 2:
            raise ValueError(f"{name}: width {self.width} is that of two directions, and must be even")
        if self.features and (len(self.features) != 2 or min(self.features) < 1):
            raise ValueError(f"{name}: features are a number of layers and a size, not {list(self.features)}")
        if self.remat or self.attention_implementation is not None:
            what = "remat" if self.remat else "an attention backend"
            raise ValueError(f"{name}: a recurrent model has no use for {what}; leave it out")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"{name}: {self.num_labels} labels, but {len(self.label_names)} label names")

    @property
    def inputs(self) -> int:
        """Size of the first layer's input."""
        return self.embedding_width + sum(self.features[1:])

    @property
    def initializer(self) -> Initializer:
        """Initialiser of the head's last linear map, and of new vectors of words."""
        return nn.initializers.truncated_normal(self.initializer_range)

    head_initializer = initializer

    @property
    def size_in_words(self) -> str:
        """Number of layers, to display."""
        return f"{self.layers} layers in both directions"

    def head_dropout(self, head: str) -> float:
        """Return the dropout rate of the inputs of a head's last linear map."""
        del head
        return self.dropout

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """Return the fields to change for this dropout rate throughout the model."""
        return {"dropout": rate}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        count, names = read_labels(stored)
        return super().from_json(stored, num_labels=count, label_names=names, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        return super().to_json() | write_labels(self.num_labels, self.label_names)


class Embeddings(nn.Module):
    """The vectors of words."""

    config: BiLstmConfig

    def setup(self) -> None:
        c = self.config
        self.word = Embed(c.vocab_size, c.embedding_width, "vocab", c.initializer)


class Mix(nn.Module):
    """γ times the mean of the layers' states, by trained weights (Peters et al. 2018, formula 1)."""

    layers: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Mix [..., K, F] -> [..., F]. At first it is the plain mean."""
        weights = self.param("bias", partitioned(nn.initializers.zeros_init(), "layers"), (self.layers,))
        gamma = self.param("scale", partitioned(nn.initializers.ones_init(), "layers"), (1,))
        return mix(features, weights, gamma[0])


class Layers(nn.Module):
    """Layers of both directions, each over the one below."""

    config: BiLstmConfig

    def setup(self) -> None:
        c = self.config
        sizes = [c.inputs] + [c.width] * (c.layers - 1)
        self.forward = [CellWeights(CELL, size, c.width // 2) for size in sizes]
        self.backward = [CellWeights(CELL, size, c.width // 2) for size in sizes]
        self.drop = Dropout(c.dropout)

    def __call__(self, hidden: Array, segment_ids: Array, rows: Rows, *, deterministic: bool) -> Array:
        """Read [B, L, I] -> [B, L, E] float32."""
        for forward, backward in zip(self.forward, self.backward, strict=True):
            hidden = self.drop(hidden, rows, deterministic=deterministic)
            read = partial(read_rows, CELL, inputs=hidden, segment_ids=segment_ids, dtype=self.config.dtype)
            both = read(weights=forward(), reverse=False)[0], read(weights=backward(), reverse=True)[0]
            hidden = jnp.concatenate(both, axis=-1)
        return hidden


class BiLstm(nn.Module):
    """The tagger without its head."""

    config: BiLstmConfig

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        if c.features:
            self.mix = Mix(c.features[0])
        self.layers = Layers(c)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Array | None = None,
        position_ids: Array | None = None,
        features: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Encoded:
        """Read rows of words.

        Args:
            input_ids: [B, L] int32.
            segment_ids: [B, L] int32, which packed example each word belongs to; None for one that fills the row.
            position_ids: [B, L] int32, not read.
            features: [B, L, K, F] float32, the frozen encoder's states of each word; None if the config has none.
            rows: what determines what is dropped; see `layers.Dropout`.
            deterministic: disable dropout.

        Raises:
            ValueError: there are states and the config has none, or the other way round.
        """
        del position_ids
        if (features is None) == bool(self.config.features):
            raise ValueError(f"BiLstm: features of {list(self.config.features)} in the config, {features} in the batch")
        segments = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids
        words = self.embeddings.word(input_ids)
        if features is not None:
            words = jnp.concatenate([words, self.mix(features)], axis=-1)
        hidden = self.layers(words, segments, row_numbers(rows, input_ids), deterministic=deterministic)
        return Encoded(hidden, hidden[:, 0], None, None)


def example(c: BiLstmConfig) -> tuple[Any, ...]:
    """Return the shapes of the inputs for initialising a model."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return (ids, ids, ids, jax.ShapeDtypeStruct((1, 1, *c.features), jnp.float32)) if c.features else (ids,)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def encoder_entries(c: BiLstmConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the entries of a model, with the names of `torch.nn.LSTM` and of AllenNLP's mix; there is no pooler."""
    del pooler
    entries = [
        Entry(
            f"{prefix}words.weight", (*path, "embeddings", "word", "embedding"), same(c.vocab_size, c.embedding_width)
        )
    ]
    if c.features:
        entries.append(Entry(f"{prefix}scalar_mix.weights", (*path, "mix", "bias"), same(c.features[0])))
        entries.append(Entry(f"{prefix}scalar_mix.gamma", (*path, "mix", "scale"), same(1)))
    for layer in range(c.layers):
        inputs = c.width if layer else c.inputs
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            at = (*path, "layers", f"{direction}_{layer}")
            entries += cell_entries(CELL, f"{prefix}lstm", f"l{layer}{suffix}", at, inputs, c.width // 2)
    return entries


PARTS = EncoderParts(*(BiLstm, encoder_entries, "", "BiLstm"), pooler=False, buffers=lambda config, prefix: {})
FAMILY = Family(
    config=BiLstmConfig,
    title="BiLSTM tagger",
    paper="Huang et al. 2015, Peters et al. 2018",
    # It reads sentences that are split into words, with their tags: there is no use for the encoder alone.
    architectures=tuple(a for a in architectures(PARTS, {"tokens": Form()}) if a.head != "encoder"),
    tokenizers=("words",),
    example=example,
    below=("embeddings", "mix"),
)
