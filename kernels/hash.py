"""Dropout bits from a counter hash: identical in every backend, block size and partitioning of the batch.

A bit is a pure function of (row seed, head, query, key) for attention and of (row seed, position, channel) for hidden
activations. A *row seed* is two 32-bit words that belong to one row of the batch, so a row drops the same elements
whether it is computed alone, in a micro-batch, on another device or on another host.

Most of the work is done per query and per key, so that little is left per element. Each query gets two well-mixed
words, `a` and `b` (`query_words`, 31 integer operations per query and head), each key a well-mixed word `g`
(`key_words`, 9 operations); an element then costs seven 32-bit operations, two of them multiplications:

    x = (g ^ a) * M1 + b;  x = (x ^ (x >> 16)) * M2;  keep = x >= rate * 2**32

All arithmetic is modulo 2**32 on uint32. The mixing function is `lowbias32` of C. Wellons' hash prospector.
"""

from __future__ import annotations

import functools
import math

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
    """Derive one seed per row from the seed of the batch and the indices of the rows.

    Args:
      seed: uint32 [2], for example `jax.random.bits(key, (2,), "uint32")`.
      rows: integers [B], each row's index in the *global* batch, so that a row keeps its seed however the batch is
        partitioned.

    Returns:
      uint32 [B, 2], which `attention(dropout_seed=...)` and `hash_dropout` take.
    """
    if seed.shape != (2,) or seed.dtype != jnp.uint32:
        raise ValueError(f"seed: expected uint32 [2], found {seed.dtype} {list(seed.shape)}")
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"rows: expected integers [B], found {rows.dtype} {list(rows.shape)}")
    return jnp.stack(fold(seed[0], seed[1], rows.astype(jnp.uint32)), axis=-1)


def query_words(seeds: Array, heads: Array, queries: Array) -> tuple[Array, Array]:
    """Return two words per (row, head, query): `seeds` [B, 2], `heads` [H], `queries` [L] -> two uint32 [B, H, L]."""
    a, b = fold(seeds[:, 0, None], seeds[:, 1, None], heads.astype(jnp.uint32)[None, :])
    return fold(a[:, :, None], b[:, :, None], queries.astype(jnp.uint32)[None, None, :])


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


def hash_dropout(x: Array, rate: float, seeds: Array) -> Array:
    """Apply inverted dropout to hidden activations: zero elements with probability `rate`, divide others by `1 - rate`.

    The bits depend only on (row seed, flat index over the middle dimensions, index in the last dimension). The backward
    pass recomputes them instead of storing them.

    Args:
      x: float [B, ...].
      rate: dropout rate in [0, 1); 0 returns `x` itself.
      seeds: uint32 [B, 2] (see `row_seeds`). Two calls with the same seeds drop the same elements: use different seeds
        for each place in a model.

    Returns:
      An array like `x`.

    Raises:
      ValueError: `rate` or the shapes do not fit.
    """
    rate = check_rate("rate", rate)
    if seeds.shape != (x.shape[0] if x.ndim else None, 2) or seeds.dtype != jnp.uint32:
        raise ValueError(
            f"seeds: expected uint32 [B, 2] for x {list(x.shape)}, found {seeds.dtype} {list(seeds.shape)}"
        )
    return x if rate == 0 else _dropout(rate, x, seeds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(rate: float, x: Array, seeds: Array) -> Array:
    rows, *middle, channels = x.shape if x.ndim > 1 else (*x.shape, 1)
    positions = jnp.arange(math.prod(middle), dtype=jnp.uint32)
    a, b = fold(seeds[:, 0, None], seeds[:, 1, None], positions[None, :])
    shape = (rows, *middle, 1)
    g = key_words(jnp.arange(channels, dtype=jnp.uint32)).reshape((1,) * (len(shape) - 1) + (channels,))
    kept = keep(a.reshape(shape), b.reshape(shape), g, rate).reshape(x.shape)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def _dropout_forward(rate: float, x: Array, seeds: Array) -> tuple[Array, Array]:
    return _dropout(rate, x, seeds), seeds


def _dropout_backward(rate: float, seeds: Array, cotangent: Array) -> tuple[Array, None]:
    return _dropout(rate, cotangent, seeds), None


_dropout.defvjp(_dropout_forward, _dropout_backward)
