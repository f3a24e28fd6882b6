"""Dropout bits from a counter hash: identical in every backend, block size and partitioning of the batch.

A bit is a pure function of (seed, head, query, key) for attention and of (seed, position, channel) for hidden
activations. A seed is two 32-bit words. A *row seed* belongs to one row of the batch, so a row drops the same elements
whether it is computed alone, in a micro-batch, on another device or on another host. Where examples share rows, each
token can have the seed of its example, with queries, keys and positions counted from the example's first token: then
an example drops the same elements in whatever row and at whatever place it is.

Most of the work is done per query and per key, so that little is left per element. Each query gets two well-mixed
words, `a` and `b` (`query_words`, 31 integer operations per query and head), each key a well-mixed word `g`
(`key_words`, 9 operations); an element then costs seven 32-bit operations, two of them multiplications:

    x = (g ^ a) * M1 + b;  x = (x ^ (x >> 16)) * M2;  keep = x >= rate * 2**32

All arithmetic is modulo 2**32 on uint32. The mixing function is `lowbias32` of C. Wellons' hash prospector.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_GOLDEN = np.uint32(0x9E3779B9)
_M1 = np.uint32(0x7FEB352D)
_M2 = np.uint32(0x846CA68B)


def _mix(x: Array) -> Array:
    """Mix 32-bit words bijectively: flipping an input bit flips every output bit about half of the time."""
    x = (x ^ (x >> 16)) * _M1
    x = (x ^ (x >> 15)) * _M2
    return x ^ (x >> 16)


def fold(a: Array, b: Array, index: Array) -> tuple[Array, Array]:
    """Hash the pair of words (a, b) with an index; all three are uint32 and broadcast together.

    For a fixed index this is a bijection of pairs; for a fixed pair, no two indices give the same first word.
    """
    first = _mix(a ^ _mix(index * _GOLDEN + b))
    second = _mix(b + (first >> 16 | first << 16))
    return first, second


def row_seeds(seed: Array, rows: Array) -> Array:
    """Derive one seed per row, or per example, from the seed of the batch and the numbers of the rows or examples.

    Args:
      seed: uint32 [2], for example `jax.random.bits(key, (2,), "uint32")`.
      rows: integers [B], each row's index in the *global* batch, so that a row keeps its seed however the batch is
        partitioned; or of any other shape, such as [B, L], the number of each token's example.

    Returns:
      uint32 [B, 2], or [..., 2], which `attention(dropout_seed=...)` and `hash_dropout` take.
    """
    if seed.shape != (2,) or seed.dtype != jnp.uint32:
        raise ValueError(f"seed: expected uint32 [2], found {seed.dtype} {list(seed.shape)}")
    if rows.ndim < 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"rows: expected integers [B] or [B, L], found {rows.dtype} {list(rows.shape)}")
    return jnp.stack(fold(seed[0], seed[1], rows.astype(jnp.uint32)), axis=-1)


class Words(NamedTuple):
    """The words from which attention's dropout bits are computed, by `keep`."""

    a: Array
    """uint32 [B, H, L]"""
    b: Array
    """uint32 [B, H, L]"""
    g: Array
    """uint32 [1 or B, S]"""


def query_words(seeds: Array, heads: Array, queries: Array) -> tuple[Array, Array]:
    """Return two words, uint32 [B, H, L], per (row, head, query).

    Args:
      seeds: uint32 [B, 2], or [B, L, 2] with one seed per query.
      heads: integers [H], indices of the heads.
      queries: integers [L], indices of the queries, or [B, L], their positions within their examples.
    """
    first, second = (seeds[..., part].reshape(len(seeds), 1, -1) for part in (0, 1))  # [B, 1, 1 or L]
    a, b = fold(first, second, heads.astype(jnp.uint32)[None, :, None])
    queries = queries.astype(jnp.uint32)
    return fold(a, b, queries[None, None, :] if queries.ndim == 1 else queries[:, None, :])


def key_words(keys: Array) -> Array:
    """Return one word per key (or channel): integers of any shape -> uint32 of that shape."""
    return _mix(keys.astype(jnp.uint32) + _GOLDEN)


def keep(a: Array, b: Array, g: Array, rate: float) -> Array:
    """Return which elements dropout keeps (bool), from `a`, `b` of the query and `g` of the key, broadcast together."""
    x = (g ^ a) * _M1 + b
    return (x ^ (x >> 16)) * _M2 >= np.uint32(threshold(rate))


def threshold(rate: float) -> int:
    """Return the smallest 32-bit word that is kept: a fraction `rate` of all words is below it."""
    return min(round(rate * 2**32), 2**32 - 1)


def check_rate(name: str, rate: float) -> float:
    """Return `rate` as a float; raise ValueError unless it is a number in [0, 1)."""
    if not isinstance(rate, int | float | np.floating | np.integer) or not 0 <= rate < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), found {rate!r}")
    return float(rate)


def hash_dropout(x: Array, rate: float, seeds: Array, positions: Array | None = None) -> Array:
    """Apply inverted dropout to hidden activations: zero elements with probability `rate`, divide others by `1 - rate`.

    The bits depend only on (seed, position, flat index over the dimensions between those of the seeds and the last,
    index in the last dimension). The backward pass recomputes them instead of storing them.

    Args:
      x: float [B, ...].
      rate: dropout rate in [0, 1); 0 returns `x` itself.
      seeds: uint32 [B, 2], one per row, or [B, L, 2], one per token of x [B, L, ...] (see `row_seeds`). Two calls with
        the same seeds drop the same elements: use different seeds for each place in a model.
      positions: integers [B] or [B, L], like the seeds, that tell apart what has the same seed, such as the tokens of
        an example; None for 0.

    Returns:
      An array like `x`.

    Raises:
      ValueError: `rate` or the shapes do not fit.
    """
    rate = check_rate("rate", rate)
    lead = seeds.shape[:-1]
    if not 1 <= len(lead) <= 2 or seeds.shape != (*x.shape[: len(lead)], 2) or seeds.dtype != jnp.uint32:
        raise ValueError(
            f"seeds: expected uint32 [B, 2] or [B, L, 2] for x {list(x.shape)}, found {seeds.dtype} {list(seeds.shape)}"
        )
    if positions is not None and (positions.shape != lead or not jnp.issubdtype(positions.dtype, jnp.integer)):
        raise ValueError(f"positions: expected integers {list(lead)}, found {positions.dtype} {list(positions.shape)}")
    return x if rate == 0 else _dropout(rate, x, seeds, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(rate: float, x: Array, seeds: Array, positions: Array | None) -> Array:
    lead = seeds.ndim - 1
    shape = (*x.shape, 1) if x.ndim == lead else x.shape
    *middle, channels = shape[lead:]
    count = math.prod(middle)
    index = jnp.arange(count, dtype=jnp.uint32).reshape(*[1] * lead, count)
    if positions is not None:
        index = positions.astype(jnp.uint32)[..., None] * np.uint32(count) + index
    # The barrier keeps XLA from mixing these words anew for every channel: 3 times as long, with seeds by token.
    words = jax.lax.optimization_barrier(fold(seeds[..., 0, None], seeds[..., 1, None], index))
    a, b = (word.reshape(*shape[:-1], 1) for word in words)
    g = key_words(jnp.arange(channels, dtype=jnp.uint32)).reshape(*[1] * (len(shape) - 1), channels)
    kept = keep(a, b, g, rate).reshape(x.shape)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def _dropout_forward(rate: float, x: Array, seeds: Array, positions: Array | None) -> tuple[Array, tuple[Any, ...]]:
    return _dropout(rate, x, seeds, positions), (seeds, positions)


def _dropout_backward(rate: float, saved: tuple[Any, ...], cotangent: Array) -> tuple[Array, None, None]:
    return _dropout(rate, cotangent, *saved), None, None


_dropout.defvjp(_dropout_forward, _dropout_backward)
