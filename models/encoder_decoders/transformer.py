"""The Transformer: an encoder and a decoder of attention and feed-forward layers, for translation.

Vaswani et al. 2017, "Attention Is All You Need".

What sets it apart from its neighbours: sinusoidal positions, not learnt; embeddings multiplied by the square root of
the width and shared by source, target and output (3.4); layers normalised after each addition (post-norm, 3.1);
ReLU; dropout on the sum of embeddings and positions and on the output of each sub-layer before it is added (5.4).

Several pairs can share a row: a pair has the same segment number on both sides, and the encoder, the decoder and the
attention between them stay within a pair.

New weights: embeddings from a normal distribution of standard deviation 1/sqrt(width), matrices from Glorot and
Bengio's (2010) uniform distribution, zeros for biases, ones for norms, as in the authors' code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.encoder_decoder import encoder_decoder_table
from ..encoder_decoder import TOKEN_KEYS, EncoderDecoderConfig, Side, logits_bias_init
from ..family import Architecture, Family
from ..incremental import Slots
from ..layers.activations import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed, Linear
from ..layers.norms import LayerNorm
from ..layers.positions import sinusoids
from ..layers.segments import Rows, Segments
from ..two_vocabularies import TYINGS, TwoVocabularies, WithTwoTables

MOST_POSITIONS = 1 << 15  # beyond those of any translator, and a table of half a gigabyte
NORM_EPSILON = 1e-5  # not in the paper; this is PyTorch's, and so that of every released checkpoint


SINUSOIDS = ("interleaved", "halves")
# By their names in released checkpoints of encoder-decoders, if they have one.
SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_heads": "encoder_attention_heads",
    "decoder_heads": "decoder_attention_heads",
    "encoder_feed_forward": "encoder_ffn_dim",
    "decoder_feed_forward": "decoder_ffn_dim",
    "positions": "max_position_embeddings",
    "activation": "activation_function",
    "scale_embeddings": "scale_embedding",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    **TOKEN_KEYS,
}


def _size(layers: int, width: int, heads: int, feed_forward: int, dropout: float, vocab_size: int) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("heads", heads), ("feed_forward", feed_forward))
    }
    return {"width": width, "dropout": dropout, "vocab_size": vocab_size, **sides}


@dataclass(frozen=True)
class TransformerConfig(TwoVocabularies, EncoderDecoderConfig):
    """Sizes and settings of a Transformer. The defaults are those of the paper's base model."""

    MODEL_TYPE: ClassVar[str] = "transformer"
    KEYS: ClassVar[Mapping[str, str]] = {
        **SHARED_KEYS,
        "target_vocab_size": "decoder_vocab_size",
        "embedding_width": "embedding_size",
        "sinusoids": "sinusoids",
        "pre_norm": "normalize_before",
        "tying": "tying",
        "logits_bias": "final_logits_bias",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderDecoderConfig.REQUIRED,
        "activation_function": tuple(ACTIVATIONS),
        "tying": TYINGS,
        "sinusoids": SINUSOIDS,
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Vaswani et al. 2017, table 3, with the 37,000 shared pieces of English and German (5.1).
        "transformer-base": _size(6, 512, 8, 2048, 0.1, 37_000),
        "transformer-big": _size(6, 1024, 16, 4096, 0.3, 37_000),
        # For Multi30k: Wu et al. 2021, "Good for Misconceived Reasons" (Transformer-Tiny).
        "transformer-tiny": _size(4, 128, 4, 256, 0.3, 10_000),
    }

    vocab_size: int = 37_000
    target_vocab_size: int | None = None
    """vocabulary size of the target; None: that of the source"""
    embedding_width: int | None = None
    """size of the embeddings, which are projected to the width and back if it differs; None: the width"""
    encoder_heads: int = 8
    """number of attention heads of the encoder; must divide the width"""
    decoder_heads: int = 8
    """number of attention heads of the decoder; must divide the width"""
    encoder_feed_forward: int = 2048
    """inner width of the encoder's feed-forward sub-layers"""
    decoder_feed_forward: int = 2048
    """inner width of the decoder's feed-forward sub-layers"""
    positions: int = 1024
    """maximum length of an example on either side, in tokens"""
    activation: str = "relu"
    """activation function, a name in layers.ACTIVATIONS"""
    sinusoids: str = "interleaved"
    """order of the position channels: interleaved (sine, cosine, ... as in 3.5) or halves (all sines, all cosines)"""
    scale_embeddings: bool = True
    """multiply embeddings by the square root of the width (3.4)"""
    pre_norm: bool = False
    """normalise the input of each sub-layer instead of each sum, and the output of the last layer"""
    tying: str = "all"
    """which embedding tables are shared: all (source, target, output), decoder (target and output) or none"""
    logits_bias: bool = False
    """add a constant per word to the logits, which is loaded and saved but not trained"""
    attention_dropout: float = 0.0
    """dropout rate of attention probabilities (not in the paper)"""
    activation_dropout: float = 0.0
    """dropout rate of the feed-forward sub-layers' inner activations (not in the paper)"""
    bos_token_id: int | None = 1
    decoder_start_token_id: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for field, allowed in (("tying", TYINGS), ("sinusoids", SINUSOIDS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{name}: {field} is one of {', '.join(allowed)}, not {getattr(self, field)!r}")
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_heads")
            if self.width % heads:
                raise ValueError(f"{name}: width {self.width} is not a multiple of {side}_heads {heads}")
        if self.positions > MOST_POSITIONS:
            raise ValueError(f"{name}: positions is {self.positions}; the sinusoids have at most {MOST_POSITIONS:,}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{name}: unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.check_tying()

    @property
    def table_width(self) -> int:
        """Size of the embeddings."""
        return self.width if self.embedding_width is None else self.embedding_width

    @property
    def max_length(self) -> int | None:
        """Maximum length of an example on either side, in tokens."""
        return self.positions

    @property
    def head_size(self) -> int:
        """Size of the decoder's heads, D."""
        return self.width // self.decoder_heads

    @property
    def initializer(self) -> Initializer:
        """Initialiser of new matrices."""
        return _glorot


def _glorot(key: Array, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> Array:
    """Draw uniformly in ±sqrt(6 / (inputs + outputs)). The head axes of a projection count as one axis."""
    outer = tuple(shape) if len(shape) == 2 else (math.isqrt(math.prod(shape)),) * 2
    limit = math.sqrt(6 / sum(outer))
    return jax.random.uniform(key, shape, dtype, -limit, limit, out_sharding=out_sharding)


def _attention(c: Any, heads: int, *, causal: bool = False) -> Attention:
    return Attention(c.width, heads, c.attention_dropout, c.initializer, c.dtype, c.attention_implementation, causal)


def _feed_forward(c: Any, width: int) -> FeedForward:
    return FeedForward(width, c.activation, c.initializer, c.dtype, c.activation_dropout)


def _add(
    c: Any, hidden: Array, norm: LayerNorm, sublayer: Callable[[Array], Array], drop: Callable[..., Array]
) -> Array:
    """Add a sub-layer's output to its input and normalise the sum (3.1), or the input if `pre_norm`."""
    if c.pre_norm:
        return hidden + drop(sublayer(norm(hidden)))
    return norm(hidden + drop(sublayer(hidden)))


class EncoderBlock(nn.Module):
    """One layer of the encoder: self-attention, then feed-forward (3.1)."""

    config: Any  # of this family or of BART

    def setup(self) -> None:
        c = self.config
        self.attention = _attention(c, c.encoder_heads)
        self.attention_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.feed_forward = _feed_forward(c, c.encoder_feed_forward)
        self.feed_forward_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.drop = Dropout(c.dropout)

    def __call__(self, hidden: Array, segment_ids: Segments, rows: Rows, *, deterministic: bool) -> Array:
        mode = {"rows": rows, "deterministic": deterministic}
        add = partial(_add, self.config, drop=partial(self.drop, **mode))
        hidden = add(hidden, self.attention_norm, lambda x: self.attention(x, segment_ids, **mode))
        return add(hidden, self.feed_forward_norm, lambda x: self.feed_forward(x, **mode))


class DecoderBlock(nn.Module):
    """One layer of the decoder: self-attention to earlier tokens, attention to the encoder, feed-forward (3.1)."""

    config: Any  # of this family or of BART

    def setup(self) -> None:
        c = self.config
        self.attention = _attention(c, c.decoder_heads, causal=True)
        self.attention_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.cross_attention = _attention(c, c.decoder_heads)
        self.cross_attention_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.feed_forward = _feed_forward(c, c.decoder_feed_forward)
        self.feed_forward_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        memory: Array,
        cross_segments: Segments,
        rows: Rows,
        *,
        deterministic: bool,
    ) -> Array:
        mode = {"rows": rows, "deterministic": deterministic}
        add = partial(_add, self.config, drop=partial(self.drop, **mode))
        hidden = add(hidden, self.attention_norm, lambda x: self.attention(x, segment_ids, **mode))
        hidden = add(
            hidden,
            self.cross_attention_norm,
            lambda x: self.cross_attention(x, cross_segments, memory=memory, **mode),
        )
        return add(hidden, self.feed_forward_norm, lambda x: self.feed_forward(x, **mode))

    def step(
        self,
        hidden: Array,
        memory: tuple[Array, Array],
        memory_mask: Array,
        cache: Slots,
        places: Array,
        mask: Array,
    ) -> tuple[Array, Slots, Array]:
        """Apply the layer to one token of each beam, for `IncrementalEncoderDecoder.step`.

        Returns:
            (hidden [B, K, E], the cache, the attention to the encoder [B, H, K, S])
        """

        def attend(x: Array) -> Array:
            nonlocal cache
            cache = Slots(*self.attention.write(x, *cache, places))
            return self.attention.step(x, *cache, mask)[0]

        def attend_memory(x: Array) -> Array:
            nonlocal probabilities
            attended, probabilities = self.cross_attention.step(x, *memory, memory_mask)
            return attended

        probabilities = jnp.zeros(())
        add = partial(_add, self.config, drop=lambda x: x)
        hidden = add(hidden, self.attention_norm, attend)
        hidden = add(hidden, self.cross_attention_norm, attend_memory)
        return add(hidden, self.feed_forward_norm, self.feed_forward), cache, probabilities

    def keys_values(self, memory: Array) -> Slots:
        """Compute keys and values of the encoder's output [B, S, E]."""
        return Slots(*self.cross_attention.keys_values(memory))


class Transformer(WithTwoTables):
    """Encoder and decoder, with embeddings of words times sqrt(E) plus positions (3.4, 3.5).

    The vector of padding, with which new models' outputs start as Marian's do, is zero.
    """

    config: TransformerConfig
    ZERO_PADDING: ClassVar[bool] = True

    def setup(self) -> None:
        c = self.config
        table = partial(Embed, axis="vocab", dtype=c.dtype, padding_id=c.pad_token_id)
        width = c.table_width
        deviation = nn.initializers.normal
        self.source = table(c.vocab_size, width, embedding_init=deviation(width**-0.5))
        if c.tying != "all":
            self.target = table(c.target_words, width, embedding_init=deviation(width**-0.5))
        if c.tying == "none":
            self.output = table(c.target_words, c.width, embedding_init=deviation(c.width**-0.5))
        if width != c.width:
            linear = partial(Linear, axes=("embed", "embed_out"), kernel_init=_glorot, dtype=c.dtype, use_bias=False)
            self.source_projection = linear((c.width,))
            self.target_projection = linear((c.width,))
            if c.tying != "none":
                self.output_projection = linear((width,))
        self.encoder = EncoderBlock(c)
        self.decoder = DecoderBlock(c)
        if c.pre_norm:
            self.encoder_norm = LayerNorm(NORM_EPSILON, c.dtype)
            self.decoder_norm = LayerNorm(NORM_EPSILON, c.dtype)
        if c.logits_bias:
            self.final_logits_bias = self.param("final_logits_bias", logits_bias_init, (c.target_words,), jnp.float32)
        self.drop = Dropout(c.dropout)

    def embed(self, side: Side, ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        """See `EncoderDecoder.embed`; dropout on the sum (5.4)."""
        c = self.config
        length = ids.shape[1]
        if position_ids is None and length > c.positions:
            raise ValueError(f"a row has {length} tokens, but the model has {c.positions} positions")
        vectors = self.source(ids) if side == "encoder" else self._target_table(ids)
        if self.ZERO_PADDING:
            vectors = jnp.where((ids == c.pad_token_id)[..., None], jnp.zeros_like(vectors), vectors)
        if c.table_width != c.width:
            vectors = (self.source_projection if side == "encoder" else self.target_projection)(vectors)
        if c.scale_embeddings:
            vectors = vectors * math.sqrt(c.width)
        places = jnp.asarray(sinusoids(c.positions, c.width, interleaved=c.sinusoids == "interleaved"))
        # A position beyond the last gives NaN, never another position's vector.
        at = places[None, :length] if position_ids is None else jnp.take(places, position_ids, axis=0, mode="fill")
        return self.drop((vectors + at).astype(c.dtype), rows, deterministic=deterministic)

    def leave(self, side: Side, hidden: Array, *, rows: Rows, deterministic: bool) -> Array:
        """See `EncoderDecoder.leave`."""
        del rows, deterministic
        if not self.config.pre_norm:
            return hidden
        return (self.encoder_norm if side == "encoder" else self.decoder_norm)(hidden)

    @nn.nowrap
    def decoder_block(self) -> DecoderBlock:
        """See `EncoderDecoder.decoder_block`."""
        return DecoderBlock(self.config, parent=None)

    def to_table(self, hidden: Array) -> Array:
        """Map [..., E] to the states that are multiplied by the output embeddings, [..., width of the table]."""
        narrow = self.config.table_width != self.config.width and self.config.tying != "none"
        return self.output_projection(hidden) if narrow else hidden


def make_family(config: type[TransformerConfig], name: str, build: type[Transformer], **words: Any) -> Family:
    """Return the family of this network under another name: one kind of model."""
    kind = Architecture(name, "generation", build, encoder_decoder_table)
    return Family(config=config, architectures=(kind,), one_kind=True, **words)


FAMILY = make_family(
    TransformerConfig,
    "Transformer",
    Transformer,
    title="Transformer",
    paper="Vaswani et al. 2017",
    tokenizers=("unigram", "bpe", "word-bpe"),
)
