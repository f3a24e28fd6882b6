"""Transformer-XL: a decoder that reads a text in segments, and attends to its hidden states of those before.

Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context".

What sets it apart from its neighbours: each layer's keys and values are of its inputs now and before, the *memory*, to
which no gradient flows (3.2); positions enter each layer's attention as distances (3.3); post-norm; an adaptive
softmax. The score of query and key is that of `layers.relative_attention`, with distances of at most `clamp` (for
evaluation with a memory longer than in training). With `same_length`, every token attends to as many tokens as the
memory has slots, itself included.

New weights are drawn from N(0, 0.02²), norms' gains from N(1, 0.02²), projections of words from N(0, 0.01²).

A memory has a fixed number of slots, the newest last. A slot of segment 0 is empty, and nothing attends to it: a text
begins with an empty memory. (The reference begins with zeros that are attended to.) Segments are those of packed rows:
if a memory's differ from a row's, the row does not see it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.tables import Entry, Table, fused_entries, linear_entries, norm_entries, same
from ..encoder import Encoded
from ..family import Architecture, EncoderConfig, Family
from ..heads.adaptive_softmax import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    Clusters,
    embedding_entries,
    softmax_entries,
    tied_names,
)
from ..heads.memory_lm import Memory, MemoryLanguageModel, empty_memory
from ..heads.with_head import EncoderParts, Form, WithHead
from ..incremental_memory import IncrementalWithMemory
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.norms import LayerNorm
from ..layers.relative_attention import Biases, Distances, RelativeAttention, frequencies, head_bias, sinusoids
from ..layers.segments import Segments, row_numbers, split_segments
from ..layers.stack import run_layers


def _size(layers: int, width: int, heads: int, head_size: int, inner: int, memory: int, **more: Any) -> dict[str, Any]:
    sizes = {"layers": layers, "width": width, "heads": heads, "head_size": head_size, "feed_forward": inner}
    return {**sizes, "memory": memory, "embedding_size": width, **more}


WT103 = {"cutoffs": (20_000, 40_000, 200_000), "tie_projections": (False, True, True, True)}
CHARACTERS: dict[str, Any] = {"vocab_size": 204, "cutoffs": (), "tie_projections": (True,), "divisor": 1}


@dataclass(frozen=True)
class TransformerXLConfig(EncoderConfig):
    """Sizes and settings of a Transformer-XL.

    The defaults are those of the released checkpoint, but for `clamp` and `same_length`, which it sets for evaluation.
    """

    MODEL_TYPE: ClassVar[str] = "transfo-xl"
    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "cutoffs": "cutoffs",
        "width": "d_model",
        "embedding_size": "d_embed",
        "divisor": "div_val",
        "layers": "n_layer",
        "heads": "n_head",
        "head_size": "d_head",
        "feed_forward": "d_inner",
        "memory": "mem_len",
        "clamp": "clamp_len",
        "same_length": "same_length",
        "pre_norm": "pre_lnorm",
        "untied_biases": "untie_r",
        "tie_projections": "tie_projs",
        "dropout": "dropout",
        "attention_dropout": "dropatt",
        "norm_epsilon": "layer_norm_epsilon",
        "initializer_range": "init_std",
        "projection_range": "proj_init_std",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "problem_type": EncoderConfig.REQUIRED["problem_type"],
        "adaptive": (True,),
        "attn_type": (0,),
        "init": ("normal",),
        "sample_softmax": (-1, 0),
        "tie_word_embeddings": (True,),
        "quantization_config": (None,),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*EncoderConfig.WRITTEN_ANEW, "proj_share_all_but_first")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors' scripts, run_wt103_base.sh and run_enwik8_base.sh (PyTorch), and the released checkpoint.
        "transformer-xl-base": _size(16, 410, 10, 41, 2100, 150, divisor=1, untied_biases=False, **WT103),
        "transformer-xl-large": _size(18, 1024, 16, 64, 4096, 1600, **WT103),
        "transformer-xl-enwik8": _size(12, 512, 8, 64, 2048, 512, untied_biases=False, **CHARACTERS),
        "transformer-xl-tiny": _size(4, 192, 6, 32, 512, 128, divisor=1, untied_biases=False, **WT103),  # not released
    }

    vocab_size: int = 267_735
    cutoffs: tuple[int, ...] = (20_000, 40_000, 200_000)
    """first word of each cluster of the softmax but the first, in an order of frequency; none for a plain softmax"""
    width: int = 1024
    embedding_size: int = 1024
    """size of the vectors of the most frequent words"""
    divisor: int = 4
    """by which the size of the vectors shrinks from one cluster to the next"""
    layers: int = 18
    heads: int = 16
    head_size: int = 64
    """size of a head, D"""
    feed_forward: int = 4096
    activation: str = "relu"
    memory: int = 1600
    """number of slots of the memory, in tokens"""
    clamp: int | None = None
    """distance from which on all distances count as this one; None: no limit"""
    same_length: bool = False
    """let every token attend to the same number of tokens, that of the memory"""
    pre_norm: bool = False
    """normalise the input of each part, not the sum"""
    untied_biases: bool = True
    """each layer has its own u and v"""
    tie_projections: tuple[bool, ...] = (False, True, True, True)
    """for each cluster, whether input and output share its projection"""
    attention_dropout: float = 0.0
    norm_epsilon: float = 1e-5
    projection_range: float = 0.01
    """standard deviation of new projections of words"""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    """token that begins a text, if the tokenizer has one"""
    eos_token_id: int | None = 0
    """token that ends a text, or a line of it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = (0, *self.cutoffs, self.vocab_size)
        if any(first >= end for first, end in pairwise(ends)):
            raise ValueError(f"{type(self).__name__}: cutoffs must ascend from 1 to below {self.vocab_size:,} words")
        if len(self.tie_projections) < len(self.cutoffs) + 1:
            raise ValueError(f"{type(self).__name__}: expected tie_projections for {len(self.cutoffs) + 1} clusters")
        if self.divisor < 1 or self.embedding_size // self.divisor ** len(self.cutoffs) < 1:
            raise ValueError(f"{type(self).__name__}: div_val {self.divisor} leaves the last cluster no size")
        if self.same_length and not self.memory:
            raise ValueError(f"{type(self).__name__}: same_length needs a memory")

    @property
    def max_length(self) -> None:
        """None: distances have no limit."""
        return

    @property
    def initializer(self) -> Initializer:
        """Initialiser of new kernels, embeddings, u and v."""
        return nn.initializers.normal(self.initializer_range)

    @property
    def gain_initializer(self) -> Initializer:
        """Initialiser of the norms' gains."""

        def draw(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
            del out_sharding
            return 1 + self.initializer_range * jax.random.normal(key, shape, dtype)

        return draw

    @property
    def pooling(self) -> str:
        """See `EncoderConfig.pooling`: "last", the last token, which has seen all others."""
        return "last"

    def head_dropout(self, head: str) -> float:
        """See `EncoderConfig.head_dropout`: there is none."""
        del head
        return 0.0

    @property
    def span(self) -> int | None:
        """Number of tokens that a token attends to, its own included; None for all of its segment and the memory."""
        return self.memory if self.same_length else None

    @property
    def clusters(self) -> Clusters:
        """The clusters of words."""
        sizes = (self.embedding_size, self.divisor, self.width)
        return Clusters(self.vocab_size, self.cutoffs, *sizes, self.tie_projections)

    @classmethod
    def vocabulary_fields(cls, size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """See `EncoderConfig.vocabulary_fields`. Smaller vocabularies are cut at a sixteenth and a quarter, or not."""
        cutoffs = WT103["cutoffs"] if size > 200_000 else (size // 16, size // 4) if size > 10_000 else ()
        ends = {f"{role}_token_id": ids.get(role) for role in ("pad", "bos", "eos")}
        tied = (False, *(True,) * len(cutoffs))
        return {"vocab_size": size, "cutoffs": cutoffs, "tie_projections": tied, **ends}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`. A missing `tie_projs` follows from `proj_share_all_but_first`."""
        stored = dict(stored)
        if stored.get("clamp_len", 1000) in (-1, 0):
            stored["clamp_len"] = None
        defaults = {"clamp_len": 1000, "same_length": True}  # the reference's, which are for evaluation
        cutoffs = stored.get("cutoffs", list(cls.cutoffs))
        if "tie_projs" not in stored and isinstance(cutoffs, list):
            share = bool(stored.get("proj_share_all_but_first", True))
            stored["tie_projs"] = [False, *[share] * len(cutoffs)]
        return super().from_json({**defaults, **stored}, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        stored = super().to_json()
        lists = {key: list(stored[key]) for key in ("cutoffs", "tie_projs")}
        return {**stored, **lists, "clamp_len": -1 if self.clamp is None else self.clamp}


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added and then normalised, or normalised before (`pre_norm`)."""

    config: TransformerXLConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        rows: Array,
        distances: Distances,
        biases: Biases | None,
        memory: Array,
        *,
        deterministic: bool,
    ) -> Array:
        """Transform hidden states [B, L, E] -> [B, L, E], with this layer's memory [B, M, E]."""
        c = self.config
        norm = partial(LayerNorm, c.norm_epsilon, c.dtype, scale_init=c.gain_initializer)
        attention_norm, feed_forward_norm = norm(name="attention_norm"), norm(name="feed_forward_norm")
        relative = RelativeAttention(
            c.width,
            c.heads,
            c.head_size,
            c.attention_dropout,
            c.initializer,
            c.untied_biases,
            c.span,
            c.dtype,
            c.attention_implementation,
            name="attention",
        )
        feed_forward = FeedForward(c.feed_forward, c.activation, c.initializer, c.dtype, c.dropout, name="feed_forward")
        drop = Dropout(c.dropout)

        context = jnp.concatenate([memory, hidden], axis=1)[:, -distances.key_segment_ids.shape[1] :]
        inputs = hidden
        if c.pre_norm:
            context = attention_norm(context)
            inputs = context[:, -hidden.shape[1] :]
        attended = relative(inputs, context, rows, distances, biases, deterministic=deterministic)
        hidden = hidden + drop(attended, rows, deterministic=deterministic)
        hidden = hidden if c.pre_norm else attention_norm(hidden)
        inputs = feed_forward_norm(hidden) if c.pre_norm else hidden
        fed = feed_forward(inputs, rows, deterministic=deterministic)
        hidden = hidden + Dropout(c.dropout)(fed, rows, deterministic=deterministic)
        return hidden if c.pre_norm else feed_forward_norm(hidden)


class TransformerXL(nn.Module):
    """The decoder, without the softmax."""

    config: TransformerXLConfig

    def setup(self) -> None:
        c = self.config
        projection = nn.initializers.normal(c.projection_range)
        self.embeddings = AdaptiveEmbedding(c.clusters, c.initializer, projection, c.dtype)
        self.layers = Block(c)
        self.drop = Dropout(c.dropout)
        if not c.untied_biases:
            self.content, self.distance = (head_bias(c.heads, c.head_size, c.initializer) for _ in range(2))

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        *,
        rows: Any = None,
        deterministic: bool = True,
        every_layer: bool = False,
    ) -> Encoded:
        """Read whole texts, with no memory before them.

        Args:
            input_ids: [B, L] int32.
            segment_ids: [B, L] int32, 0 for padding; tokens attend to those of their own segment. None for ones.
            position_ids: not used: distances within a segment are those within the row.
            rows: [B] uint32, row numbers; see `read`.
            deterministic: disable dropout.
            every_layer: also return the embeddings and every layer's hidden states.
        """
        del position_ids
        segments, _ = split_segments(segment_ids)
        segments = jnp.ones(input_ids.shape, jnp.int32) if segments is None else segments
        none, numbers = empty_memory(self.config, len(input_ids), 0), row_numbers(rows, input_ids)
        hidden, _, inputs = self.read(input_ids, none, segments, numbers, deterministic=deterministic)
        every = jnp.concatenate([inputs, hidden[None]]) if every_layer else None
        return Encoded(hidden, hidden[:, 0], None, every)

    def read(
        self, input_ids: Array, memory: Memory, segment_ids: Array, rows: Any, *, deterministic: bool
    ) -> tuple[Array, Memory, Array]:
        """Read rows of tokens; see `MemoryLanguageModel.read`. The third result is each layer's input [N, B, L, E]."""
        c = self.config
        length, slots = input_ids.shape[1], memory.segment_ids.shape[1]
        seen = jnp.concatenate([memory.segment_ids, segment_ids], axis=1)
        # With `same_length`, no token attends to the first slots of a memory of at least that length.
        unseen = max(0, slots - c.memory + 1) if c.same_length else 0
        positions = sinusoids(length + slots - unseen, c.width, c.clamp, c.dtype)
        positions = self.drop(positions, jnp.zeros(1, jnp.uint32), deterministic=deterministic)
        entered = self.drop(self.embed(input_ids), rows, deterministic=deterministic)
        hidden, outputs = run_layers(
            self.layers,
            entered,
            rows,
            Distances(positions, segment_ids, seen[:, unseen:]),
            self.biases(),
            count=c.layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
            every_layer=True,
            each=memory.hidden,
        )
        assert outputs is not None
        inputs = jnp.concatenate([entered[None], outputs[:-1]])
        kept = jnp.concatenate([memory.hidden, inputs], axis=2)[:, :, length:]
        new = Memory(jax.lax.stop_gradient(kept), seen[:, length:])
        return self.drop(hidden, rows, deterministic=deterministic), new, inputs

    def embed(self, input_ids: Array) -> Array:
        """Look up scaled word vectors: [B, L] -> [B, L, E]."""
        return self.embeddings(input_ids) * jnp.asarray(self.config.width**0.5, self.config.dtype)

    def biases(self) -> Biases | None:
        """Return u and v; None if each layer has its own."""
        return None if self.config.untied_biases else (self.content.bias, self.distance.bias)


class TransformerXLModel(MemoryLanguageModel):
    """Transformer-XL with its softmax: a language model with a memory."""

    config: TransformerXLConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

    def setup(self) -> None:
        c = self.config
        self.encoder = TransformerXL(c)
        self.head = AdaptiveSoftmax(c.clusters, c.initializer, nn.initializers.normal(c.projection_range), c.dtype)

    @nn.nowrap
    def incremental(self) -> IncrementalWithMemory:
        """Return the model for incremental decoding, one token at a time.

        Raises:
            ValueError: it has no memory, so that a token would see nothing but itself.
        """
        if not self.config.memory:
            raise ValueError("a Transformer-XL without a memory (mem_len 0) does not generate text")
        return IncrementalWithMemory(self, Block(self.config))


def decoder_entries(c: TransformerXLConfig, prefix: str, path: tuple[str, ...], *, pooler: bool = False) -> list[Entry]:
    """Return the decoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    n, width, heads = c.layers, (c.width,), (c.heads, c.head_size)
    layer, at = f"{prefix}layers.{{layer}}.", (*path, "layers")
    attention_name, parts = f"{layer}dec_attn", [(*at, "attention", part) for part in ("query", "key", "value")]
    stored, where, count = (f"{attention_name}.", (*at, "attention"), n) if c.untied_biases else (prefix, path, None)
    linear = partial(linear_entries, layers=n)
    return [
        *embedding_entries(c.clusters, f"{prefix}word_emb", (*path, "embeddings")),
        *fused_entries(f"{attention_name}.qkv_net", parts, width, heads, n, bias=False),
        *linear(f"{attention_name}.r_net", (*at, "attention", "position"), width, heads, bias=False),
        *linear(f"{attention_name}.o_net", (*at, "attention", "out"), heads, width, bias=False),
        *(Entry(f"{stored}{name}", (*where, part, "bias"), same(*heads), count) for name, part in BIASES.items()),
        *norm_entries(f"{attention_name}.layer_norm", (*at, "attention_norm"), c.width, n),
        *linear(f"{layer}pos_ff.CoreNet.0", (*at, "feed_forward", "inner"), width, (c.feed_forward,)),
        *linear(f"{layer}pos_ff.CoreNet.3", (*at, "feed_forward", "outer"), (c.feed_forward,), width),
        *norm_entries(f"{layer}pos_ff.layer_norm", (*at, "feed_forward_norm"), c.width, n),
    ]


def _table(c: TransformerXLConfig, head: Sequence[Entry] = (), *, softmax: bool = False, bare: bool = False) -> Table:
    """Return the table of a model, with a head's entries or the softmax; `bare`: of the decoder alone."""
    prefix, path = ("", ()) if bare else (PREFIX, ("encoder",))
    entries, tied = [*decoder_entries(c, prefix, path), *head], {}
    if softmax:
        entries += softmax_entries(c.clusters, SOFTMAX, ("head",))
        tied |= tied_names(c.clusters, f"{prefix}word_emb", SOFTMAX)
    if not c.untied_biases:
        own = ((f"layers.{number}.dec_attn.{name}", name) for number in range(c.layers) for name in BIASES)
        tied |= {f"{prefix}{copy}": f"{prefix}{name}" for copy, name in own}
    computed = {f"{prefix}pos_emb.inv_freq": frequencies(c.width)}
    return Table(tuple(entries), prefix=PREFIX, tied=tied, computed=computed)


def _classifier_table(c: TransformerXLConfig) -> Table:
    return _table(c, linear_entries("score", ("classifier",), (c.width,), (c.num_labels,), bias=False))


def _classifier(c: TransformerXLConfig) -> WithHead:
    return WithHead(c, "classification", Form(names=("score",), last_bias=False), PARTS)


PREFIX, SOFTMAX = "transformer.", "crit"  # in the names of checkpoints
BIASES = {"r_w_bias": "content", "r_r_bias": "distance"}
PARTS = EncoderParts(TransformerXL, decoder_entries, prefix=PREFIX, classes="TransfoXL", pooler=False)
FAMILY = Family(
    config=TransformerXLConfig,
    title="Transformer-XL",
    paper="Dai et al. 2019",
    tokenizers=("byte-bpe", "words", "characters"),
    tokenizer_like="gpt2",
    architectures=(
        Architecture("TransfoXLLMHeadModel", "causal_lm", TransformerXLModel, partial(_table, softmax=True)),
        Architecture("TransfoXLModel", "encoder", TransformerXL, partial(_table, bare=True)),
        Architecture("TransfoXLForSequenceClassification", "classification", _classifier, _classifier_table),
    ),
    objectives=("causal+memory",),
    above=("content", "distance"),
)
