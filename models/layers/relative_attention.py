"""Attention to a segment and the one before it, by contents and distances (Dai et al. 2019, 3.3).

The score of query i and key j, with R the sinusoids of their distance and u, v vectors of each head, is

    ((W_q x_i + u) . W_k x_j + (W_q x_i + v) . W_r R_{i-j}) / sqrt(D)
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ...kernels import DistanceKeys, attention
from ...kernels.hash import row_seeds
from .attention import attend_slots, write_slots
from .dropout import dropout_seed
from .linear import Linear, Vectors

Biases = tuple[Array, Array]
"""u and v, [H, D] each."""


class Distances(NamedTuple):
    """What all layers share about positions; S keys are those of the memory's first slots that any token attends to."""

    sinusoids: Array  # [1, S, E], of distances S - 1 to 0
    query_segment_ids: Array  # [B, L]
    key_segment_ids: Array  # [B, S]


def frequencies(width: int) -> np.ndarray:
    """Return the frequencies of the sinusoids, 10000^(-2i / E), [E / 2] float32, in the reference's order."""
    return np.float32(1) / np.power(np.float32(10_000), np.arange(0, width, 2, dtype=np.float32) / np.float32(width))


def sinusoids(count: int, width: int, clamp: int | None, dtype: str) -> Array:
    """Return the sinusoids of distances count - 1 to 0, at most `clamp`, sines before cosines: [1, count, E]."""
    distances = np.arange(count - 1, -1, -1, dtype=np.float32)
    distances = distances if clamp is None else np.minimum(distances, np.float32(clamp))
    angles = jnp.asarray(distances)[:, None] * jnp.asarray(frequencies(width))[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[None].astype(dtype)


def head_bias(heads: int, head_size: int, initializer: Initializer, name: str | None = None) -> Vectors:
    """Return the module of u or v, whose `bias` is [H, D]."""
    return Vectors((heads, head_size), ("heads", "head_dim"), initializer, "bias", name=name)


class RelativeAttention(nn.Module):
    """Multi-head attention by contents and distances; projections have no biases but u and v.

    Attributes:
        width: size of the hidden states, E.
        heads: number of heads, H.
        head_size: D.
        dropout: dropout rate of the attention probabilities.
        kernel_init: initialiser of the projections' kernels, and of u and v if they are this module's.
        own_biases: whether u and v are this module's parameters.
        span: number of tokens that each token attends to, its own included; None for all before it.
        dtype: data type of the computation.
        implementation: backend of `kernels.attention`; None for the fastest.
    """

    width: int
    heads: int
    head_size: int
    dropout: float
    kernel_init: Initializer
    own_biases: bool
    span: int | None = None
    dtype: str = "float32"
    implementation: str | None = None

    def setup(self) -> None:
        shape, axes = (self.heads, self.head_size), ("embed", "heads", "head_dim")
        project = partial(Linear, shape, axes, self.kernel_init, self.dtype, use_bias=False)
        self.query, self.key, self.value, self.position = project(), project(), project(), project()
        self.out = Linear((self.width,), ("heads", "head_dim", "embed"), self.kernel_init, self.dtype, False)
        if self.own_biases:
            self.content, self.distance = (head_bias(*shape, self.kernel_init) for _ in range(2))

    def __call__(
        self,
        hidden: Array,
        context: Array,
        rows: Array,
        distances: Distances,
        biases: Biases | None,
        *,
        deterministic: bool,
    ) -> Array:
        """Attend from hidden [B, L, E] to context [B, S, E], whose end it is; `biases` are None for own ones.

        Returns:
            [B, L, E]
        """
        content, distance = self._queries(hidden, biases)
        key, value = self.key(context), self.value(context)
        past = context.shape[1] - hidden.shape[1]  # token i is number past + i of the context
        dropped: dict[str, Any] = {}
        if self.dropout and not deterministic:
            dropped = {"dropout_rate": self.dropout, "dropout_seed": row_seeds(dropout_seed(self), rows)}
        attended = attention(
            content,
            key,
            value,
            bias=DistanceKeys(distance, self.position(distances.sinusoids)[0]),
            window=(None if self.span is None else self.span - 1 - past, past),
            query_segment_ids=distances.query_segment_ids,
            key_segment_ids=distances.key_segment_ids,
            implementation=self.implementation,
            **dropped,
        )
        return self.out(attended)

    def _queries(self, hidden: Array, biases: Biases | None) -> tuple[Array, Array]:
        """Return the queries of contents and of distances, [B, L, H, D] each."""
        query = self.query(hidden)
        u, v = biases or (self.content.bias, self.distance.bias)
        return query + u.astype(query.dtype)[None, None], query + v.astype(query.dtype)[None, None]

    def distance_keys(self, sinusoids: Array) -> Array:
        """Compute the keys of distances [H, D, S] from their sinusoids [1, S, E]."""
        return jnp.moveaxis(self.position(sinusoids)[0], 0, 2)

    def keys_values(self, context: Array) -> tuple[Array, Array]:
        """Compute the keys [B, H, D, S] and the values [B, H, S, D] of a context [B, S, E]."""
        return jnp.moveaxis(self.key(context), 1, 3), jnp.swapaxes(self.value(context), 1, 2)

    def write(self, hidden: Array, keys: Array, values: Array, places: Array) -> tuple[Array, Array]:
        """Add the keys and values of one token per beam, as `Attention.write`."""
        return write_slots(keys, values, self.key(hidden), self.value(hidden), places)

    def step(
        self,
        hidden: Array,
        biases: Biases | None,
        distance_keys: Array,
        parts: list[tuple[Array, Array, Array]],
        distances: Array,
    ) -> Array:
        """Attend from one token of each of a row's beams, which share the row's keys and values.

        Args:
            hidden: [B, K, E], K beams per row.
            biases: u and v; None for own ones.
            distance_keys: [H, D, C], of distances from 0.
            parts: (keys [B, H, D, S], values [B, H, S, D], mask [B, 1 or K, S]) of tokens, as for `Attention.step`.
            distances: [B, S] int32, of the tokens of all parts, from 0 to C - 1 where they are seen.

        Returns:
            [B, K, E]
        """
        scale = jnp.asarray(self.head_size**-0.5, self.dtype)
        content, distance = (query * scale for query in self._queries(hidden, biases))
        products = jnp.einsum("bkhd,hdc->bhkc", distance, distance_keys, preferred_element_type=jnp.float32)
        places = jnp.clip(distances, 0, distance_keys.shape[2] - 1)[:, None, None]
        bias = jnp.take_along_axis(products, places, axis=3)
        return self.out(attend_slots(content, parts, bias)[0])
