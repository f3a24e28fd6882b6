"""Biases added to attention scores: a dense array, a learned relative bias (T5), linear slopes (ALiBi), or products of
queries with keys of distances (Transformer-XL).

T5's and ALiBi's depend on `key - query` only. They are expressed as one *Toeplitz row* per head, [H, L+S-1], which
holds the bias of every distance once: `row[h, j - i + L - 1]` is added to the score of query i and key j. The row is
built by ordinary differentiable code, so a backend that returns the row's gradient provides that of the table or slopes
too.

Distances are counted in the packed row. Every example in it is contiguous and attention stays within it, so they equal
the distances within the example.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseBias:
    """An arbitrary bias, as an array. It costs memory and bandwidth of its own size: prefer the other kinds.

    Attributes:
      value: float [1 or B, 1 or H, L, S], added to the scores in float32. An entry of -inf masks.
    """

    value: Array


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["bidirectional", "max_distance"])
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's learned bias: one number per head and bucket of distances (Raffel et al. 2020, 2.1).

    Attributes:
      table: float [buckets, H], the layout of released checkpoints. `buckets` is even if bidirectional.
      bidirectional: whether half of the buckets are for keys after the query (encoder). Otherwise (causal decoder) all
        later keys share bucket 0 with the query's own position.
      max_distance: distance, in tokens, from which on all distances share the last bucket.
    """

    table: Array
    bidirectional: bool = True
    max_distance: int = 128


@partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AlibiBias:
    """A penalty that grows linearly with distance, `-slopes[h] * |key - query|` (Press et al. 2022, 3).

    Attributes:
      slopes: float [H], positive.
    """

    slopes: Array


@partial(jax.tree_util.register_dataclass, data_fields=["query", "keys"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DistanceKeys:
    """Products of queries with a key for each distance, scaled as the scores are (Dai et al. 2019, 3.3, terms b and d).

    `scale * query[b, i, h] . keys[j - i + L - 1, h]` is added to the score of query i and key j. Distances that have no
    key get nothing: those of later tokens, which causal attention or a window hides, may be left out.

    Attributes:
      query: [B, L, H, F], of the dtype of attention's queries, but of any size F.
      keys: [R, H, F] of the same dtype, R <= L + S - 1: those of the distances 1 - L, 2 - L, ...
    """

    query: Array
    keys: Array


Bias = DenseBias | RelativeBias | AlibiBias | DistanceKeys


def bucket_edges(*, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Return the smallest distance of each bucket of one direction except the first: int32, ascending.

    The number of edges that a distance has reached is its bucket. The formula's logarithm is computed here, once, in
    float32 and in the reference's order of operations: its rounding decides on which side of an edge a distance falls,
    and a device's own logarithm rounds differently.
    """
    per_direction = buckets // 2 if bidirectional else buckets
    exact = per_direction // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"bias: expected at least {4 if bidirectional else 2} buckets and a max_distance beyond the "
            f"distances that have a bucket of their own, found {buckets} buckets, max_distance {max_distance}"
        )
    distance = np.arange(exact, max_distance + 1, dtype=np.float32)
    share = np.log(distance / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    large = exact + (share * np.float32(per_direction - exact)).astype(np.int32)
    large = np.minimum(large, per_direction - 1)
    # A bucket that rounding leaves empty starts where the next one does.
    logarithmic = exact + np.searchsorted(large, np.arange(exact + 1, per_direction))
    return np.concatenate([np.arange(1, exact + 1), logarithmic]).astype(np.int32)


def relative_position_bucket(distance: Array, *, bidirectional: bool, buckets: int, max_distance: int) -> Array:
    """Return T5's bucket of each distance `key - query`: one per small distance, then on a logarithmic scale.

    Args:
      distance: integers of any shape.
      bidirectional: whether keys after the query have buckets of their own (the upper half).
      buckets: total number of buckets.
      max_distance: distance from which on all distances share the last bucket.

    Returns:
      int32 of the same shape, in [0, buckets).

    Raises:
      ValueError: there are too few buckets for the distances.
    """
    edges = bucket_edges(bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
    distance = jnp.asarray(distance).astype(jnp.int32)
    length = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    reached = length[..., None] >= edges.reshape((1,) * distance.ndim + (-1,))
    bucket = jnp.sum(reached, axis=-1, dtype=jnp.int32)
    return bucket + jnp.where(distance > 0, buckets // 2, 0) if bidirectional else bucket


def toeplitz_row(bias: RelativeBias | AlibiBias, queries: int, keys: int) -> Array:
    """Return the bias of every distance once: `row[h, j - i + queries - 1]` is the bias of query i and key j.

    Args:
      bias: the bias.
      queries: number of queries, L.
      keys: number of keys, S.

    Returns:
      [H, L + S - 1], float32 (float64 for float64 parameters). Differentiable.
    """
    distance = jnp.arange(1 - queries, keys, dtype=jnp.int32)
    if isinstance(bias, AlibiBias):
        slopes = _wide(bias.slopes)
        return -slopes[:, None] * jnp.abs(distance).astype(slopes.dtype)[None, :]
    table = _wide(bias.table)
    buckets = table.shape[0]
    bucket = relative_position_bucket(
        distance, bidirectional=bias.bidirectional, buckets=buckets, max_distance=bias.max_distance
    )
    # A product with a one-hot matrix rather than a gather: its gradient is a product too, not a scatter.
    chosen = bucket[None, :] == jnp.arange(buckets, dtype=jnp.int32)[:, None]
    return jnp.einsum("nh,nr->hr", table, chosen.astype(table.dtype), precision=jax.lax.Precision.HIGHEST)


def dense_from_toeplitz(row: Array, queries: int, keys: int) -> Array:
    """Expand a Toeplitz row [H, L+S-1] to [H, L, S], without a gather (whose gradient would be a scatter).

    L copies of the row, each padded by one element, are concatenated and reshaped to the row's length: each of the
    resulting rows starts one element earlier within its copy than the one before it.
    """
    heads, length = row.shape
    copies = jnp.broadcast_to(jnp.pad(row, ((0, 0), (0, 1)))[:, None, :], (heads, queries, length + 1))
    skewed = copies.reshape(heads, queries * (length + 1))[:, : queries * length].reshape(heads, queries, length)
    return skewed[:, :, queries - 1 :]


def dense_from_products(products: Array, queries: int) -> Array:
    """Arrange products with the keys of distances by keys: [B, H, L, L+S-1] -> [B, H, L, S].

    Entry j of query i's row is its entry `j - i + L - 1`. Padded by one element, the rows of all queries are reshaped
    as in `dense_from_toeplitz`.
    """
    *lead, _, length = products.shape
    padded = jnp.pad(products, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(*lead, queries * (length + 1))
    return padded[..., : queries * length].reshape(*lead, queries, length)[..., queries - 1 :]


def _wide(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float32))


def dense_bias(bias: DenseBias | RelativeBias | AlibiBias, queries: int, keys: int) -> Array:
    """Expand a bias that does not depend on queries to an array [1 or B, 1 or H, queries, keys]."""
    if isinstance(bias, DenseBias):
        return bias.value
    return dense_from_toeplitz(toeplitz_row(bias, queries, keys), queries, keys)[None]
