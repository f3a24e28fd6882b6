"""Attention: one function, and the selection of the backend that computes it."""

from __future__ import annotations

import sys
from typing import Literal, overload

import jax
from jax import Array
from jax.typing import ArrayLike

from . import backends
from .bias import Bias
from .call import Call
from .selfcheck import trusted
from .tuning import Features, fastest


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
    dropout_positions: tuple[ArrayLike, ArrayLike] | None = None,
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
    dropout_positions: tuple[ArrayLike, ArrayLike] | None = None,
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
    dropout_positions: tuple[ArrayLike, ArrayLike] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Compute scaled dot-product attention (Vaswani et al. 2017, 3.2.1) of packed rows, with bias and dropout.

    In this order: `scale * query . key + bias`, softcap, mask, softmax over keys (float32), dropout, times value. Query
    i attends to key j if all of the following hold; a query with no such key returns zeros, has lse -inf and sends no
    gradient:

    - `causal`: j <= i. Both indices start at the first token, even if L and S differ (as in `jax.nn`).
    - `window=(left, right)`: i - left <= j <= i + right.
    - segment ids: the query's equals the key's, and is not 0.

    Arrays must be finite, but keys and values that are not attended to may be arbitrarily large (0 x inf is handled).

    Args:
      query: [B, L, H, D], bfloat16, float16, float32 or float64.
      key: [B, S, K, D] of the same dtype; K divides H, and query head h reads key head h // (H // K).
      value: [B, S, K, Dv] of the same dtype.
      bias: `DenseBias`, `RelativeBias`, `AlibiBias` or `DistanceKeys`. Differentiable.
      causal: whether to mask later keys.
      window: (left, right), the numbers of keys visible before and after the query; None on a side for no limit.
      query_segment_ids: int32 [B, L], which packed example a token belongs to, in any order; 0 is padding. A 0/1
        attention mask is the special case of one example per row. Given with `key_segment_ids` or not at all.
      key_segment_ids: int32 [B, S]. For self-attention, pass the same array as `query_segment_ids`.
      scale: factor of the scores; default 1 / sqrt(D).
      softcap: scores become `softcap * tanh(score / softcap)`.
      dropout_rate: fraction of attention weights to drop, in [0, 1); the others are divided by 1 - rate.
      dropout_seed: uint32 [2], or [B, 2] with one seed per row, or [B, L, 2] with one per query. Required if the rate
        is not 0. The bits are a hash of (seed, row, head, query, key): `attention(seed)` equals
        `attention(row_seeds(seed, arange(B)))`, and a row with a given seed has the same bits however the batch is
        partitioned.
      dropout_positions: int32 [B, L] and [B, S], what the hash takes as the indices of the queries and of the keys;
        None for their indices in the row. With each token's position in its example, and the example's own seed for
        each query, an example has the same bits in whatever row it is packed.
      return_lse: also return log(sum(exp(scores))) of each query over the keys it attends to (before dropout).
      implementation: a name in `BACKENDS`, or None for the fastest that supports the call (and is known to be right).

    Returns:
      [B, L, H, Dv] in the query's dtype; with `return_lse`, also lse [B, L, H] in float32 (float64 for float64).
      Both are differentiable once, in reverse mode.

    Raises:
      ValueError: an argument is invalid; the message names it, its shape, and what was expected.
      NotImplementedError: the named backend does not support the call; the message says why. There is no fallback.
    """
    call = Call.of(
        query=query,
        key=key,
        value=value,
        bias=bias,
        causal=causal,
        window=window,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        scale=scale,
        softcap=softcap,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        dropout_positions=dropout_positions,
    )
    out, lse = _choose(call, implementation).run(call)
    return (out, lse) if return_lse else out


def _choose(call: Call, implementation: str | None) -> backends.Backend:
    known = backends.BACKENDS
    if implementation is not None:
        if implementation not in known:
            raise ValueError(f"implementation: expected one of {', '.join(known)}, found {implementation!r}")
        backend = known[implementation]
        if reason := backend.supports(call):
            raise NotImplementedError(f"implementation {implementation!r}: {reason}")
        return backend
    reasons = {}
    first = fastest(call)
    for name in known if first is None else dict.fromkeys((first, *known)):
        if name in backends.PALLAS and jax.default_backend() == "cpu" and f"{__package__}.{name}" not in sys.modules:
            reasons[name] = "its interpreter is not in use"  # skip importing Pallas, which takes a second
            continue
        reason = known[name].supports(call)
        if reason is None and name in backends.NEEDS_PROOF and not trusted(name, Features.of(call)):
            reason = "not known to be right on this device"
        if reason is None:
            return known[name]
        reasons[name] = reason
    raise NotImplementedError("; ".join(f"implementation {name!r}: {reason}" for name, reason in reasons.items()))
