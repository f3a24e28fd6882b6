"""Attention: one function with one meaning, and the choice among the backends that compute it."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .bias import AlibiBias, Bias, DenseBias, RelativeBias, bucket_edges
from .call import Call
from .hash import check_rate, row_seeds
from .selfcheck import agrees


class Backend(Protocol):
    """What the module of a backend offers."""

    def supports(self, call: Call) -> str | None:
        """None, or the reason why this backend cannot do this call on the default device."""
        ...

    def run(self, call: Call) -> tuple[Array, Array]:
        """The output and lse, as `attention` says."""
        ...


_DTYPES = tuple(jnp.dtype(name) for name in ("bfloat16", "float16", "float32", "float64"))


class _Backends(Mapping[str, Backend]):
    """The modules of these names; Pallas, which takes a second to import, comes with the first use of its backends."""

    def __init__(self, **modules: str):
        self._modules = modules

    def __getitem__(self, name: str) -> Backend:
        return cast(Backend, importlib.import_module(self._modules[name], __package__))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


# Fastest first: `implementation=None` takes the first that supports the call.
BACKENDS: Mapping[str, Backend] = _Backends(hopper=".hopper.backend", tpu=".tpu.backend", cudnn=".cudnn", xla=".xla")

# Compiled for their chips and held to the reference in their interpreters, but not yet run on a chip: taken unasked
# only where they give the reference's numbers on the device that is here (selfcheck.py).
UNPROVEN = frozenset({"hopper", "tpu"})

# Written in Pallas: on a CPU they are interpreted, or compiled for a chip, by context managers of their own modules.
PALLAS = frozenset({"hopper", "tpu"})


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: Bias | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: ArrayLike | None = None,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Array: ...


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: Bias | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: ArrayLike | None = None,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Array, Array]: ...


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: Bias | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Scaled dot-product attention (Vaswani et al. 2017, 3.2.1), for packed rows, with bias and dropout.

    In this order: `scale * query . key + bias`, softcap, mask, softmax over keys (float32), dropout, times value. Query
    i attends to key j where all of these hold; a query with no such key returns zeros, has lse -inf and sends no
    gradient:

    - `causal`: j <= i. Both counts start at the first token, also where L and S differ (as in `jax.nn`).
    - `window=(left, right)`: i - left <= j <= i + right.
    - segment ids: the query's equals the key's, and is not 0.

    Arrays must be finite, but may be as large as they like where they are not attended to (0 x inf is no zero).

    Args:
      query: [B, L, H, D], bfloat16, float16, float32 or float64.
      key: [B, S, K, D] of the same dtype; K divides H, and query head h reads key head h // (H // K).
      value: [B, S, K, Dv] of the same dtype.
      bias: `DenseBias`, `RelativeBias` or `AlibiBias`. Differentiable.
      causal: whether later keys are hidden.
      window: how many keys are seen before and after the query's own place; None on a side for no limit there.
      query_segment_ids: int32 [B, L]: which packed example a token belongs to; 0 is padding. A 0/1 attention mask is
        the special case of one example a row. In any order; given together with `key_segment_ids` or not at all.
      key_segment_ids: int32 [B, S]. For self-attention, the same array again.
      scale: of the scores; 1 / sqrt(D) unless given.
      softcap: scores become `softcap * tanh(score / softcap)`.
      dropout_rate: the share of attention weights dropped, in [0, 1); the others are divided by 1 - rate.
      dropout_seed: uint32 [2], or [B, 2] with a seed for each row. Needed where the rate is not 0. The bits are a hash
        of (seed, row, head, query, key): `attention(seed)` equals `attention(row_seeds(seed, arange(B)))`, and rows
        that keep their seeds keep their bits however a batch is split.
      return_lse: also return log(sum(exp(scores))) of each query over the keys it attends to (before dropout).
      implementation: a name in `BACKENDS`, or None for the fastest that supports the call and was proven on its chip.

    Returns:
      [B, L, H, Dv] in the query's dtype; with `return_lse`, also lse [B, L, H] in float32 (float64 for float64).
      Both are differentiable once, in reverse mode.

    Raises:
      ValueError: an argument does not fit: its name, shape and what was expected.
      NotImplementedError: the named backend cannot do this call, and why. It never falls back to another.
    """
    call = _check(
        query=jnp.asarray(query),
        key=jnp.asarray(key),
        value=jnp.asarray(value),
        bias=bias,
        causal=causal,
        window=window,
        query_segment_ids=None if query_segment_ids is None else jnp.asarray(query_segment_ids),
        key_segment_ids=None if key_segment_ids is None else jnp.asarray(key_segment_ids),
        scale=scale,
        softcap=softcap,
        dropout_rate=dropout_rate,
        dropout_seed=None if dropout_seed is None else jnp.asarray(dropout_seed),
    )
    out, lse = _choose(call, implementation).run(call)
    return (out, lse) if return_lse else out


def _choose(call: Call, implementation: str | None) -> Backend:
    if implementation is not None:
        if implementation not in BACKENDS:
            raise ValueError(f"implementation: expected one of {', '.join(BACKENDS)}, found {implementation!r}")
        backend = BACKENDS[implementation]
        if reason := backend.supports(call):
            raise NotImplementedError(f"implementation {implementation!r}: {reason}")
        return backend
    reasons = {}
    for name in BACKENDS:
        if name in PALLAS and jax.default_backend() == "cpu" and f"{__package__}.{name}" not in sys.modules:
            reasons[name] = "nothing here asks for its interpreter"  # without the second that Pallas takes to import
            continue
        reason = BACKENDS[name].supports(call)
        if reason is None and name in UNPROVEN and not agrees(name, str(call.query.dtype)):
            reason = "gave other numbers than the reference on this device"
        if reason is None:
            return BACKENDS[name]
        reasons[name] = reason
    raise NotImplementedError("; ".join(f"implementation {name!r}: {reason}" for name, reason in reasons.items()))


def _check(
    *,
    query: Array,
    key: Array,
    value: Array,
    bias: Bias | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    query_segment_ids: Array | None,
    key_segment_ids: Array | None,
    scale: float | None,
    softcap: float | None,
    dropout_rate: float,
    dropout_seed: Array | None,
) -> Call:
    """The arguments as a `Call`, or a ValueError that names the one that does not fit."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4 or 0 in array.shape:
            raise _misfit(name, array, "four dimensions [batch, length, heads, head size], none of them 0")
        if array.dtype not in _DTYPES:
            raise _misfit(name, array, f"one of {', '.join(map(str, _DTYPES))}")
        if array.dtype != query.dtype:
            raise _misfit(name, array, f"the query's dtype, {query.dtype}")
    b, q_len, heads, size = query.shape
    k_len, k_heads = key.shape[1:3]
    if key.shape[0] != b or key.shape[3] != size or heads % k_heads:
        raise _misfit("key", key, f"[{b}, S, K, {size}] with K dividing {heads}, for query {list(query.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise _misfit("value", value, f"[{b}, {k_len}, {k_heads}, Dv], for key {list(key.shape)}")

    if (query_segment_ids is None) != (key_segment_ids is None):
        given, missing = ("query", "key") if key_segment_ids is None else ("key", "query")
        raise ValueError(
            f"{missing}_segment_ids: expected them beside {given}_segment_ids, found None "
            f"(for self-attention, pass the same array as both)"
        )
    for name, ids, length in (
        ("query_segment_ids", query_segment_ids, q_len),
        ("key_segment_ids", key_segment_ids, k_len),
    ):
        if ids is not None and (ids.shape != (b, length) or ids.dtype != jnp.int32):
            raise _misfit(name, ids, f"int32 [{b}, {length}]")

    rate = check_rate("dropout_rate", dropout_rate)
    if dropout_seed is not None:
        if dropout_seed.shape not in ((2,), (b, 2)) or dropout_seed.dtype != jnp.uint32:
            raise _misfit("dropout_seed", dropout_seed, f"uint32 [2] or [{b}, 2]")
    elif rate > 0:
        raise ValueError(f"dropout_seed: expected uint32 [2] or [{b}, 2] for dropout_rate {rate}, found None")
    seeds = None
    if dropout_seed is not None and rate > 0:
        seeds = dropout_seed if dropout_seed.ndim == 2 else row_seeds(dropout_seed, jnp.arange(b))

    return Call(
        query=query,
        key=key,
        value=value,
        bias=_check_bias(bias, (b, heads, q_len, k_len)),
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        dropout_seeds=seeds,
        causal=bool(causal),
        window=_check_window(window, q_len, k_len),
        scale=1 / math.sqrt(size) if scale is None else _check_number("scale", scale),
        softcap=None if softcap is None else _check_number("softcap", softcap, positive=True),
        dropout_rate=rate,
    )


def _check_bias(bias: Bias | None, scores: tuple[int, int, int, int]) -> Bias | None:
    b, heads, q_len, k_len = scores
    match bias:
        case None:
            return None
        case DenseBias(value):
            fits = value.ndim == 4 and value.shape[0] in (1, b) and value.shape[1] in (1, heads)
            if not fits or value.shape[2:] != (q_len, k_len):
                raise _misfit("bias.value", value, f"[1 or {b}, 1 or {heads}, {q_len}, {k_len}]")
            array = value
        case RelativeBias(table):
            buckets = table.shape[0] if table.ndim == 2 else 0
            if table.ndim != 2 or table.shape[1] != heads or buckets < 2 or (bias.bidirectional and buckets % 2):
                even = "an even number of buckets" if bias.bidirectional else "buckets"
                raise _misfit("bias.table", table, f"[{even}, {heads}]")
            bucket_edges(bidirectional=bias.bidirectional, buckets=buckets, max_distance=bias.max_distance)
            array = table
        case AlibiBias(slopes):
            if slopes.shape != (heads,):
                raise _misfit("bias.slopes", slopes, f"[{heads}]")
            array = slopes
        case _:
            raise ValueError(f"bias: expected DenseBias, RelativeBias or AlibiBias, found {type(bias).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise _misfit("bias", array, "floating-point values")
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
    # A side that reaches past the row is no limit, and the backends add to the others in int32.
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


def _misfit(name: str, array: Array, expected: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, found {array.dtype} {list(array.shape)}")
