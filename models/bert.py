"""BERT: a bidirectional encoder, pretrained on masked words and on whether two texts belong together.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; the small sizes
are Turc et al. 2019, "Well-Read Students Learn Better".

What marks it among its neighbours: layers normalised after each addition (post-norm), learnt absolute positions, a
third embedding for sentence A or B, a pooler (dense and tanh) on [CLS], and a decoder tied to the word embeddings.

New weights are drawn as in the released code: a normal distribution of standard deviation 0.02 cut off at two of them,
zeros for biases, ones for norms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from .checkpoints.config import Extra, read_fields, read_labels, write_fields, write_labels
from .checkpoints.tables import Architecture, Entry, Table, linear_entries, norm_entries, same
from .crf import Crf, crf_entries
from .heads import MaskedLanguageModelHead
from .layers import (
    ACTIVATIONS,
    Attention,
    Dropout,
    Embed,
    FeedForward,
    LayerNorm,
    Linear,
    Segments,
    gather_positions,
    row_numbers,
    run_layers,
)


@dataclass(frozen=True)
class BertConfig:
    """Sizes and settings of a BERT. The defaults are those of BERT-base, uncased."""

    vocab_size: int = 30_522
    """number of word pieces, V"""
    width: int = 768
    """size of the hidden states, E"""
    layers: int = 12
    """number of layers, N"""
    heads: int = 12
    """number of attention heads, H; must divide the width"""
    feed_forward: int = 3072
    """inner width of the feed-forward sub-layer, F"""
    positions: int = 512
    """longest example, in tokens"""
    token_types: int = 2
    """number of sentence kinds (A, B)"""
    activation: str = "gelu"
    """non-linearity, a name in layers.ACTIVATIONS"""
    dropout: float = 0.1
    """share of the hidden values dropped in training"""
    attention_dropout: float = 0.1
    """share of the attention probabilities dropped in training"""
    classifier_dropout: float | None = None
    """share of a classifier's inputs dropped in training; None for that of the hidden values"""
    norm_epsilon: float = 1e-12
    """added to the variance before its root"""
    initializer_range: float = 0.02
    """standard deviation of the normal distribution that new weights are drawn from, before it is cut off at two"""
    pad_token_id: int | None = 0
    """the token whose embedding takes no gradient from being looked up; None for none"""
    problem_type: str | None = None
    """what a sequence classifier predicts: regression, single_label_classification, multi_label_classification"""
    num_labels: int = 2
    """number of classes of a classifier"""
    label_names: tuple[str, ...] | None = None
    """the classes' names"""

    dtype: str = "float32"
    """what is computed in, float32 or bfloat16; parameters, norms, softmax and losses stay float32"""
    scan_layers: bool = True
    """compile one layer and loop over it; off writes all layers out (same numbers, longer compilation)"""
    remat: bool = False
    """recompute each layer's inner values in the backward pass: less memory, about a third more work"""
    attention_implementation: str | None = None
    """backend of kernels.attention; None takes the fastest"""

    extra: Extra = ()
    """what else config.json held, written back with it"""
    repeated: tuple[str, ...] = ()
    """tied copies and buffers that the checkpoint held, written back with it"""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"BertConfig: width {self.width} is not a multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"BertConfig: unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"BertConfig: dtype is float32 or bfloat16, not {self.dtype!r}")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"BertConfig: {self.num_labels} labels, but {len(self.label_names)} label names")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A released size, with changes to its fields: `BertConfig.preset("bert-mini", vocab_size=16_384)`."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r} of BERT; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The config of a parsed config.json; `ConfigError` names every setting that is not implemented."""
        fields, extra = read_fields(cls, stored, KEYS, REQUIRED)
        fields["num_labels"], fields["label_names"] = read_labels(stored)
        return cls(**fields, extra=tuple((key, text) for key, text in extra if key not in WRITTEN_ANEW))

    def to_json(self) -> dict[str, Any]:
        """The dictionary to write as config.json, without `architectures`, which are the model's to say."""
        stored = write_fields(self, KEYS) | write_labels(self.num_labels, self.label_names) | {"model_type": "bert"}
        if self.problem_type is None:
            del stored["problem_type"]
        return stored


KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
    "norm_epsilon": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
    "problem_type": "problem_type",
}
WRITTEN_ANEW = ("model_type", "architectures", "id2label", "label2id", "num_labels")
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": tuple(ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}


def _size(layers: int, width: int, vocab_size: int = 30_522) -> dict[str, int]:
    """Every released size has heads of 64 and a feed-forward width of four times its own."""
    return {
        "layers": layers,
        "width": width,
        "heads": width // 64,
        "feed_forward": 4 * width,
        "vocab_size": vocab_size,
        "positions": 512,
    }


PRESETS: Mapping[str, Mapping[str, int]] = {
    "bert-tiny": _size(2, 128),
    "bert-mini": _size(4, 256),
    "bert-small": _size(4, 512),
    "bert-medium": _size(8, 512),
    "bert-base": _size(12, 768),
    "bert-large": _size(24, 1024),
    "bert-base-cased": _size(12, 768, 28_996),
    "bert-large-cased": _size(24, 1024, 28_996),
}


def _init(config: BertConfig) -> Initializer:
    return nn.initializers.truncated_normal(config.initializer_range)


class Embeddings(nn.Module):
    """The sum of word, position and sentence vectors, normalised (Devlin et al. 2018, figure 2)."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        embed = partial(Embed, width=c.width, embedding_init=_init(c), dtype=c.dtype)
        self.word = embed(c.vocab_size, axis="vocab", padding_id=c.pad_token_id)
        self.position = embed(c.positions, axis="positions")
        self.token_type = embed(c.token_types, axis="types")
        self.norm = LayerNorm(c.norm_epsilon, dtype=c.dtype)
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        input_ids: Array,
        position_ids: Array | None,
        token_type_ids: Array | None,
        rows: Array,
        *,
        deterministic: bool,
    ) -> Array:
        length = input_ids.shape[1]
        if length > self.config.positions:
            raise ValueError(f"a row has {length} tokens, but the model has {self.config.positions} positions")
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

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Array,
        *,
        deterministic: bool,
    ) -> Array:
        """hidden [B, L, E] -> [B, L, E]."""
        c = self.config
        attention = Attention(
            c.width, c.heads, c.attention_dropout, _init(c), c.dtype, c.attention_implementation, name="attention"
        )
        feed_forward = FeedForward(c.feed_forward, c.activation, _init(c), c.dtype, name="feed_forward")

        attended = attention(hidden, segment_ids, rows, deterministic=deterministic)
        attended = Dropout(c.dropout)(attended, rows, deterministic=deterministic)
        hidden = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden + attended)
        fed = Dropout(c.dropout)(feed_forward(hidden), rows, deterministic=deterministic)
        return LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden + fed)


class Encoded(NamedTuple):
    """What the encoder gives."""

    hidden: Array  # [B, L, E], the last layer's; [B, X, E], of [CLS], where these alone were asked for
    pooled: Array | None  # [B, E], or [B, X, E] where positions of [CLS] were given; None without a pooler
    every_hidden: Array | None  # [N + 1, B, L, E], the embeddings and each layer's, where asked for


class Bert(nn.Module):
    """The encoder, with its pooler unless `pooler` is off."""

    config: BertConfig
    pooler: bool = True

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        self.layers = Block(c)
        if self.pooler:
            self.pool = Linear((c.width,), ("embed", "embed_out"), _init(c), c.dtype, name="pooler")

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        cls_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
        every_layer: bool = False,
        cls_only: bool = False,
    ) -> Encoded:
        """Encode rows of tokens.

        Args:
            input_ids: [B, L] int32.
            segment_ids: [B, L] int32, which packed example each token belongs to, 0 for padding; None for one example
                that fills the row. Attention never crosses segments. A pair gives queries and keys their own.
            position_ids: [B, L] int32, position within the example; None counts from 0 along the row.
            token_type_ids: [B, L] int32, sentence A (0) or B (1); None for all A.
            cls_positions: [B, X] int32, where each example's [CLS] stands; None for the row's first token alone.
            rows: [B] uint32, the rows' numbers, which with the stream "dropout" decide what is dropped; None counts
                from 0.
            deterministic: no dropout.
            every_layer: also return the embeddings and every layer's hidden states.
            cls_only: let the last layer compute [CLS] alone, all that a classifier reads: the same numbers, but
                for what dropout draws.
        """
        c = self.config
        rows = row_numbers(rows, input_ids)
        first = jnp.zeros((len(input_ids), 1), jnp.int32) if cls_positions is None else cls_positions
        embedded = self.embeddings(input_ids, position_ids, token_type_ids, rows, deterministic=deterministic)
        hidden, outputs = run_layers(
            self.layers,
            embedded,
            segment_ids,
            rows,
            count=c.layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
            every_layer=every_layer,
            last_positions=first if cls_only else None,
        )
        pooled = None
        if self.pooler:
            cls = hidden if cls_only and not self.is_initializing() else gather_positions(hidden, first)
            pooled = jnp.tanh(self.pool(cls[:, 0] if cls_positions is None else cls))
        every_hidden = None if outputs is None else jnp.concatenate([embedded[None], outputs])
        return Encoded(hidden, pooled, every_hidden)


class Pretraining(NamedTuple):
    """Logits of both pretraining tasks, in the compute dtype."""

    mlm_logits: Array  # [B, P, V], or [B, L, V] where no positions were given
    nsp_logits: Array  # [B, X, 2], or [B, 2] where no positions were given; class 0 is "the next sentence"


class BertForPreTraining(nn.Module):
    """The encoder with both pretraining heads: masked language model and next sentence prediction."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Bert(c)
        self.mlm = MaskedLanguageModelHead(c.activation, c.norm_epsilon, _init(c), c.dtype)
        self.nsp = Linear((2,), ("embed", "labels"), _init(c), c.dtype)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        mlm_positions: Array | None = None,
        cls_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Pretraining:
        """As `Bert`, and mlm_positions [B, P] int32, where words are predicted; None for every position."""
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


class BertForMaskedLM(nn.Module):
    """The encoder, without its pooler, and the masked language model head. Gives logits as `Pretraining.mlm_logits`."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Bert(c, pooler=False)
        self.mlm = MaskedLanguageModelHead(c.activation, c.norm_epsilon, _init(c), c.dtype)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        mlm_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """As `BertForPreTraining`."""
        hidden = self.encoder(
            input_ids, segment_ids, position_ids, token_type_ids, rows=rows, deterministic=deterministic
        ).hidden
        if mlm_positions is not None:
            hidden = gather_positions(hidden, mlm_positions)
        return self.mlm(hidden, self.encoder.embeddings.word)


def _classifier(config: BertConfig, classes: int) -> Linear:
    return Linear((classes,), ("embed", "labels"), _init(config), config.dtype)


def _classifier_dropout(config: BertConfig) -> Dropout:
    return Dropout(config.dropout if config.classifier_dropout is None else config.classifier_dropout)


class BertForSequenceClassification(nn.Module):
    """Classes, or one number (regression), of whole examples, from the pooled [CLS] (Devlin et al. 2018, 4.1)."""

    config: BertConfig

    def setup(self) -> None:
        self.encoder = Bert(self.config)
        self.drop = _classifier_dropout(self.config)
        self.classifier = _classifier(self.config, self.config.num_labels)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        cls_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """As `Bert` -> logits [B, num_labels], or [B, X, num_labels] where cls_positions are given."""
        rows = row_numbers(rows, input_ids)
        pooled = self.encoder(
            input_ids,
            segment_ids,
            position_ids,
            token_type_ids,
            cls_positions=cls_positions,
            rows=rows,
            deterministic=deterministic,
            cls_only=True,
        ).pooled
        assert pooled is not None
        return self.classifier(self.drop(pooled, rows, deterministic=deterministic))


class BertForMultipleChoice(nn.Module):
    """A score for each of several continuations, from the pooled [CLS] (Devlin et al. 2018, 4.4)."""

    config: BertConfig

    def setup(self) -> None:
        self.encoder = Bert(self.config)
        self.drop = _classifier_dropout(self.config)
        self.classifier = _classifier(self.config, 1)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        cls_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """As `BertForSequenceClassification`, one example a choice -> scores [B], or [B, X]."""
        rows = row_numbers(rows, input_ids)
        pooled = self.encoder(
            input_ids,
            segment_ids,
            position_ids,
            token_type_ids,
            cls_positions=cls_positions,
            rows=rows,
            deterministic=deterministic,
            cls_only=True,
        ).pooled
        assert pooled is not None
        return self.classifier(self.drop(pooled, rows, deterministic=deterministic))[..., 0]


class BertForTokenClassification(nn.Module):
    """Classes of single tokens (Devlin et al. 2018, 5.3), with the parameters of a CRF over them where `crf` is on."""

    config: BertConfig
    crf: bool = False

    def setup(self) -> None:
        self.encoder = Bert(self.config, pooler=False)
        self.drop = _classifier_dropout(self.config)
        self.classifier = _classifier(self.config, self.config.num_labels)
        if self.crf:
            self.chain = Crf(self.config.num_labels, name="crf")

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """As `Bert` -> logits [B, L, num_labels], which are the emissions where there is a CRF."""
        rows = row_numbers(rows, input_ids)
        if self.crf:
            self.chain()  # makes the parameters; models.crf reads them from the tree, params["crf"]
        hidden = self.encoder(
            input_ids, segment_ids, position_ids, token_type_ids, rows=rows, deterministic=deterministic
        ).hidden
        return self.classifier(self.drop(hidden, rows, deterministic=deterministic))


class BertForQuestionAnswering(nn.Module):
    """Scores of each token to be an answer's first and its last (Devlin et al. 2018, 4.2)."""

    config: BertConfig

    def setup(self) -> None:
        self.encoder = Bert(self.config, pooler=False)
        self.span = _classifier(self.config, 2)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array]:
        """As `Bert` -> (start logits [B, L], end logits [B, L])."""
        hidden = self.encoder(
            input_ids, segment_ids, position_ids, token_type_ids, rows=rows, deterministic=deterministic
        ).hidden
        logits = self.span(hidden)
        return logits[..., 0], logits[..., 1]


# The two-way table between the parameters and the released checkpoints' names.


def encoder_entries(c: BertConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """The encoder's entries, stored under `prefix` and found at `path`."""
    n, width, heads = c.layers, (c.width,), (c.heads, c.width // c.heads)
    layer, at = f"{prefix}encoder.layer.{{layer}}.", (*path, "layers")
    embeddings = [
        Entry(
            f"{prefix}embeddings.{name}_embeddings.weight",
            (*path, "embeddings", name, "embedding"),
            same(size, c.width),
        )
        for name, size in (("word", c.vocab_size), ("position", c.positions), ("token_type", c.token_types))
    ]
    return [
        *embeddings,
        *norm_entries(f"{prefix}embeddings.LayerNorm", (*path, "embeddings", "norm"), c.width),
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


def _mlm_entries(c: BertConfig) -> list[Entry]:
    return [
        *linear_entries("cls.predictions.transform.dense", ("mlm", "transform"), (c.width,), (c.width,)),
        *norm_entries("cls.predictions.transform.LayerNorm", ("mlm", "norm"), c.width),
        Entry("cls.predictions.bias", ("mlm", "bias"), same(c.vocab_size)),
    ]


def checkpoint_table(model: nn.Module) -> Table:
    """The table of one of this file's models."""
    c: BertConfig = model.config  # type: ignore[attr-defined]
    tied = {}
    match model:
        case Bert():
            entries = encoder_entries(c, "", (), pooler=model.pooler)
        case BertForPreTraining() | BertForMaskedLM():
            pretraining = isinstance(model, BertForPreTraining)
            entries = [*encoder_entries(c, "bert.", ("encoder",), pooler=pretraining), *_mlm_entries(c)]
            if pretraining:
                entries += linear_entries("cls.seq_relationship", ("nsp",), (c.width,), (2,))
            tied = {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            }
        case BertForSequenceClassification() | BertForMultipleChoice() | BertForTokenClassification():
            classes = 1 if isinstance(model, BertForMultipleChoice) else c.num_labels
            entries = encoder_entries(
                c, "bert.", ("encoder",), pooler=not isinstance(model, BertForTokenClassification)
            )
            entries += linear_entries("classifier", ("classifier",), (c.width,), (classes,))
            if isinstance(model, BertForTokenClassification) and model.crf:
                entries += crf_entries(c.num_labels)
        case BertForQuestionAnswering():
            entries = encoder_entries(c, "bert.", ("encoder",), pooler=False)
            entries += linear_entries("qa_outputs", ("span",), (c.width,), (2,))
        case _:
            raise TypeError(f"not a model of BERT: {type(model).__name__}")
    prefix = "" if isinstance(model, Bert) else "bert."
    return Table(
        tuple(entries),
        prefix="bert.",
        renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
        tied=tied,
        buffers={f"{prefix}embeddings.position_ids": np.arange(c.positions)[None]},
    )


def is_encoder_parameter(path: tuple[str, ...]) -> bool:
    """Whether every BERT has this parameter: one of the embeddings or of the layers, not of a pooler or head."""
    return path[0] in ("embeddings", "layers") or path[:2] in (("encoder", "embeddings"), ("encoder", "layers"))


def _without_pooler(config: BertConfig) -> Bert:
    return Bert(config, pooler=False)


def _with_crf(config: BertConfig) -> BertForTokenClassification:
    return BertForTokenClassification(config, crf=True)


# What a config.json may call a model, in the order in which a checkpoint without a name is tried.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("BertModel", "encoder", Bert),
    Architecture("BertModel", "encoder", _without_pooler),
    Architecture("BertForPreTraining", "pretraining", BertForPreTraining),
    Architecture("BertForMaskedLM", "masked_lm", BertForMaskedLM),
    Architecture("BertForSequenceClassification", "classification", BertForSequenceClassification),
    Architecture("BertForTokenClassification", "tokens", BertForTokenClassification),
    Architecture("BertForTokenClassification", "crf", _with_crf),
    Architecture("BertForQuestionAnswering", "span", BertForQuestionAnswering),
    Architecture("BertForMultipleChoice", "choice", BertForMultipleChoice),
)
config_from_json: Callable[[Mapping[str, Any]], BertConfig] = BertConfig.from_json
