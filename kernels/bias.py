"""What may be added to attention's scores: a dense array, a learned relative bias (T5), or linear slopes (ALiBi).

The last two depend on `key - query` alone. They are written as one *Toeplitz row* a head, [H, L+S-1], which holds the
bias of every distance once: `row[h, j - i + L - 1]` is added to the score of query i and key j. The row is built by
ordinary differentiable code, so a backend that returns the row's gradient has the table's or the slopes' gradient too.

Distances are counted in the row of tokens. In a packed row every example is contiguous, and attention stays within it,
so they are the distances within the example too.
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
    """Any bias, written out. It costs memory and bandwidth of its own size: for what the other kinds cannot say.

    Attributes:
      value: float [1 or B, 1 or H, L, S], added to the scores in float32. An entry of -inf masks.
    """

    value: Array


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["bidirectional", "max_distance"])
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's learned bias: one number for each head and each bucket of distances (Raffel et al. 2020, 2.1).

    Attributes:
      table: float [buckets, H], the released checkpoints' layout. `buckets` is even when bidirectional.
      bidirectional: half of the buckets for keys after the query (an encoder), or none (a causal decoder, where all
        later keys share bucket 0 with the query's own).
      max_distance: tokens; from here on all distances share the last bucket.
    """

    table: Array
    bidirectional: bool = True
    max_distance: int = 128


@partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AlibiBias:
    """A penalty that grows with distance, `-slopes[h] * |key - query|` (Press et al. 2022, 3).

    Attributes:
      slopes: float [H], positive.
    """

    slopes: Array


Bias = DenseBias | RelativeBias | AlibiBias


def bucket_edges(*, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """The smallest distance of each bucket of one direction but the first: int32, ascending.

    Counting the edges that a distance has reached is its bucket. The formula's logarithm is taken here, once, in
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
    """T5's bucket of each distance `key - query`: small distances one by one, larger ones on a logarithmic scale.

    Args:
      distance: integers of any shape.
      bidirectional: whether keys after the query have buckets of their own (the upper half).
      buckets: how many buckets in all.
      max_distance: from here on all distances share the last bucket.

    Returns:
      int32 of the same shape, in [0, buckets).

    Raises:
      ValueError: too few buckets for the distances.
    """
    edges = bucket_edges(bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
    distance = jnp.asarray(distance).astype(jnp.int32)
    length = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    reached = length[..., None] >= edges.reshape((1,) * distance.ndim + (-1,))
    bucket = jnp.sum(reached, axis=-1, dtype=jnp.int32)
    return bucket + jnp.where(distance > 0, buckets // 2, 0) if bidirectional else bucket


def toeplitz_row(bias: RelativeBias | AlibiBias, queries: int, keys: int) -> Array:
    """The bias of every distance, once: `row[h, j - i + queries - 1]` is that of query i and key j.

    Args:
      bias: which one.
      queries: L.
      keys: S.

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
    """A Toeplitz row [H, L+S-1] written out as [H, L, S], without a gather (whose gradient would be a scatter).

    Copies of the row, each one element longer than the row, laid one after the other and cut again at the row's length:
    each cut starts one element later within its copy than the cut before it.
    """
    heads, length = row.shape
    copies = jnp.broadcast_to(jnp.pad(row, ((0, 0), (0, 1)))[:, None, :], (heads, queries, length + 1))
    skewed = copies.reshape(heads, queries * (length + 1))[:, : queries * length].reshape(heads, queries, length)
    return skewed[:, :, queries - 1 :]


def _wide(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float32))


def dense_bias(bias: Bias, queries: int, keys: int) -> Array:
    """Any bias written out: [1 or B, 1 or H, queries, keys]."""
    if isinstance(bias, DenseBias):
        return bias.value
    return dense_from_toeplitz(toeplitz_row(bias, queries, keys), queries, keys)[None]
