"""Transformer-XL: a decoder that reads a text in segments, and attends to its hidden states of those before.

Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context".

What sets it apart from its neighbours: each layer's keys and values are of its inputs now and before, the *memory*, to
which no gradient flows (3.2); positions enter each layer's attention as distances (3.3); post-norm; an adaptive
softmax. The score of query i and key j, with R the sinusoids of their distance and u, v vectors of each head, is

    ((W_q x_i + u) . W_k x_j + (W_q x_i + v) . W_r R_{i-j}) / sqrt(D)

The sinusoids are all sines and then all cosines, their distances at most `clamp` (for evaluation with a memory longer
than in training). With `same_length`, every token attends to as many tokens as the memory has slots, itself included.

New weights are drawn from N(0, 0.02²), norms' gains from N(1, 0.02²), projections of words from N(0, 0.01²).

A memory has a fixed number of slots, the newest last. A slot of segment 0 is empty, and nothing attends to it: a text
begins with an empty memory. (The reference begins with zeros that are attended to.) Segments are those of packed rows:
if a memory's differ from a row's, the row does not see it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ...kernels import DistanceKeys, attention
from ...kernels.hash import row_seeds
from ..checkpoints.tables import Entry, Table, fused_entries, linear_entries, norm_entries, same
from ..family import Architecture, EncoderConfig, Family
from ..heads.adaptive_softmax import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    Clusters,
    Vectors,
    embedding_entries,
    softmax_entries,
    tied_names,
)
from ..heads.losses import IGNORED_LABEL, WeightedSum
from ..layers.dropout import Dropout, dropout_seed
from ..layers.feed_forward import FeedForward
from ..layers.linear import Linear
from ..layers.norms import LayerNorm
from ..layers.segments import row_numbers
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
        "adaptive": (True,),
        "attn_type": (0,),
        "init": ("normal",),
        "sample_softmax": (-1, 0),
        "tie_word_embeddings": (True,),
        "quantization_config": (None,),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = ("model_type", "architectures", "proj_share_all_but_first")
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


class Memory(NamedTuple):
    """What was read before: each layer's last inputs. Slots are in the order of the text, the newest last."""

    hidden: Array  # [N, B, M, E], without gradient
    segment_ids: Array  # [B, M] int32, 0 for an empty slot


class Distances(NamedTuple):
    """What all layers share about positions; S keys are those of the memory's first slots that any token attends to."""

    sinusoids: Array  # [1, S, E], of distances S - 1 to 0
    query_segment_ids: Array  # [B, L]
    key_segment_ids: Array  # [B, S]


class RelativeAttention(nn.Module):
    """Attention to the layer's input and its memory, by contents and distances (3.3)."""

    config: TransformerXLConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        context: Array,
        rows: Array,
        distances: Distances,
        biases: tuple[Array, Array] | None,
        *,
        deterministic: bool,
    ) -> Array:
        """Attend from hidden [B, L, E] to context [B, S, E], whose end it is; `biases` are u and v, None for own ones.

        Returns:
            [B, L, E]
        """
        c = self.config
        shape, axes = (c.heads, c.head_size), ("embed", "heads", "head_dim")
        project = partial(Linear, shape, axes, c.initializer, c.dtype, use_bias=False)
        query, key, value = project(name="query")(hidden), project(name="key")(context), project(name="value")(context)
        keys = project(name="position")(distances.sinusoids)[0]
        u, v = biases or tuple(_head_bias(c, name=name).bias for name in ("content", "distance"))
        past = context.shape[1] - hidden.shape[1]  # token i is number past + i of the context
        left = c.memory - 1 - past if c.same_length else None
        attended = attention(
            query + u.astype(query.dtype)[None, None],
            key,
            value,
            bias=DistanceKeys(query + v.astype(query.dtype)[None, None], keys),
            window=(left, past),
            query_segment_ids=distances.query_segment_ids,
            key_segment_ids=distances.key_segment_ids,
            implementation=c.attention_implementation,
            **self._dropout(rows, deterministic),
        )
        return Linear((c.width,), ("heads", "head_dim", "embed"), c.initializer, c.dtype, False, name="out")(attended)

    def _dropout(self, rows: Array, deterministic: bool) -> dict[str, Any]:
        rate = self.config.attention_dropout
        if deterministic or not rate:
            return {}
        return {"dropout_rate": rate, "dropout_seed": row_seeds(dropout_seed(self), rows)}


def _head_bias(c: TransformerXLConfig, name: str | None = None) -> Vectors:
    """Return the module of u or v, [H, D]."""
    return Vectors((c.heads, c.head_size), ("heads", "head_dim"), c.initializer, "bias", name=name)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added and then normalised, or normalised before (`pre_norm`)."""

    config: TransformerXLConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        rows: Array,
        distances: Distances,
        biases: tuple[Array, Array] | None,
        memory: Array,
        *,
        deterministic: bool,
    ) -> Array:
        """Transform hidden states [B, L, E] -> [B, L, E], with this layer's memory [B, M, E]."""
        c = self.config
        norm = partial(LayerNorm, c.norm_epsilon, c.dtype, scale_init=c.gain_initializer)
        attention_norm, feed_forward_norm = norm(name="attention_norm"), norm(name="feed_forward_norm")
        relative = RelativeAttention(c, name="attention")
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
            self.content, self.distance = _head_bias(c), _head_bias(c)

    def __call__(
        self, input_ids: Array, memory: Memory, segment_ids: Array, rows: Array, *, deterministic: bool
    ) -> tuple[Array, Memory]:
        """Read rows of tokens; see `TransformerXLModel.read`."""
        c = self.config
        length, slots = input_ids.shape[1], memory.segment_ids.shape[1]
        seen = jnp.concatenate([memory.segment_ids, segment_ids], axis=1)
        # With `same_length`, no token attends to the first slots of a memory of at least that length.
        unseen = max(0, slots - c.memory + 1) if c.same_length else 0
        count = length + slots - unseen
        distances = Distances(self._sinusoids(count, deterministic), segment_ids, seen[:, unseen:])
        biases = None if c.untied_biases else (self.content.bias, self.distance.bias)
        embedded = self.embeddings(input_ids) * jnp.asarray(c.width**0.5, c.dtype)
        entered = self.drop(embedded, rows, deterministic=deterministic)
        hidden, outputs = run_layers(
            self.layers,
            entered,
            rows,
            distances,
            biases,
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
        return self.drop(hidden, rows, deterministic=deterministic), new

    def _sinusoids(self, count: int, deterministic: bool) -> Array:
        """Return the sinusoids of distances count - 1 to 0, [1, count, E]."""
        c = self.config
        distances = np.arange(count - 1, -1, -1, dtype=np.float32)
        distances = distances if c.clamp is None else np.minimum(distances, np.float32(c.clamp))
        angles = jnp.asarray(distances)[:, None] * jnp.asarray(_frequencies(c.width))[None]
        found = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[None].astype(c.dtype)
        return self.drop(found, jnp.zeros(1, jnp.uint32), deterministic=deterministic)


def _frequencies(width: int) -> np.ndarray:
    """Return the frequencies of the sinusoids, 10000^(-2i / E), [E / 2] float32, in the reference's order."""
    return np.float32(1) / np.power(np.float32(10_000), np.arange(0, width, 2, dtype=np.float32) / np.float32(width))


class TransformerXLModel(nn.Module):
    """Transformer-XL with its softmax: a language model with a memory."""

    config: TransformerXLConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = TransformerXL(c)
        self.head = AdaptiveSoftmax(c.clusters, c.initializer, nn.initializers.normal(c.projection_range), c.dtype)

    def __call__(self, input_ids: Array) -> Array:
        """Compute the log-probabilities of each next token, [B, L, V] float32, of texts [B, L] int32 from the start."""
        return self.log_probabilities(self.output_states(input_ids))

    def read(
        self,
        input_ids: Array,
        memory: Memory,
        segment_ids: Array | None = None,
        *,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Memory]:
        """Read the next tokens of texts.

        Args:
            input_ids: [B, L] int32.
            memory: of what was read before.
            segment_ids: [B, L] int32, 0 for padding; tokens attend to those of their own segment, in the memory too.
                None for ones.
            rows: [B] uint32, row numbers, which determine with the "dropout" stream what is dropped; None for 0, 1, ...
            deterministic: disable dropout.

        Returns:
            (the last layer's output [B, L, E], the memory after these tokens, of as many slots)
        """
        segment_ids = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids
        numbers: Any = row_numbers(rows, input_ids)
        return self.encoder(input_ids, memory, segment_ids, numbers, deterministic=deterministic)

    def output_states(
        self,
        input_ids: Array,
        segment_ids: Array | None = None,
        *,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Read whole texts, with no memory before them; as `read`, but [B, L, E] alone."""
        none = self.empty_memory(len(input_ids), 0)
        return self.read(input_ids, none, segment_ids, rows=rows, deterministic=deterministic)[0]

    def log_probabilities(self, states: Array) -> Array:
        """Compute the log-probabilities of all words, [..., V] float32, from states [..., E] of `read`."""
        return self.head.log_probabilities(states, self.encoder.embeddings)

    def token_losses(self, states: Array, labels: Array) -> Array:
        """Compute -log p of the tokens after others: states [B, L, E] and labels [B, L] int -> [B, L] float32."""
        return self.head.token_losses(states, labels, self.encoder.embeddings)

    def loss(self, states: Array, labels: Array, label_weights: Array | None = None) -> WeightedSum:
        """Compute the sum of the losses of next tokens; `losses.IGNORED_LABEL` has weight 0."""
        ignored = labels == IGNORED_LABEL
        weights = jnp.ones(labels.shape, jnp.float32) if label_weights is None else label_weights
        weights = jnp.where(ignored, 0.0, weights)
        losses = self.token_losses(states, jnp.where(ignored, 0, labels))
        return WeightedSum((losses * weights).sum(), weights.sum())

    @nn.nowrap
    def empty_memory(self, rows: int, slots: int | None = None) -> Memory:
        """Return an empty memory of `slots` tokens for each of `rows` rows; None for the config's number."""
        c = self.config
        slots = c.memory if slots is None else slots
        hidden = jnp.zeros((c.layers, rows, slots, c.width), c.dtype)
        return Memory(hidden, jnp.zeros((rows, slots), jnp.int32))

    @nn.nowrap
    def incremental(self) -> NoReturn:
        """Raise NotImplementedError: a batch of prompts of unlike lengths would need a memory of each."""
        raise NotImplementedError("Transformer-XL: generation is not implemented.")


def checkpoint_table(c: TransformerXLConfig) -> Table:
    """Return the table of the model's parameters and their names in checkpoints."""
    n, width, heads = c.layers, (c.width,), (c.heads, c.head_size)
    layer, at = "transformer.layers.{layer}.", ("encoder", "layers")
    attention_name, parts = f"{layer}dec_attn", [(*at, "attention", part) for part in ("query", "key", "value")]
    words, softmax = "transformer.word_emb", "crit"
    tied = tied_names(c.clusters, words, softmax)
    biases = {"r_w_bias": "content", "r_r_bias": "distance"}
    if c.untied_biases:
        own = [
            Entry(f"{attention_name}.{stored}", (*at, "attention", name, "bias"), same(*heads), n)
            for stored, name in biases.items()
        ]
    else:
        own = [Entry(f"transformer.{s}", ("encoder", name, "bias"), same(*heads)) for s, name in biases.items()]
        tied |= {
            f"{attention_name.format(layer=number)}.{stored}": f"transformer.{stored}"
            for number in range(n)
            for stored in biases
        }
    linear = partial(linear_entries, layers=n)
    entries = [
        *embedding_entries(c.clusters, words, ("encoder", "embeddings")),
        *fused_entries(f"{attention_name}.qkv_net", parts, width, heads, n, bias=False),
        *linear(f"{attention_name}.r_net", (*at, "attention", "position"), width, heads, bias=False),
        *linear(f"{attention_name}.o_net", (*at, "attention", "out"), heads, width, bias=False),
        *own,
        *norm_entries(f"{attention_name}.layer_norm", (*at, "attention_norm"), c.width, n),
        *linear(f"{layer}pos_ff.CoreNet.0", (*at, "feed_forward", "inner"), width, (c.feed_forward,)),
        *linear(f"{layer}pos_ff.CoreNet.3", (*at, "feed_forward", "outer"), (c.feed_forward,), width),
        *norm_entries(f"{layer}pos_ff.layer_norm", (*at, "feed_forward_norm"), c.width, n),
        *softmax_entries(c.clusters, softmax, ("head",)),
    ]
    computed = {"transformer.pos_emb.inv_freq": _frequencies(c.width)}
    return Table(tuple(entries), tied=tied, computed=computed)


FAMILY = Family(
    config=TransformerXLConfig,
    title="Transformer-XL",
    paper="Dai et al. 2019",
    tokenizers=("byte-bpe",),
    tokenizer_like="gpt2",
    architectures=(Architecture("TransfoXLLMHeadModel", "causal_lm", TransformerXLModel, checkpoint_table),),
    objectives=("causal+memory",),
    above=("content", "distance"),
    one_kind=True,
)
