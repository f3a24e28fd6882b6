"""Attention weights of selected heads and queries.

The fast backends never store the weights, but any row of them can be recomputed from lse, one number per query and
head: weight = exp(score - lse).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .bias import AlibiBias, Bias, DenseBias, DistanceKeys, RelativeBias, toeplitz_row
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
    """Recompute the attention weights of selected heads and queries from the lse of `attention(return_lse=True)`.

        out, lse = attention(query, key, value, segments..., return_lse=True)
        first_token = attention_weights(query, key, heads=[3, 7], queries=[0], lse=lse, segments...)

    Time and memory are those of the selected rows: B x heads x queries x S. The arguments of both calls must be the
    same, except for dropout: the weights are those before dropout.

    Args:
      query: [B, L, H, D].
      key: [B, S, K, D].
      heads: integers [h] in [0, H), in any order.
      queries: integers [q] in [0, L), in any order.
      lse: [B, L, H], as returned by `attention`.
      bias: as for `attention`.
      causal: as for `attention`.
      window: as for `attention`.
      query_segment_ids: as for `attention`.
      key_segment_ids: as for `attention`.
      scale: as for `attention`.
      softcap: as for `attention`.

    Returns:
      [B, h, q, S], float32 (float64 for float64). Each row sums to 1, or is zero if the query attends to nothing.
      Differentiable, also through lse. If `heads` or `queries` are traced, so that they cannot be checked, rows that
      are out of range are NaN.

    Raises:
      ValueError: an argument is invalid; the message names it, its shape, and what was expected.
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
    product = partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST if call.query.dtype == dtype else None,
        preferred_element_type=dtype,
    )
    scores = product("bqhd,bshd->bhqs", chosen, facing) * call.scale
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
        case DistanceKeys(own, of_distances):
            part = product("bqhd,rhd->bhqr", own[:, queries][:, :, heads], of_distances[:, heads]) * call.scale
            places = jnp.broadcast_to((distance + length - 1)[None, None], scores.shape)
            scores = scores + jnp.take_along_axis(part, places, axis=3, mode="fill", fill_value=0)
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
    # An empty row has lse -inf; exp(score - inf) is 0, as wanted.
    total = jnp.swapaxes(lse[:, queries][:, :, heads], 1, 2)[..., None]
    total = jnp.where(total == -jnp.inf, jnp.inf, total)
    weights = jnp.exp(jnp.where(seen[:, None], scores - total, -jnp.inf))
    within = heads_within[:, None] & queries_within[None, :]
    return jnp.where(within[None, :, :, None], weights, jnp.nan)


def _places(name: str, places: Sequence[int] | np.ndarray | Array, count: int) -> tuple[Array, Array]:
    """Return int32 [n], and which of them are in [0, count); raise a ValueError if one is known to be out of range."""
    array = jnp.asarray(places)
    if array.ndim != 1 or array.size == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise argument_error(name, array, f"integers [n] in [0, {count}), at least one")
    within = (array >= 0) & (array < count)
    if not isinstance(array, Tracer) and not within.all():
        outside = [int(place) for place in np.asarray(array) if not 0 <= place < count]
        raise ValueError(f"{name}: expected integers in [0, {count}), found {outside}")
    return jnp.where(within, array, 0).astype(jnp.int32), within
