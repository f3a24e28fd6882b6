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

from ..checkpoints.encoder_decoder import encoder_decoder_table
from ..family import Architecture, Family, FamilyConfig
from ..heads.losses import SmoothedSums, projected_sums
from ..incremental import IncrementalEncoderDecoder, Slots
from ..layers.activations import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed, Linear, add_bias, partitioned
from ..layers.norms import LayerNorm
from ..layers.positions import sinusoids
from ..layers.segments import Rows, Segments, row_numbers, split_segments
from ..layers.stack import run_layers

MOST_POSITIONS = 1 << 15  # beyond those of any translator, and a table of half a gigabyte
NORM_EPSILON = 1e-5  # not in the paper; this is PyTorch's, and so that of every released checkpoint


TYINGS = ("all", "decoder", "none")
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
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
    "bos_token_id": "bos_token_id",
    "decoder_start_token_id": "decoder_start_token_id",
    "forced_eos_token_id": "forced_eos_token_id",
}


def _size(layers: int, width: int, heads: int, feed_forward: int, dropout: float, vocab_size: int) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("heads", heads), ("feed_forward", feed_forward))
    }
    return {"width": width, "dropout": dropout, "vocab_size": vocab_size, **sides}


@dataclass(frozen=True)
class TransformerConfig(FamilyConfig):
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
        "is_encoder_decoder": (True,),
        "activation_function": tuple(ACTIVATIONS),
        "tying": TYINGS,
        "sinusoids": SINUSOIDS,
        "quantization_config": (None,),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*FamilyConfig.WRITTEN_ANEW, "is_encoder_decoder")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Vaswani et al. 2017, table 3, with the 37,000 shared pieces of English and German (5.1).
        "transformer-base": _size(6, 512, 8, 2048, 0.1, 37_000),
        "transformer-big": _size(6, 1024, 16, 4096, 0.3, 37_000),
        # For Multi30k: Wu et al. 2021, "Good for Misconceived Reasons" (Transformer-Tiny).
        "transformer-tiny": _size(4, 128, 4, 256, 0.3, 10_000),
    }

    vocab_size: int = 37_000
    """vocabulary size of the source, and of the target unless it has its own, V"""
    target_vocab_size: int | None = None
    """vocabulary size of the target; None: that of the source"""
    width: int = 512
    """size of the hidden states, E"""
    embedding_width: int | None = None
    """size of the embeddings, which are projected to the width and back if it differs; None: the width"""
    encoder_layers: int = 6
    """number of layers of the encoder"""
    decoder_layers: int = 6
    """number of layers of the decoder"""
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
    dropout: float = 0.1
    """dropout rate of embeddings and sub-layer outputs"""
    attention_dropout: float = 0.0
    """dropout rate of attention probabilities (not in the paper)"""
    activation_dropout: float = 0.0
    """dropout rate of the feed-forward sub-layers' inner activations (not in the paper)"""
    pad_token_id: int = 0
    """token whose embedding gets no gradient from lookups"""
    eos_token_id: int = 2
    """end-of-text token"""
    bos_token_id: int | None = 1
    """beginning-of-text token, if the tokenizer has one"""
    decoder_start_token_id: int = 2
    """first token of the decoder's input"""
    forced_eos_token_id: int | None = None
    """token that ends an output of maximum length"""

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
        if self.tying == "all" and self.target_words != self.vocab_size:
            raise ValueError(
                f"{name}: tying 'all' shares one table, but the source has {self.vocab_size} words and the target"
                f" {self.target_words}; take one vocabulary for both, or tying 'decoder'"
            )

    @property
    def target_words(self) -> int:
        """Vocabulary size of the target."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def table_width(self) -> int:
        """Size of the embeddings."""
        return self.width if self.embedding_width is None else self.embedding_width

    @property
    def max_length(self) -> int | None:
        """Maximum length of an example on either side, in tokens."""
        return self.positions

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        return super().to_json() | {"is_encoder_decoder": True}


def _glorot(key: Array, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> Array:
    """Draw uniformly in ±sqrt(6 / (inputs + outputs)). The head axes of a projection count as one axis."""
    outer = tuple(shape) if len(shape) == 2 else (math.isqrt(math.prod(shape)),) * 2
    limit = math.sqrt(6 / sum(outer))
    return jax.random.uniform(key, shape, dtype, -limit, limit, out_sharding=out_sharding)


def _attention(c: TransformerConfig, heads: int, *, causal: bool = False) -> Attention:
    return Attention(c.width, heads, c.attention_dropout, _glorot, c.dtype, c.attention_implementation, causal)


def _feed_forward(c: TransformerConfig, width: int) -> FeedForward:
    return FeedForward(width, c.activation, _glorot, c.dtype, c.activation_dropout)


def _add(
    c: TransformerConfig, hidden: Array, norm: LayerNorm, sublayer: Callable[[Array], Array], drop: Callable[..., Array]
) -> Array:
    """Add a sub-layer's output to its input and normalise the sum (3.1), or the input if `pre_norm`."""
    if c.pre_norm:
        return hidden + drop(sublayer(norm(hidden)))
    return norm(hidden + drop(sublayer(hidden)))


class EncoderBlock(nn.Module):
    """One layer of the encoder: self-attention, then feed-forward (3.1)."""

    config: TransformerConfig

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

    config: TransformerConfig

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


class Transformer(nn.Module):
    """Encoder, decoder, and the products with the word embeddings that give the logits."""

    config: TransformerConfig

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
            zeros = partitioned(nn.initializers.zeros_init(), "vocab")
            self.final_logits_bias = self.param("final_logits_bias", zeros, (c.target_words,), jnp.float32)
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_segment_ids: Segments = None,
        decoder_position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the logits of each next word.

        Args:
            input_ids: [B, S] int32, the source.
            segment_ids: [B, S] int32, which pair of the row each token belongs to, 0 for padding; None for one pair
                that fills the row. A pair of arrays gives queries and keys their own.
            position_ids: [B, S] int32, position within the example; None counts from 0 along the row.
            decoder_input_ids: [B, T] int32, the start token and then the target without its last token. May be None
                only for initialisation.
            decoder_segment_ids: [B, T] int32, as for the source; None for segments of 1.
            decoder_position_ids: [B, T] int32, as for the source.
            rows: [B] uint32, row numbers, which together with the "dropout" stream determine what is dropped; None
                counts from 0.
            deterministic: disable dropout.

        Returns:
            [B, T, V] float32
        """
        states = self.output_states(
            input_ids,
            segment_ids,
            position_ids,
            self._decoder_input(input_ids, decoder_input_ids),
            decoder_segment_ids,
            decoder_position_ids,
            rows=rows,
            deterministic=deterministic,
        )
        logits = self._output_table.attend(states)
        if not self.config.logits_bias:
            return logits
        return add_bias(logits, jax.lax.stop_gradient(self.final_logits_bias))

    def output_states(
        self,
        input_ids: Array,
        segment_ids: Segments,
        position_ids: Array | None,
        decoder_input_ids: Array,
        decoder_segment_ids: Segments,
        decoder_position_ids: Array | None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the states that the output embeddings are multiplied by to give logits, [B, T, table width]."""
        mode: dict[str, Any] = {"rows": rows, "deterministic": deterministic}
        memory = self.encode(input_ids, segment_ids, position_ids, **mode)
        hidden = self.decode(memory, segment_ids, decoder_input_ids, decoder_segment_ids, decoder_position_ids, **mode)
        return self._to_table(hidden)

    def loss(
        self,
        passes: Sequence[Array],
        labels: Array,
        label_weights: Array | None = None,
        *,
        label_smoothing: float = 0.0,
        r_drop: float = 0.0,
    ) -> SmoothedSums:
        """Compute the losses without storing all logits, by `losses.projected_sums`.

        Args:
            passes: one or two [B, T, width of the table], by `output_states`; two with different dropout for R-Drop.
            labels: [B, T] int32, the target; `losses.IGNORED_LABEL` has weight 0.
            label_weights: [B, T], or None for ones.
            label_smoothing: fraction of the probability that is spread over all words.
            r_drop: weight of the divergence between two passes.
        """
        bias = self.final_logits_bias if self.config.logits_bias else None
        table = self._output_table.embedding
        return projected_sums(passes, table, labels, label_weights, label_smoothing, bias, r_drop)

    def encode(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the encoder's output [B, S, E]."""
        c = self.config
        rows = row_numbers(rows, input_ids)
        hidden = self._embed(
            self.source, "source_projection", input_ids, position_ids, rows=rows, deterministic=deterministic
        )
        hidden, _ = run_layers(
            self.encoder,
            hidden,
            segment_ids,
            rows,
            count=c.encoder_layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
        )
        return self.encoder_norm(hidden) if c.pre_norm else hidden

    def decode(
        self,
        memory: Array,
        segment_ids: Segments,
        decoder_input_ids: Array,
        decoder_segment_ids: Segments = None,
        decoder_position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the decoder's output [B, T, E] from the encoder's, [B, S, E], and its `segment_ids`."""
        c = self.config
        rows = row_numbers(rows, decoder_input_ids)
        hidden = self._embed(
            self._target_table,
            "target_projection",
            decoder_input_ids,
            decoder_position_ids,
            rows=rows,
            deterministic=deterministic,
        )
        hidden, _ = run_layers(
            self.decoder,
            hidden,
            decoder_segment_ids,
            memory,
            _cross_segments(decoder_input_ids, decoder_segment_ids, memory, segment_ids),
            rows,
            count=c.decoder_layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
        )
        return self.decoder_norm(hidden) if c.pre_norm else hidden

    def last_scores(self, hidden: Array) -> Array:
        """Compute logits without their bias, [..., V] float32, from the last decoder layer's output [..., E]."""
        normalised = self.decoder_norm(hidden) if self.config.pre_norm else hidden
        return self._output_table.attend(self._to_table(normalised))

    def embed_step(self, tokens: Array, positions: Array) -> Array:
        """Embed target tokens [B, K] at their row's position [B] -> [B, K, E]."""
        return self._embed(
            self._target_table,
            "target_projection",
            tokens,
            jnp.broadcast_to(positions[:, None], tokens.shape),
            rows=row_numbers(None, tokens),
            deterministic=True,
        )

    @nn.nowrap
    def incremental(self) -> IncrementalEncoderDecoder:
        """Return the model for incremental decoding, one token at a time."""
        return IncrementalEncoderDecoder(self, DecoderBlock(self.config, parent=None))

    def _decoder_input(self, input_ids: Array, decoder_input_ids: Array | None) -> Array:
        if decoder_input_ids is not None:
            return decoder_input_ids
        if self.is_initializing():
            return input_ids
        raise ValueError("decoder_input_ids: expected int [B, T], found None")

    def _embed(
        self,
        table: Embed,
        projection: str,
        ids: Array,
        position_ids: Array | None,
        *,
        rows: Rows,
        deterministic: bool,
    ) -> Array:
        """Compute embeddings times sqrt(E), plus positions; dropout on the sum (3.4, 3.5, 5.4)."""
        c = self.config
        length = ids.shape[1]
        if position_ids is None and length > c.positions:
            raise ValueError(f"a row has {length} tokens, but the model has {c.positions} positions")
        vectors = table(ids)
        if c.table_width != c.width:
            vectors = getattr(self, projection)(vectors)
        if c.scale_embeddings:
            vectors = vectors * math.sqrt(c.width)
        places = jnp.asarray(sinusoids(c.positions, c.width, interleaved=c.sinusoids == "interleaved"))
        # A position beyond the last gives NaN, never another position's vector.
        at = places[None, :length] if position_ids is None else jnp.take(places, position_ids, axis=0, mode="fill")
        return self.drop((vectors + at).astype(c.dtype), rows, deterministic=deterministic)

    @property
    def _target_table(self) -> Embed:
        return self.source if self.config.tying == "all" else self.target

    @property
    def _output_table(self) -> Embed:
        return self.output if self.config.tying == "none" else self._target_table

    def _to_table(self, hidden: Array) -> Array:
        """Map [..., E] to the states that are multiplied by the output embeddings, [..., width of the table]."""
        narrow = self.config.table_width != self.config.width and self.config.tying != "none"
        return self.output_projection(hidden) if narrow else hidden


def _cross_segments(
    decoder_input_ids: Array, decoder_segment_ids: Segments, memory: Array, source: Segments
) -> Segments:
    """Return (segments of the decoder's tokens, segments of the encoder's), if either is given."""
    query_segments, key_segments = split_segments(decoder_segment_ids)[0], split_segments(source)[1]
    if query_segments is None and key_segments is None:
        return None
    if query_segments is None:
        query_segments = jnp.ones(decoder_input_ids.shape, jnp.int32)
    if key_segments is None:
        key_segments = jnp.ones(memory.shape[:2], jnp.int32)
    return query_segments, key_segments


def make_family(config: type[TransformerConfig], name: str, build: type[Transformer], **words: Any) -> Family:
    """Return the family of this network under another name: one kind of model."""
    kind = Architecture(name, "translation", build, encoder_decoder_table)
    return Family(config=config, architectures=(kind,), one_kind=True, **words)


FAMILY = make_family(
    TransformerConfig,
    "Transformer",
    Transformer,
    title="Transformer",
    paper="Vaswani et al. 2017",
    tokenizers=("unigram", "bpe", "word-bpe"),
)
