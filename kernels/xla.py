"""Reference backend: attention in plain JAX, for every call on every device.

The backward pass recomputes the weights from the scores instead of storing them, so that a layer's residuals grow with
L, not with L x S. Scores are materialised for one block of queries at a time, at most `BLOCK_SCORES` per head; rows of
up to 1024 tokens are one block. A bias is materialised once for all rows of the batch that share it; products with keys
of distances, block by block like the scores.

Since the backward pass is written by hand, only first-order reverse-mode derivatives exist: `jax.jvp`, `jax.hessian`
and the gradient of a gradient raise.

The products are einsums over the arrays in the caller's layout, [B, L, H, D]: XLA's CPU compiler then passes them to
its fast library without copying anything of the scores' size, and leaves bfloat16 as it is. Without dropout the forward
pass of longer rows is written so that this compiler makes one kernel of it, which keeps no scores in memory
(`_fused_block`). Blocks divide only the queries: batch and heads stay whole, so that they can be partitioned over a
mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .bias import DenseBias, DistanceKeys, dense_bias, dense_from_products
from .call import Call
from .hash import keep

BLOCK_SCORES = 1 << 20
"""Maximum number of scores per head that are materialised at a time: 4 MiB in float32, times batch and heads."""

FUSED_SCORES = 1 << 14
"""Number of scores per head from which on XLA's fused kernel is faster than its parts; for 128 queries of 128 keys."""


def supports(call: Call) -> str | None:
    """See `Backend`: every call is supported."""
    del call
    return None


def run(call: Call) -> tuple[Array, Array]:
    """See `Backend`."""
    q_len, heads = call.query.shape[1:3]
    k_len, k_heads = call.key.shape[1:3]
    bias = placed = distances = None
    if isinstance(call.bias, DistanceKeys):
        placed, distances = call.bias.query, _for_blocks(call.bias.keys, q_len, k_len)
    elif call.bias is not None:
        bias = dense_bias(call.bias, q_len, k_len).astype(_accumulator(call.query))
    # Grouped heads are repeated: the copies are small compared with the scores, and autodiff sums the gradient over
    # them.
    key, value = (x if heads == k_heads else jnp.repeat(x, heads // k_heads, axis=2) for x in (call.key, call.value))
    rule = _Rule(call.sides, call.scale, call.softcap, call.dropout_rate, isinstance(call.bias, DenseBias))
    words = call.dropout_words()
    queries = _Queries(call.query, call.query_segment_ids, bias, None if words is None else (words.a, words.b), placed)
    keys = _Keys(key, value, call.key_segment_ids, None if words is None else words.g, distances)
    out, lse = _attention(rule, queries, keys)
    return out, jnp.swapaxes(lse, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """Static facts of a call; the fields are those of `Call`."""

    sides: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    dropout_rate: float
    dense: bool
    """Whether the bias is dense, whose entries may be -inf."""


class _Queries(NamedTuple):
    """Arrays that are divided into blocks along the queries."""

    query: Array
    """[B, L, H, D]."""
    segment_ids: Array | None
    """[B, L]."""
    bias: Array | None
    """[1 or B, 1 or H, L, S]."""
    words: tuple[Array, Array] | None
    """`Words.a` and `Words.b`, [B, H, L]."""
    placed: Array | None
    """`DistanceKeys.query`, [B, L, H, F]."""


class _Keys(NamedTuple):
    """Arrays that every block of queries needs."""

    key: Array
    """[B, S, H, D]."""
    value: Array
    """[B, S, H, Dv]."""
    segment_ids: Array | None
    """[B, S]."""
    words: Array | None
    """`Words.g`, [1 or B, S]."""
    distances: Array | None
    """[L + S - 1, H, F], keys of the distances from 1 - L on, where L is the number of queries in all blocks, padding
    included; or those of a block's own queries."""

    def of_block(self, first: Array, size: int, blocks: int) -> _Keys:
        """Return the keys as the block of `size` queries needs them that begins at query `first`."""
        if self.distances is None:
            return self
        own = jax.lax.dynamic_slice_in_dim(self.distances, *self._span(first, size, blocks))
        return self._replace(distances=own)

    def add_of_block(self, gradient: Array, first: Array, size: int, blocks: int) -> Array:
        """Add a block's gradient of its `distances` to that of all, this."""
        assert self.distances is not None
        start, length = self._span(first, size, blocks)
        sums = jax.lax.dynamic_slice_in_dim(self.distances, start, length) + gradient
        return jax.lax.dynamic_update_slice_in_dim(self.distances, sums, start, 0)

    def _span(self, first: Array, size: int, blocks: int) -> tuple[Array, int]:
        """Return the first and the number of the distances of a block."""
        return (blocks - 1) * size - first, size + self.key.shape[1] - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule: _Rule, queries: _Queries, keys: _Keys) -> tuple[Array, Array]:
    """Compute the output [B, L, H, Dv] and lse [B, H, L]."""
    return _over_blocks(_fused_block if _fuses(queries, keys) else _forward_block, rule, queries, keys)


def _fuses(queries: _Queries, keys: _Keys) -> bool:
    """Tell whether to compute `_fused_block`: without dropout, and where the scores are many."""
    return keys.words is None and queries.query.shape[1] * keys.key.shape[1] >= FUSED_SCORES


def _over_blocks(compute: Callable[..., tuple[Array, Array]], rule: _Rule, queries: _Queries, keys: _Keys):
    """Call `compute` on every block of queries; return its output and lse of all of them."""
    q_len, k_len = queries.query.shape[1], keys.key.shape[1]
    blocks, size = _blocks(q_len, k_len)
    if blocks == 1:
        return compute(rule, jnp.int32(0), queries, keys)

    def step(_, xs):
        first, some = xs
        return None, compute(rule, first, some, keys.of_block(first, size, blocks))

    _, (out, lse) = jax.lax.scan(step, None, (jnp.arange(blocks) * size, _split_queries(queries, blocks, size)))
    return _join(out, 1, q_len), _join(lse, 2, q_len)


def _attention_forward(rule: _Rule, queries: _Queries, keys: _Keys):
    out, lse = _attention(rule, queries, keys)
    # What the fused form saves in the forward pass is more than a second softmax costs in the backward pass.
    return (out, lse), (queries, keys, out, None if _fuses(queries, keys) else lse)


def _attention_backward(rule: _Rule, residuals, cotangents) -> tuple[_Queries, _Keys]:
    queries, keys, out, lse = residuals
    d_out, d_lse = cotangents
    # A row sum that the gradient of every score needs; the gradient of lse enters through it too.
    delta = jnp.sum(out.astype(d_lse.dtype) * d_out.astype(d_lse.dtype), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2)
    if lse is None:
        delta = delta - d_lse  # whatever that is in empty rows is discarded later
    else:
        empty = lse == -jnp.inf
        delta = delta - jnp.where(empty, 0, d_lse)
        # exp(score - inf) is 0: an empty row has weights of 0. (A query that pads the last block has cotangents of 0.)
        lse = jnp.where(empty, jnp.inf, lse)

    q_len, k_len = queries.query.shape[1], keys.key.shape[1]
    blocks, size = _blocks(q_len, k_len)
    if blocks == 1:
        of_queries, of_keys = _backward_block(rule, jnp.int32(0), queries, d_out, lse, delta, keys)
    else:

        def step(total: _Keys, xs):
            first, some, d_out, lse, delta = xs
            own = keys.of_block(first, size, blocks)
            of_queries, of_keys = _backward_block(rule, first, some, d_out, lse, delta, own)
            distances = of_keys.distances
            if distances is not None:
                distances = total.add_of_block(distances, first, size, blocks)
            return _Keys(total.key + of_keys.key, total.value + of_keys.value, None, None, distances), of_queries

        gradients = _Keys(keys.key, keys.value, None, None, keys.distances)
        of_keys, of_queries = jax.lax.scan(
            step,
            jax.tree.map(lambda x: jnp.zeros(x.shape, delta.dtype), gradients),
            (
                jnp.arange(blocks) * size,
                _split_queries(queries, blocks, size),
                _split(d_out, 1, blocks, size),
                None if lse is None else _split(lse, 2, blocks, size),
                _split(delta, 2, blocks, size),
            ),
        )
        d_query, _, d_bias, _, d_placed = of_queries
        d_bias = None if d_bias is None else _join(d_bias, 2, q_len)
        d_placed = None if d_placed is None else _join(d_placed, 1, q_len)
        of_queries = _Queries(_join(d_query, 1, q_len), None, d_bias, None, d_placed)
    return of_queries, jax.tree.map(lambda x: x.astype(queries.query.dtype), of_keys)


_attention.defvjp(_attention_forward, _attention_backward)


def _fused_block(rule: _Rule, start: Array, queries: _Queries, keys: _Keys) -> tuple[Array, Array]:
    """Compute `_attention` for the block of queries that begins at query `start`, in the form that XLA fuses.

    XLA's CPU compiler makes one kernel of products, mask and softmax if nothing else uses the maximum or the sum: so
    the weights are divided, not the output, and lse is computed from scores of its own, which the barrier keeps apart.
    Where nobody asks for lse, that is dead code.
    """
    scores, empty = _masked_scores(rule, _mask(rule, start, queries, keys), queries, keys)
    weights = jax.nn.softmax(scores, axis=-1)
    out = _product("bhls,bshd->blhd", weights.astype(keys.value.dtype), keys.value)
    queries_again, keys_again = jax.lax.optimization_barrier((queries, keys))
    mask = _mask(rule, start, queries_again, keys_again)
    scores, empty_again = _masked_scores(rule, mask, queries_again, keys_again)
    top = jnp.max(scores, axis=-1, keepdims=True)
    lse = top[..., 0] + jnp.log(jnp.sum(jnp.exp(scores - top), axis=-1))
    if empty is not None and empty_again is not None:
        out = jnp.where(_of_output(empty), 0, out)
        lse = jnp.where(empty_again, -jnp.inf, lse)
    return out.astype(queries.query.dtype), lse


def _forward_block(rule: _Rule, start: Array, queries: _Queries, keys: _Keys) -> tuple[Array, Array]:
    """Compute `_attention` for the block of queries that begins at query `start`, with dropout, and lse on the way."""
    scores = _scores(rule, queries, keys)
    mask = _mask(rule, start, queries, keys)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    kept = _kept(rule, queries, keys)
    if kept is not None:
        weights = jnp.where(kept, weights, 0)
    out = _product("bhls,bshd->blhd", weights.astype(keys.value.dtype), keys.value)
    empty = total == 0
    share = jnp.where(empty, 0, 1 / (jnp.where(empty, 1, total) * (1 - rule.dropout_rate)))
    out = out * jnp.swapaxes(share, 1, 2)[..., None]
    return out.astype(queries.query.dtype), top[..., 0] + jnp.log(total)


def _backward_block(
    rule: _Rule, start: Array, queries: _Queries, d_out: Array, lse: Array | None, delta: Array, keys: _Keys
) -> tuple[_Queries, _Keys]:
    """Compute the gradients of a block's queries and bias, and its contribution to those of the keys, unrounded.

    Args:
      rule: static facts of the call.
      start: the block's first query.
      queries: the block's arrays.
      d_out: gradient of the output, [B, L, H, Dv].
      lse: [B, H, L], +inf in an empty row; None to compute the softmax anew.
      delta: sum of the output times its gradient, minus the gradient of lse, [B, H, L]; if lse is None, anything in an
        empty row.
      keys: the arrays of all keys.
    """
    dtype = queries.query.dtype
    mask = _mask(rule, start, queries, keys)
    if lse is None:
        scores, empty = _masked_scores(rule, mask, queries, keys)
        weights = jax.nn.softmax(scores, axis=-1)
        if empty is not None:
            weights = jnp.where(empty[..., None], 0, weights)
            delta = jnp.where(empty, 0, delta)
    else:
        scores = _scores(rule, queries, keys)
        weights = jnp.exp(scores - lse[..., None])
    if mask is not None:
        # Of a row whose own scores overflow, which keeps that to itself.
        weights = jnp.where(mask, weights, 0)
    kept = _kept(rule, queries, keys)
    dropped = weights if kept is None else jnp.where(kept, weights * (1 / (1 - rule.dropout_rate)), 0)
    d_value = _product("bhls,blhd->bshd", dropped.astype(dtype), d_out)
    d_weights = _product("blhd,bshd->bhls", d_out, keys.value)
    if kept is not None:
        d_weights = jnp.where(kept, d_weights * (1 / (1 - rule.dropout_rate)), 0)
    d_scores = weights * (d_weights - delta[..., None])
    if rule.softcap is not None:
        d_scores = d_scores * (1 - jnp.square(scores / rule.softcap))
    if mask is not None:
        # A key that is not attended to may be so large that its product with the cotangent is infinite; 0 x inf is NaN.
        d_scores = jnp.where(mask, d_scores, 0)
    d_bias = None
    if queries.bias is not None:
        shared = tuple(axis for axis in range(2) if queries.bias.shape[axis] == 1)
        d_bias = jnp.sum(d_scores, axis=shared, keepdims=True)
    d_scores = d_scores.astype(dtype)
    d_placed = d_distances = None
    if queries.placed is not None and keys.distances is not None:
        length = queries.placed.shape[1]
        like = jax.ShapeDtypeStruct((*d_scores.shape[:3], keys.distances.shape[0]), dtype)
        (d_products,) = jax.linear_transpose(lambda x: dense_from_products(x, length), like)(d_scores)
        d_placed = (_product("bhlr,rhd->blhd", d_products, keys.distances) * rule.scale).astype(dtype)
        d_distances = _product("bhlr,blhd->rhd", d_products, queries.placed) * rule.scale
    d_query = _product("bhls,bshd->blhd", d_scores, keys.key) * rule.scale
    d_key = _product("bhls,blhd->bshd", d_scores, queries.query) * rule.scale
    return (
        _Queries(d_query.astype(dtype), None, d_bias, None, d_placed),
        _Keys(d_key, d_value, None, None, d_distances),
    )


def _masked_scores(rule: _Rule, mask: Array | None, queries: _Queries, keys: _Keys) -> tuple[Array, Array | None]:
    """Return scores [B, H, L, S], -inf where a key is not attended to, and which rows are empty.

    The scores of an empty row are not masked, so that its maximum is a number. Which are empty is bool [1 or B, 1 or H,
    L], or None if none can be.
    """
    # A key that is masked may be so large that partial sums of its products overflow in both directions, to NaN, which
    # no minimum removes. So the queries are made small and the sum large again, by a power of two: exact.
    unit = 1.0 if queries.query.dtype == jnp.float16 else 2.0**64  # products in float16 cannot overflow float32
    small = queries._replace(query=queries.query * jnp.asarray(1 / unit, queries.query.dtype))
    scores = _scores(rule, small, keys, unit)
    seen = mask
    if rule.dense and rule.softcap is None:  # its bias may mask too
        assert queries.bias is not None
        finite = queries.bias > -jnp.inf
        seen = finite if mask is None else mask & finite
    if seen is None:
        return scores, None
    empty = ~jnp.any(seen, axis=-1)
    if mask is not None:
        # The minimum, unlike a choice between two numbers, lets XLA fuse what is before it and after it.
        limit = jnp.where(mask | empty[..., None], jnp.inf, -jnp.inf).astype(scores.dtype)
        scores = jnp.minimum(scores, jnp.broadcast_to(limit, scores.shape))
    return scores, empty


def _of_output(rows: Array) -> Array:
    """Reshape [B, H, L] to be used with the output, [B, L, H, Dv]."""
    return jnp.swapaxes(rows, 1, 2)[..., None]


def _scores(rule: _Rule, queries: _Queries, keys: _Keys, unit: float = 1.0) -> Array:
    """Return scores [B, H, L, S] with bias and softcap, before the mask; `unit` is a factor that the queries lack."""
    scores = _product("blhd,bshd->bhls", queries.query, keys.key) * (rule.scale * unit)
    if queries.bias is not None:
        scores = scores + jnp.broadcast_to(queries.bias, scores.shape)
    if queries.placed is not None and keys.distances is not None:
        products = _product("blhd,rhd->bhlr", queries.placed, keys.distances) * rule.scale
        scores = scores + dense_from_products(products, queries.placed.shape[1])
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    return scores


def _mask(rule: _Rule, start: Array, queries: _Queries, keys: _Keys) -> Array | None:
    """Return which keys each query attends to: bool [1 or B, 1, L, S]; None if nothing is masked."""
    q_len, k_len = queries.query.shape[1], keys.key.shape[1]
    distance = jnp.arange(k_len, dtype=jnp.int32)[None, :] - (start + jnp.arange(q_len, dtype=jnp.int32))[:, None]
    left, right = rule.sides
    terms = []
    if left is not None:
        terms.append((distance >= -left)[None])
    if right is not None:
        terms.append((distance <= right)[None])
    if queries.segment_ids is not None and keys.segment_ids is not None:
        query_ids, key_ids = queries.segment_ids[:, :, None], keys.segment_ids[:, None, :]
        terms += [query_ids == key_ids, query_ids != 0]
    return functools.reduce(jnp.logical_and, terms)[:, None] if terms else None


def _kept(rule: _Rule, queries: _Queries, keys: _Keys) -> Array | None:
    """Return which weights dropout keeps: bool [B, H, L, S]; None without dropout."""
    if queries.words is None or keys.words is None:
        return None
    a, b = queries.words
    return keep(a[..., None], b[..., None], keys.words[:, None, None, :], rule.dropout_rate)


def _accumulator(x: Array) -> jnp.dtype:
    return np.promote_types(x.dtype, np.float32)


def _product(dimensions: str, x: Array, y: Array) -> Array:
    return jnp.einsum(dimensions, x, y, preferred_element_type=_accumulator(x))


def _blocks(q_len: int, k_len: int) -> tuple[int, int]:
    """Return the number of blocks and the number of queries per block; the last block may contain padding."""
    blocks = min(-(-q_len * k_len // BLOCK_SCORES), q_len)
    size = -(-q_len // blocks)
    return -(-q_len // size), size


def _for_blocks(keys: Array, q_len: int, k_len: int) -> Array:
    """Pad `DistanceKeys.keys` to those of all distances of the queries in all blocks, see `_Keys.distances`."""
    blocks, size = _blocks(q_len, k_len)
    before = blocks * size - q_len
    return jnp.pad(keys, ((before, q_len + k_len - 1 - keys.shape[0]), (0, 0), (0, 0)))


def _split(x: Array, axis: int, blocks: int, size: int) -> Array:
    """Pad `axis` with zeros and cut it into blocks, which become the first axis."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
    """Undo `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _split_queries(queries: _Queries, blocks: int, size: int) -> _Queries:
    query, ids, bias, words, placed = queries
    return _Queries(
        _split(query, 1, blocks, size),
        None if ids is None else _split(ids, 1, blocks, size),
        None if bias is None else _split(bias, 2, blocks, size),
        None if words is None else (_split(words[0], 2, blocks, size), _split(words[1], 2, blocks, size)),
        None if placed is None else _split(placed, 1, blocks, size),
    )
