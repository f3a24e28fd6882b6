"""A checked call of `attention`, as the backends receive it."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .bias import AlibiBias, Bias, DenseBias, DistanceKeys, RelativeBias, bucket_edges
from .hash import Words, check_rate, key_words, query_words, row_seeds

_DTYPES = tuple(jnp.dtype(name) for name in ("bfloat16", "float16", "float32", "float64"))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Checked arguments of one call, with all defaults filled in. The fields are the arguments of `attention`.

    Arrays may be traced; everything else is static.
    """

    query: Array
    key: Array
    value: Array
    bias: Bias | None
    query_segment_ids: Array | None
    key_segment_ids: Array | None
    dropout_seeds: Array | None
    """uint32 [B, 2], one seed per row, or [B, L, 2], one per query; None if and only if `dropout_rate` is 0."""
    causal: bool
    window: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    dropout_rate: float
    dropout_positions: tuple[Array, Array] | None = None

    @classmethod
    def of(
        cls,
        *,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        bias: Bias | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        query_segment_ids: ArrayLike | None = None,
        key_segment_ids: ArrayLike | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_rate: float = 0.0,
        dropout_seed: ArrayLike | None = None,
        dropout_positions: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> Call:
        """Check the arguments of `attention`, and fill in the defaults.

        Raises:
          ValueError: an argument is invalid; the message names it, its shape, and what was expected.
        """
        query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
        query_segment_ids = None if query_segment_ids is None else jnp.asarray(query_segment_ids)
        key_segment_ids = None if key_segment_ids is None else jnp.asarray(key_segment_ids)
        dropout_seed = None if dropout_seed is None else jnp.asarray(dropout_seed)
        for name, array in (("query", query), ("key", key), ("value", value)):
            if array.ndim != 4 or 0 in array.shape:
                raise argument_error(name, array, "four dimensions [batch, length, heads, head size], none of them 0")
            if array.dtype not in _DTYPES:
                raise argument_error(name, array, f"one of {', '.join(map(str, _DTYPES))}")
            if array.dtype != query.dtype:
                raise argument_error(name, array, f"the query's dtype, {query.dtype}")
        b, q_len, heads, size = query.shape
        k_len, k_heads = key.shape[1:3]
        if key.shape[0] != b or key.shape[3] != size or heads % k_heads:
            expected = f"[{b}, S, K, {size}] with K dividing {heads}, for query {list(query.shape)}"
            raise argument_error("key", key, expected)
        if value.shape[:3] != key.shape[:3]:
            raise argument_error("value", value, f"[{b}, {k_len}, {k_heads}, Dv], for key {list(key.shape)}")

        if (query_segment_ids is None) != (key_segment_ids is None):
            given, missing = ("query", "key") if key_segment_ids is None else ("key", "query")
            raise ValueError(
                f"{missing}_segment_ids: expected together with {given}_segment_ids, found None "
                f"(for self-attention, pass the same array as both)"
            )
        for name, ids, length in (
            ("query_segment_ids", query_segment_ids, q_len),
            ("key_segment_ids", key_segment_ids, k_len),
        ):
            if ids is not None and (ids.shape != (b, length) or ids.dtype != jnp.int32):
                raise argument_error(name, ids, f"int32 [{b}, {length}]")

        rate = check_rate("dropout_rate", dropout_rate)
        shapes = f"[2], [{b}, 2] or [{b}, {q_len}, 2]"
        if dropout_seed is not None:
            if dropout_seed.shape not in ((2,), (b, 2), (b, q_len, 2)) or dropout_seed.dtype != jnp.uint32:
                raise argument_error("dropout_seed", dropout_seed, f"uint32 {shapes}")
        elif rate > 0:
            raise ValueError(f"dropout_seed: expected uint32 {shapes} for dropout_rate {rate}, found None")
        positions = None if dropout_positions is None else tuple(jnp.asarray(part) for part in dropout_positions)
        if positions is not None:
            if len(positions) != 2:
                raise ValueError(f"dropout_positions: expected (queries, keys), found {len(positions)} arrays")
            for part, length in zip(positions, (q_len, k_len), strict=True):
                if part.shape != (b, length) or part.dtype != jnp.int32:
                    raise argument_error("dropout_positions", part, f"int32 ([{b}, {q_len}], [{b}, {k_len}])")
        seeds = None
        if dropout_seed is not None and rate > 0:
            seeds = dropout_seed if dropout_seed.ndim > 1 else row_seeds(dropout_seed, jnp.arange(b))

        return cls(
            query=query,
            key=key,
            value=value,
            bias=_check_bias(bias, (b, heads, q_len, k_len), query.dtype),
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            dropout_seeds=seeds,
            causal=bool(causal),
            window=_check_window(window, q_len, k_len),
            scale=1 / math.sqrt(size) if scale is None else _check_number("scale", scale),
            softcap=None if softcap is None else _check_number("softcap", softcap, positive=True),
            dropout_rate=rate,
            dropout_positions=None if seeds is None else positions,
        )

    def dropout_words(self) -> Words | None:
        """Return the words of dropout's bits, for all heads; None without dropout."""
        if self.dropout_seeds is None:
            return None
        queries, keys = jnp.arange(self.query.shape[1]), jnp.arange(self.key.shape[1])[None]
        if self.dropout_positions is not None:
            queries, keys = self.dropout_positions
        return Words(*query_words(self.dropout_seeds, jnp.arange(self.query.shape[2]), queries), key_words(keys))

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Numbers of keys visible before and after the query, None for no limit: the window, limited by causality."""
        left, right = self.window
        return left, 0 if self.causal else right


def _check_bias(bias: Bias | None, scores: tuple[int, int, int, int], dtype: jnp.dtype) -> Bias | None:
    b, heads, q_len, k_len = scores
    match bias:
        case None:
            return None
        case DenseBias(value):
            fits = value.ndim == 4 and value.shape[0] in (1, b) and value.shape[1] in (1, heads)
            if not fits or value.shape[2:] != (q_len, k_len):
                raise argument_error("bias.value", value, f"[1 or {b}, 1 or {heads}, {q_len}, {k_len}]")
            array = value
        case RelativeBias(table):
            buckets = table.shape[0] if table.ndim == 2 else 0
            if table.ndim != 2 or table.shape[1] != heads or buckets < 2 or (bias.bidirectional and buckets % 2):
                even = "an even number of buckets" if bias.bidirectional else "buckets"
                raise argument_error("bias.table", table, f"[{even}, {heads}]")
            bucket_edges(bidirectional=bias.bidirectional, buckets=buckets, max_distance=bias.max_distance)
            array = table
        case AlibiBias(slopes):
            if slopes.shape != (heads,):
                raise argument_error("bias.slopes", slopes, f"[{heads}]")
            array = slopes
        case DistanceKeys(array, keys):
            if array.shape[:3] != (b, q_len, heads) or array.ndim != 4 or array.dtype != dtype:
                raise argument_error("bias.query", array, f"{dtype} [{b}, {q_len}, {heads}, F]")
            most = q_len + k_len - 1
            if keys.shape[1:] != array.shape[2:] or not 1 <= keys.shape[0] <= most or keys.dtype != dtype:
                expected = f"{dtype} [1 to {most}, {heads}, {array.shape[3]}]"
                raise argument_error("bias.keys", keys, expected)
        case _:
            known = "DenseBias, RelativeBias, AlibiBias or DistanceKeys"
            raise ValueError(f"bias: expected {known}, found {type(bias).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise argument_error("bias", array, "floating-point values")
    return bias


def _check_window(
    window: tuple[int | None, int | None] | None, queries: int, keys: int
) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = tuple(window) if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or any(side is not None and not (isinstance(side, int) and side >= 0) for side in sides):
        raise ValueError(f"window: expected (left, right), each an integer >= 0 or None for no limit, found {window!r}")
    left, right = sides
    # A side that reaches beyond the row is no limit; the backends do arithmetic on the others in int32.
    return (
        None if left is None or left >= queries - 1 else left,
        None if right is None or right >= keys - 1 else right,
    )


def _check_number(name: str, value: float, *, positive: bool = False) -> float:
    expected = "a finite number > 0" if positive else "a finite number"
    number = isinstance(value, int | float | np.floating | np.integer)
    if not number or not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name}: expected {expected}, known when tracing, found {value!r}")
    return float(value)


def argument_error(name: str, array: Array, expected: str) -> ValueError:
    """An array that does not fit: its name, what was expected, its dtype and shape."""
    return ValueError(f"{name}: expected {expected}, found {array.dtype} {list(array.shape)}")
