"""T5: an encoder and a decoder for which every task is text to text; versions 1.0 and 1.1, and mT5.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"; Xue et al.
2021, "mT5".

What sets it apart from the Transformer: positions are a bias of the attention scores by distance, one table for all
layers of a stack and none between decoder and encoder (2.1); each sub-layer's input is normalised, by its root mean
square, without mean or bias; no map has a bias; scores are not divided by sqrt(D), which the initialisation makes up
for. Version 1.0 has ReLU, and shares the output embeddings with those of the words, the logits divided by sqrt(E).
Version 1.1, whose config is mT5's too, has a gated GELU (Shazeer 2020) and output embeddings of its own, undivided.

The released vocabularies have 32,000 pieces and 100 sentinels; the tables are padded to 32,128 rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
from jax import Array

from ...kernels.bias import RelativeBias
from ..checkpoints.config import ConfigError
from ..checkpoints.tables import Entry, Table, linear_entries, norm_entries, same
from ..encoder_decoder import TOKEN_KEYS, EncoderDecoder, EncoderDecoderConfig, Side
from ..family import Architecture, Family
from ..incremental import Slots
from ..layers.activations import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed
from ..layers.norms import RMSNorm
from ..layers.positions import RelativePositions, bias_of_slots
from ..layers.segments import Rows, Segments

RELU, GATED = "relu", "gated-gelu"
TIED, SCALED = "tie_word_embeddings", "scale_decoder_outputs"


def _size(layers: int, width: int, heads: int, feed_forward: int, head_size: int = 64, **more: Any) -> dict[str, Any]:
    sizes = {"encoder_layers": layers, "decoder_layers": layers, "width": width, "heads": heads}
    return {**sizes, "feed_forward": feed_forward, "head_size": head_size, **more}


V1_1: Mapping[str, Any] = {"projection": GATED, "tied": False, "scale_outputs": False}


@dataclass(frozen=True)
class T5Config(EncoderDecoderConfig):
    """Sizes and settings of a T5 model. The defaults are those of T5 1.0 small."""

    MODEL_TYPE: ClassVar[str] = "t5"
    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "width": "d_model",
        "encoder_layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "heads": "num_heads",
        "head_size": "d_kv",
        "feed_forward": "d_ff",
        "projection": "feed_forward_proj",
        "buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "norm_epsilon": "layer_norm_epsilon",
        "dropout": "dropout_rate",
        **TOKEN_KEYS,
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderDecoderConfig.REQUIRED,
        "is_decoder": (False,),
        TIED: (True, False),
        SCALED: (True, False),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (
        *EncoderDecoderConfig.WRITTEN_ANEW,
        *(TIED, SCALED, "dense_act_fn", "is_gated_act"),
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "t5-tiny": _size(4, 128, 4, 512, head_size=32),  # not released: to try things out
        "t5-small": _size(6, 512, 8, 2048),
        "t5-base": _size(12, 768, 12, 3072),
        "t5-large": _size(24, 1024, 16, 4096),
        "t5-3b": _size(24, 1024, 32, 16_384, head_size=128),
        "t5-11b": _size(24, 1024, 128, 65_536, head_size=128),
        "t5-v1_1-small": _size(8, 512, 6, 1024, **V1_1),
        "t5-v1_1-base": _size(12, 768, 12, 2048, **V1_1),
        "t5-v1_1-large": _size(24, 1024, 16, 2816, **V1_1),
        "t5-v1_1-xl": _size(24, 2048, 32, 5120, **V1_1),
        "t5-v1_1-xxl": _size(24, 4096, 64, 10_240, **V1_1),
    }

    vocab_size: int = 32_128
    heads: int = 8
    """number of attention heads, H"""
    head_size: int = 64
    """size of a head, D, which need not be E / H"""
    feed_forward: int = 2048
    """inner width of the feed-forward sub-layers, F"""
    projection: str = RELU
    """feed-forward sub-layers: the name of an activation in layers.ACTIVATIONS, or gated-NAME; gated-gelu is that by
    tanh"""
    buckets: int = 32
    """number of buckets of distances"""
    max_distance: int = 128
    """distance in tokens from which on all distances share the last bucket"""
    norm_epsilon: float = 1e-6
    """epsilon of normalisation, added to the mean square"""
    tied: bool = True
    """share the output embeddings with those of the words"""
    scale_outputs: bool = True
    """divide the logits by sqrt(E)"""
    shared_dropout: bool = False
    """drop the same channels at all positions of a row, and the same keys for all queries, as the authors' training
    does; off: each position by itself, as in the reference implementation"""
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"{type(self).__name__}: projection (feed_forward_proj in config.json): expected an activation or "
                f"gated- and one, of {known}; found {self.projection!r}"
            )
        if self.buckets % 2:
            raise ValueError(f"{type(self).__name__}: buckets is {self.buckets}; expected an even number")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward sub-layers have a gate."""
        return self.projection.startswith("gated-")

    @property
    def activation(self) -> str:
        """Name of the feed-forward sub-layers' activation in layers.ACTIVATIONS."""
        return "gelu_new" if self.projection == GATED else self.projection.removeprefix("gated-")

    @property
    def decoder_heads(self) -> int:
        """Number of attention heads of the decoder."""
        return self.heads

    @classmethod
    def vocabulary_fields(cls, size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """See `EncoderConfig.vocabulary_fields`. The table is padded to a multiple of 128 rows."""
        tokens = {f"{role}_token_id": ids[role] for role in ("pad", "eos") if role in ids}
        return {"vocab_size": -(-size // 128) * 128, **tokens, "decoder_start_token_id": ids.get("pad", 0)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`. Without `num_decoder_layers` there are as many as of the encoder."""
        layers = stored.get("num_decoder_layers")
        if layers is None:
            layers = stored.get("num_layers", cls.encoder_layers)
        tied = stored.get(TIED, True)
        scaled = stored.get(SCALED, tied)
        return super().from_json(
            {**stored, "num_decoder_layers": layers}, **{"tied": tied, "scale_outputs": scaled} | more
        )

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        words = {"dense_act_fn": self.activation, "is_gated_act": self.gated}
        return super().to_json() | {TIED: self.tied, SCALED: self.scale_outputs} | words


@dataclass(frozen=True)
class MT5Config(T5Config):
    """Sizes and settings of an mT5 model: T5 1.1's, with a vocabulary of 101 languages."""

    MODEL_TYPE: ClassVar[str] = "mt5"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mt5-small": _size(8, 512, 6, 1024),
        "mt5-base": _size(12, 768, 12, 2048),
        "mt5-large": _size(24, 1024, 16, 2816),
        "mt5-xl": _size(24, 2048, 32, 5120),
        "mt5-xxl": _size(24, 4096, 64, 10_240),
    }

    vocab_size: int = 250_112
    projection: str = GATED
    tied: bool = False
    scale_outputs: bool = False

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        defaults = {"feed_forward_proj": GATED, SCALED: False}
        if stored.get(SCALED):
            raise ConfigError(f"config.json:\n  {SCALED}: only false is implemented for mT5, found true")
        return super().from_json({**defaults, **stored}, **more)


def _attention(c: T5Config, *, causal: bool = False) -> Attention:
    """Build attention whose initial queries make up for the missing 1/sqrt(D) (mesh TensorFlow's attention.py)."""
    normal = nn.initializers.normal
    return Attention(
        c.width,
        c.heads,
        c.dropout,
        normal(c.width**-0.5),
        c.dtype,
        c.attention_implementation,
        causal,
        head_size=c.head_size,
        use_bias=False,
        out_bias=False,
        scale=1.0,
        out_init=normal((c.heads * c.head_size) ** -0.5),
        query_init=normal((c.width * c.head_size) ** -0.5),
        shared_dropout=c.shared_dropout,
    )


def _feed_forward(c: T5Config) -> FeedForward:
    normal = nn.initializers.normal
    return FeedForward(
        c.feed_forward,
        c.activation,
        normal(c.width**-0.5),
        c.dtype,
        c.dropout,
        gated=c.gated,
        use_bias=False,
        out_init=normal(c.feed_forward**-0.5),
        shared_dropout=c.shared_dropout,
    )


class EncoderBlock(nn.Module):
    """One layer of the encoder: self-attention, then feed-forward, each of the normalised sum so far (2.1)."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.attention = _attention(c)
        self.attention_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.feed_forward = _feed_forward(c)
        self.feed_forward_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.drop = Dropout(c.dropout, c.shared_dropout)

    def __call__(
        self, hidden: Array, segment_ids: Segments, rows: Rows, bias: RelativeBias, *, deterministic: bool
    ) -> Array:
        mode = {"rows": rows, "deterministic": deterministic}
        attended = self.attention(self.attention_norm(hidden), segment_ids, bias=bias, **mode)
        hidden = hidden + self.drop(attended, **mode)
        return hidden + self.drop(self.feed_forward(self.feed_forward_norm(hidden), **mode), **mode)


class DecoderBlock(nn.Module):
    """One layer of the decoder: self-attention to earlier tokens, attention to the encoder, feed-forward (2.1)."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.attention = _attention(c, causal=True)
        self.attention_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.cross_attention = _attention(c)
        self.cross_attention_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.feed_forward = _feed_forward(c)
        self.feed_forward_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.drop = Dropout(c.dropout, c.shared_dropout)

    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        memory: Array,
        cross_segments: Segments,
        rows: Rows,
        bias: RelativeBias,
        *,
        deterministic: bool,
    ) -> Array:
        mode = {"rows": rows, "deterministic": deterministic}
        attended = self.attention(self.attention_norm(hidden), segment_ids, bias=bias, **mode)
        hidden = hidden + self.drop(attended, **mode)
        attended = self.cross_attention(self.cross_attention_norm(hidden), cross_segments, memory=memory, **mode)
        hidden = hidden + self.drop(attended, **mode)
        return hidden + self.drop(self.feed_forward(self.feed_forward_norm(hidden), **mode), **mode)

    def step(
        self,
        hidden: Array,
        memory: tuple[Array, Array],
        memory_mask: Array,
        cache: Slots,
        places: Array,
        mask: Array,
        bias: Array,
    ) -> tuple[Array, Slots, Array]:
        """Apply the layer to one token of each beam, for `IncrementalEncoderDecoder.step`.

        Returns:
            (hidden [B, K, E], the cache, the attention to the encoder [B, H, K, S])
        """
        normed = self.attention_norm(hidden)
        cache = Slots(*self.attention.write(normed, *cache, places))
        hidden = hidden + self.attention.step(normed, *cache, mask, bias=bias)[0]
        attended, probabilities = self.cross_attention.step(self.cross_attention_norm(hidden), *memory, memory_mask)
        hidden = hidden + attended
        return hidden + self.feed_forward(self.feed_forward_norm(hidden)), cache, probabilities

    def keys_values(self, memory: Array) -> Slots:
        """Compute keys and values of the encoder's output [B, S, E]."""
        return Slots(*self.cross_attention.keys_values(memory))


class T5(EncoderDecoder):
    """Encoder and decoder, each with its table of relative positions and a norm after its last layer."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal
        table = partial(Embed, c.vocab_size, c.width, "vocab", dtype=c.dtype)
        self.source = table(normal(1.0))
        if not c.tied:
            self.output = table(normal(c.width**-0.5))  # of t5x; the reference implementation's is 1
        places = partial(
            RelativePositions,
            c.heads,
            table_init=normal(c.width**-0.5),
            buckets=c.buckets,
            max_distance=c.max_distance,
        )
        self.encoder_positions = places(bidirectional=True)
        self.decoder_positions = places(bidirectional=False)
        self.encoder, self.decoder = EncoderBlock(c), DecoderBlock(c)
        self.encoder_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.decoder_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.drop = Dropout(c.dropout, c.shared_dropout)

    def embed(self, side: Side, ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        """See `EncoderDecoder.embed`. Positions are counted in the row: only distances count."""
        del side, position_ids
        return self.drop(self.source(ids).astype(self.config.dtype), rows, deterministic=deterministic)

    def layer_inputs(self, side: Side) -> tuple[RelativeBias]:
        """See `EncoderDecoder.layer_inputs`."""
        return (self.encoder_positions() if side == "encoder" else self.decoder_positions(),)

    def step_inputs(self, positions: Array, slot_positions: Array) -> tuple[Array]:
        """See `EncoderDecoder.step_inputs`."""
        return (bias_of_slots(self.decoder_positions(), positions, slot_positions),)

    def leave(self, side: Side, hidden: Array, *, rows: Rows, deterministic: bool) -> Array:
        """See `EncoderDecoder.leave`."""
        normed = (self.encoder_norm if side == "encoder" else self.decoder_norm)(hidden)
        return self.drop(normed, rows, deterministic=deterministic)

    def to_table(self, hidden: Array) -> Array:
        """See `EncoderDecoder.to_table`."""
        return hidden * self.config.width**-0.5 if self.config.scale_outputs else hidden

    @property
    def output_table(self) -> Embed:
        """See `EncoderDecoder.output_table`."""
        return self.source if self.config.tied else self.output

    @nn.nowrap
    def decoder_block(self) -> DecoderBlock:
        """See `EncoderDecoder.decoder_block`."""
        return DecoderBlock(self.config, parent=None)


def _layer_entries(c: T5Config, side: Side) -> list[Entry]:
    layers = c.encoder_layers if side == "encoder" else c.decoder_layers
    stored, width, inner = f"{side}.block.{{layer}}.layer", (c.width,), (c.heads, c.head_size)
    attentions = [("attention", "SelfAttention"), *([("cross_attention", "EncDecAttention")] * (side == "decoder"))]
    entries: list[Entry] = []
    for number, (name, stored_name) in enumerate(attentions):
        for part in ("query", "key", "value"):
            one, path = f"{stored}.{number}.{stored_name}.{part[0]}", (side, name, part)
            entries += linear_entries(one, path, width, inner, layers, bias=False)
        one, path = f"{stored}.{number}.{stored_name}.o", (side, name, "out")
        entries += linear_entries(one, path, inner, width, layers, bias=False)
        entries += norm_entries(f"{stored}.{number}.layer_norm", (side, f"{name}_norm"), c.width, layers, bias=False)
    last = f"{stored}.{len(attentions)}"
    maps = {"gate": "wi_0", "inner": "wi_1"} if c.gated else {"inner": "wi"}
    for part, stored_name in maps.items():
        one, path = f"{last}.DenseReluDense.{stored_name}", (side, "feed_forward", part)
        entries += linear_entries(one, path, width, (c.feed_forward,), layers, bias=False)
    one, path = f"{last}.DenseReluDense.wo", (side, "feed_forward", "outer")
    entries += linear_entries(one, path, (c.feed_forward,), width, layers, bias=False)
    entries += norm_entries(f"{last}.layer_norm", (side, "feed_forward_norm"), c.width, layers, bias=False)
    relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        *entries,
        Entry(relative, (f"{side}_positions", "table"), same(c.buckets, c.heads)),
        *norm_entries(f"{side}.final_layer_norm", (f"{side}_norm",), c.width, bias=False),
    ]


def t5_table(c: T5Config) -> Table:
    """Return the table of a T5 model."""
    shared, output, words = "shared.weight", "lm_head.weight", same(c.vocab_size, c.width)
    entries = [Entry(shared, ("source", "embedding"), words)]
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if c.tied:
        copies.append(output)
    else:
        entries.append(Entry(output, ("output", "embedding"), words))
    for side in ("encoder", "decoder"):
        entries += _layer_entries(c, side)
    return Table(
        tuple(entries),
        tied=dict.fromkeys(copies, shared),
        dropped=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),  # of older checkpoints
    )


def _settled(config: T5Config, names: Collection[str]) -> T5Config:
    """Return the config by what a checkpoint holds: the reference implementation (5) writes that all models are tied.

    Whether it is version 1.0, which is, only the scale of its logits tells.
    """
    if config.tied and not config.scale_outputs and "lm_head.weight" in names:
        return replace(config, tied=False)
    return config


def _family(config: type[T5Config], name: str, title: str, paper: str) -> Family:
    return Family(
        config=config,
        title=title,
        paper=paper,
        tokenizers=("unigram",),
        architectures=(Architecture(f"{name}ForConditionalGeneration", "generation", T5, t5_table),),
        tokenizer_like="t5",
        objectives=("span-corruption",),
        one_kind=True,
        settled=_settled,
    )


FAMILY = _family(T5Config, "T5", "T5", "Raffel et al. 2020")
MT5 = _family(MT5Config, "MT5", "mT5", "Xue et al. 2021")
