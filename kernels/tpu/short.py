"""TPU kernels for short rows, where one tile holds all scores of a head.

Several heads per step, a one-pass softmax, and one backward kernel that reads everything once and writes all gradients.

On such rows the time goes into fetching and launching, not arithmetic: with one head per step, the chip would mostly
wait. Arrays keep the caller's layout, [batch, tokens, heads * head size]: nothing is transposed, and a head size of 64
is not padded to the 128 lanes of a register in memory. The kernels slice the heads out instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..hash import keep
from .tile import (
    LANES,
    Axis,
    Cotangents,
    Meaning,
    Operands,
    allowed,
    ceil_to,
    column,
    dense_index,
    dot,
    in_log2,
    pad_row,
    row_index,
    rows_within,
    score_gradient,
    scores,
    skew,
    softmax_end,
    softmax_step,
    to_lanes,
    unskew,
    widen,
)

LONGEST = 256
"""Longest row of queries or keys, in tokens, that these kernels support."""

MOST_HEADS = 16
"""Maximum number of query heads per step; their code is unrolled, so that they overlap."""


class _Inputs(NamedTuple):
    query: Any
    key: Any
    value: Any
    query_ids: Any
    key_ids: Any
    row: Any
    dense: Any
    a: Any
    b: Any
    g: Any
    out: Any = None
    lse: Any = None
    delta: Any = None


def heads_a_step(operands: Operands, most: int) -> int:
    """Return the number of key heads per step, at most `most` where possible; 0 if these kernels do not support the
    call.

    A step must read whole registers, that is multiples of 128 lanes, or all heads.
    """
    length, heads, size = operands.query.shape[1:]
    key_length, key_heads, v_size = operands.value.shape[1:]
    group = heads // key_heads
    if not most or max(length, key_length) > LONGEST:
        return 0
    whole = [n for n in range(1, key_heads) if key_heads % n == 0 and n * size % LANES == 0 and n * v_size % LANES == 0]
    whole.append(key_heads)
    best = max((n for n in whole if n <= most), default=whole[0])
    return best if best * group <= MOST_HEADS else 0


def _head(ref: Any, head: int, size: int) -> Any:
    """Slice one head out of [tokens, heads * size]."""
    return ref.at[:, head * size : (head + 1) * size]


def _prepare(
    operands: Operands, cotangents: Cotangents | None, meaning: Meaning, key_heads: int
) -> tuple[_Inputs, _Inputs, tuple[int, int]]:
    """Return arrays, block specs, and the grid (B, steps of `key_heads` heads)."""
    b, length, heads, size = operands.query.shape
    key_length = operands.key.shape[1]
    shown = key_heads * (heads // operands.key.shape[2])
    v_size = operands.value.shape[3]
    queries, keys = ceil_to(length, LANES), ceil_to(key_length, LANES)
    row = operands.row
    if row is not None and cotangents is None:
        row = pad_row(in_log2(row), length, key_length, queries, keys)
    elif row is not None:  # Keys run along dimension 0 in the backward pass, so the row is reversed.
        row = pad_row(in_log2(row[:, ::-1]), key_length, length, keys, queries)

    def flat(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1)

    def block(tokens: int, lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tokens, lanes), lambda b, n: (b, 0, n))

    def rows() -> pl.BlockSpec:
        return pl.BlockSpec((None, shown, 1, queries), lambda b, n: (b, n, 0, 0))

    dense = None
    if operands.dense is not None:
        which = dense_index(operands.dense.shape)
        dense = pl.BlockSpec(
            (None, shown if operands.dense.shape[1] > 1 else 1, queries, keys), lambda b, n: (*which(b, n), 0, 0)
        )
    arrays = _Inputs(
        query=flat(operands.query),
        key=flat(operands.key),
        value=flat(operands.value),
        query_ids=to_lanes(operands.query_ids, queries),
        key_ids=to_lanes(operands.key_ids, keys),
        row=row,
        dense=operands.dense,
        a=to_lanes(operands.a, queries),
        b=to_lanes(operands.b, queries),
        g=to_lanes(operands.g, keys),
    )
    of_row = row_index(operands.g)
    specs = _Inputs(
        query=block(queries, shown * size),
        key=block(keys, key_heads * size),
        value=block(keys, key_heads * v_size),
        query_ids=pl.BlockSpec((None, 1, queries), lambda b, n: (b, 0, 0)),
        key_ids=pl.BlockSpec((None, 1, keys), lambda b, n: (b, 0, 0)),
        row=pl.BlockSpec((shown, 1, queries + keys), lambda b, n: (n, 0, 0)),
        dense=dense,
        a=rows(),
        b=rows(),
        g=pl.BlockSpec((None, 1, keys), lambda b, n: (of_row(b), 0, 0)),
    )
    if cotangents is not None:
        arrays = arrays._replace(
            out=flat(cotangents.out),
            lse=to_lanes(cotangents.lse, queries, jnp.inf),
            delta=to_lanes(cotangents.delta, queries),
        )
        specs = specs._replace(out=block(queries, shown * v_size), lse=rows(), delta=rows())
    specs = _Inputs(*(spec if array is not None else None for array, spec in zip(arrays, specs, strict=True)))
    return arrays, specs, (b, operands.key.shape[2] // key_heads)


def forward(operands: Operands, meaning: Meaning, key_heads: int, interpret: Any) -> tuple[Array, Array]:
    """Compute the output [B, L, H, Dv] in the query's dtype, and lse [B, H, L], with `key_heads` key heads per step."""
    arrays, specs, grid = _prepare(operands, None, meaning, key_heads)
    b, length, heads, size = operands.query.shape
    group, v_size = heads // operands.key.shape[2], operands.value.shape[3]
    shown = key_heads * group
    queries, keys = ceil_to(length, LANES), ceil_to(operands.key.shape[1], LANES)
    area = meaning.area

    def kernel(x: _Inputs, out: Any, lse: Any) -> None:
        query_ids, key_ids = (column(x.query_ids[...]), x.key_ids[...]) if meaning.segmented else (None, None)
        mask = allowed(meaning, 0, queries, 0, keys, query_ids, key_ids, Axis.QUERIES_DOWN)
        lane = lax.broadcasted_iota(jnp.int32, (queries, LANES), 1)
        ends = jnp.zeros((queries, LANES))
        for head in range(shown):
            key, value = _head(x.key, head // group, size)[...], _head(x.value, head // group, v_size)[...]
            if area.keys % keys:
                value = rows_within(value, 0, area.keys)
            bias = None
            if meaning.bias == "row":
                bias = skew(x.row[head], queries, keys)
            elif meaning.bias == "dense":
                bias = in_log2(x.dense[head if x.dense.shape[0] > 1 else 0])
            values, _ = scores(meaning, dot(_head(x.query, head, size)[...], key, (1, 1)), bias, mask)
            nothing = jnp.full((queries, LANES), -jnp.inf), jnp.zeros((queries, LANES))
            weights, top, total, _ = softmax_step(values, *nothing)
            if meaning.rate:
                a, b = (widen(column(word[head]), keys) for word in (x.a, x.b))
                bits = keep(a, b, x.g[...], meaning.rate)
                weights = jnp.where(bits, weights, 0.0)
            factor, end = softmax_end(top, total)
            products = dot(weights.astype(value.dtype), value, (1, 0))
            products = products * widen(factor * (1 / (1 - meaning.rate)), v_size)
            _head(out, head, v_size)[...] = products.astype(out.dtype)
            ends = jnp.where(lane == head, end, ends)
        # One transposition for all heads, a lane each.
        ends = jnp.transpose(ends)
        for head in range(shown):
            lse[head] = ends[head : head + 1]

    out, lse = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs],
        out_specs=[
            pl.BlockSpec((None, queries, shown * v_size), lambda b, n: (b, 0, n)),
            pl.BlockSpec((None, shown, 1, queries), lambda b, n: (b, n, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((b, length, heads * v_size), operands.query.dtype),
            jax.ShapeDtypeStruct((b, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="attention_short_forward",
    )(arrays)
    return out.reshape(b, length, heads, v_size), lse[:, :, 0]


def backward(
    operands: Operands, cotangents: Cotangents, meaning: Meaning, key_heads: int, interpret: Any
) -> tuple[Array, Array, Array, Array | None]:
    """Compute the gradients of query, key and value, with `key_heads` key heads per step.

    The fourth result is the gradient of the Toeplitz row of each (row, head), float32 [B, H, L+S-1], or None.
    """
    arrays, specs, grid = _prepare(operands, cotangents, meaning, key_heads)
    b, length, heads, size = operands.query.shape
    key_length, all_key_heads, v_size = operands.value.shape[1:]
    group = heads // all_key_heads
    shown = key_heads * group
    queries, keys = ceil_to(length, LANES), ceil_to(key_length, LANES)
    area = meaning.area

    def kernel(x: _Inputs, query_gradient: Any, key_gradient: Any, value_gradient: Any, *row_gradient: Any) -> None:
        query_ids, key_ids = (x.query_ids[...], column(x.key_ids[...])) if meaning.segmented else (None, None)
        mask = allowed(meaning, 0, queries, 0, keys, query_ids, key_ids, Axis.KEYS_DOWN)
        key_words = widen(column(x.g[...]), queries) if meaning.rate else None
        for key_head in range(key_heads):
            key, value = _head(x.key, key_head, size)[...], _head(x.value, key_head, v_size)[...]
            if area.keys % keys:
                key, value = rows_within(key, 0, area.keys), rows_within(value, 0, area.keys)
            key_sums = value_sums = None
            for head in range(key_head * group, (key_head + 1) * group):
                query, out = _head(x.query, head, size)[...], _head(x.out, head, v_size)[...]
                if area.queries % queries:
                    query, out = rows_within(query, 0, area.queries), rows_within(out, 0, area.queries)
                lse = x.lse[head]
                lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
                bias = None
                if meaning.bias == "row":
                    bias = skew(x.row[head], keys, queries)
                elif meaning.bias == "dense":
                    bias = jnp.transpose(in_log2(x.dense[head if x.dense.shape[0] > 1 else 0]))
                values, bent = scores(meaning, dot(key, query, (1, 1)), bias, mask)
                bits = None if key_words is None else keep(x.a[head], x.b[head], key_words, meaning.rate)
                weights, change = score_gradient(
                    meaning, jnp.exp2(values - lse), dot(value, out, (1, 1)), x.delta[head], bent, bits, mask
                )
                if row_gradient:
                    row_gradient[0][head] = unskew(change)
                change = change.astype(key.dtype)
                query_part = dot(change, key, (0, 0)) * meaning.scale
                _head(query_gradient, head, size)[...] = query_part.astype(query_gradient.dtype)
                key_part, value_part = dot(change, query, (1, 0)), dot(weights.astype(out.dtype), out, (1, 0))
                key_sums = key_part if key_sums is None else key_sums + key_part
                value_sums = value_part if value_sums is None else value_sums + value_part
            assert key_sums is not None
            assert value_sums is not None
            _head(key_gradient, key_head, size)[...] = (key_sums * meaning.scale).astype(key_gradient.dtype)
            _head(value_gradient, key_head, v_size)[...] = value_sums.astype(value_gradient.dtype)

    out_specs = [specs.query, specs.key, specs.value]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
    if meaning.bias == "row":
        out_specs.append(pl.BlockSpec((None, shown, 1, queries + keys), lambda b, n: (b, n, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((b, heads, 1, queries + keys), jnp.float32))
    query, key, value, *row_gradient = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="attention_short_backward",
    )(arrays)
    wholes = operands.query, operands.key, operands.value
    gradients = tuple(x.reshape(whole.shape) for x, whole in zip((query, key, value), wholes, strict=True))
    if not row_gradient:
        return *gradients, None
    first = keys - key_length + 1
    return *gradients, row_gradient[0][:, :, 0, first : first + length + key_length - 1][..., ::-1]
