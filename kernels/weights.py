"""Attention's weights, of the few heads and queries that somebody wants to look at.

A fast backend never holds the weights. But lse, one number for each query and head, is all that is missing to compute
any row of them again: weight = exp(score - lse).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .bias import AlibiBias, Bias, DenseBias, RelativeBias, toeplitz_row
from .call import Call, argument_error


def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    heads: Sequence[int] | np.ndarray | Array,
    queries: Sequence[int] | np.ndarray | Array,
    lse: ArrayLike,
    bias: Bias | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """What chosen heads of chosen queries attend to, computed again from the lse of `attention(return_lse=True)`.

        out, lse = attention(query, key, value, segments..., return_lse=True)
        first_token = attention_weights(query, key, heads=[3, 7], queries=[0], lse=lse, segments...)

    Time and memory are those of the chosen rows: B x heads x queries x S. The arguments of the two calls must be the
    same, except for dropout's, which this one does not have: weights are those before dropout.

    Args:
      query: [B, L, H, D].
      key: [B, S, K, D].
      heads: integers [h] in [0, H), in any order. Of key head h // (H // K), as in `attention`.
      queries: integers [q] in [0, L), in any order.
      lse: [B, L, H], as `attention` returned it.
      bias, causal, window, query_segment_ids, key_segment_ids, scale, softcap: as for `attention`.

    Returns:
      [B, h, q, S], float32 (float64 for float64). A row sums to 1; the row of a query that has nothing to attend to is
      zeros. Differentiable, through lse too. Where `heads` or `queries` are traced, so that nobody can check them, the
      rows of those out of range are NaN.

    Raises:
      ValueError: an argument does not fit: its name, shape and what was expected.
    """
    call = Call.of(
        query=query,
        key=key,
        value=key,
        bias=bias,
        causal=causal,
        window=window,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        scale=scale,
        softcap=softcap,
    )
    rows, length, every_head, _ = call.query.shape
    keys, key_heads = call.key.shape[1:3]
    dtype = np.promote_types(call.query.dtype, np.float32)
    lse = jnp.asarray(lse)
    if lse.shape != (rows, length, every_head) or lse.dtype != dtype:
        expected = f"{dtype} [{rows}, {length}, {every_head}], as attention(return_lse=True) gives it"
        raise argument_error("lse", lse, expected)
    heads, heads_within = _places("heads", heads, every_head)
    queries, queries_within = _places("queries", queries, length)

    chosen = call.query[:, queries][:, :, heads]
    facing = call.key[:, :, heads // (every_head // key_heads)]
    scores = jnp.einsum(
        "bqhd,bshd->bhqs",
        chosen,
        facing,
        precision=jax.lax.Precision.HIGHEST if call.query.dtype == dtype else None,
        preferred_element_type=dtype,
    )
    scores = scores * call.scale
    distance = jnp.arange(keys)[None, :] - queries[:, None]
    match call.bias:
        case None:
            pass
        case DenseBias(value):
            of_heads = heads if value.shape[1] > 1 else jnp.zeros_like(heads)
            scores = scores + jnp.broadcast_to(value[:, :, queries][:, of_heads].astype(dtype), scores.shape)
        case RelativeBias() | AlibiBias():
            part = toeplitz_row(call.bias, length, keys)[heads][:, distance + length - 1]
            scores = scores + jnp.broadcast_to(part[None].astype(dtype), scores.shape)
    if call.softcap is not None:
        scores = call.softcap * jnp.tanh(scores / call.softcap)

    left, right = call.sides
    seen = jnp.ones((1, *distance.shape), bool)
    if left is not None:
        seen &= (distance >= -left)[None]
    if right is not None:
        seen &= (distance <= right)[None]
    if call.query_segment_ids is not None and call.key_segment_ids is not None:
        own = call.query_segment_ids[:, queries][:, :, None]
        seen = seen & (own == call.key_segment_ids[:, None, :]) & (own != 0)
    # An empty row has lse -inf; exp(score - inf) is 0.
    total = jnp.swapaxes(lse[:, queries][:, :, heads], 1, 2)[..., None]
    total = jnp.where(total == -jnp.inf, jnp.inf, total)
    weights = jnp.exp(jnp.where(seen[:, None], scores - total, -jnp.inf))
    within = heads_within[:, None] & queries_within[None, :]
    return jnp.where(within[None, :, :, None], weights, jnp.nan)


def _places(name: str, places: Sequence[int] | np.ndarray | Array, count: int) -> tuple[Array, Array]:
    """int32 [n], and which of them are in [0, count); a ValueError where one is known not to be."""
    array = jnp.asarray(places)
    if array.ndim != 1 or array.size == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise argument_error(name, array, f"integers [n] in [0, {count}), at least one")
    within = (array >= 0) & (array < count)
    if not isinstance(array, Tracer) and not within.all():
        outside = [int(place) for place in np.asarray(array) if not 0 <= place < count]
        raise ValueError(f"{name}: expected integers in [0, {count}), found {outside}")
    return jnp.where(within, array, 0).astype(jnp.int32), within
