"""TPU kernels for rows of any length: forward, the gradients of queries, of keys and values, and of a dense bias.

Each grid step holds one block of queries (or keys, for their gradients) and a long *chunk* of the other side, and loops
over the tiles of the chunk between bounds that come from the segments, the window and causality. A masked tile
therefore costs nothing, or a few scalar instructions where it lies between needed tiles; a chunk without needed tiles
is not fetched, since the index maps repeat the nearest chunk that has some. A row no longer than a chunk is fetched
once for all blocks of the other side.

No sum across steps depends on an order that the hardware chooses: results are bitwise reproducible.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..hash import keep
from .frame import Inputs, Tiling, inputs_by_keys, inputs_by_queries, make_frame
from .tile import (
    LANES,
    Axis,
    Cotangents,
    Meaning,
    Operands,
    allowed,
    as_row,
    ceil_to,
    column,
    dot,
    in_log2,
    query_words,
    row_index,
    row_part,
    rows_within,
    score_gradient,
    scores,
    skew,
    softmax_end,
    softmax_step,
    unskew,
    widen,
)


def forward(operands: Operands, meaning: Meaning, tiling: Tiling, interpret: Any) -> tuple[Array, Array]:
    """Compute the output [B, H, L, Dv] in the query's dtype, and lse [B, H, L]."""
    frame = make_frame(operands, meaning, tiling, by_keys=False)
    arrays, specs, grid = inputs_by_queries(operands, None, frame)
    area, v_size = meaning.area, operands.value.shape[3]
    b, heads = operands.query.shape[:2]

    def kernel(s: Any, x: Inputs, out: Any, lse: Any, sums: Any, top: Any, total: Any) -> None:
        b, i, c = (pl.program_id(axis) for axis in (0, 2, 3))
        query_start = i * tiling.queries

        @pl.when(c == 0)
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)
            top[...] = jnp.full_like(top, -jnp.inf)
            total[...] = jnp.zeros_like(total)

        query = x.query[...]
        query_ids = column(x.query_ids[...]) if meaning.segmented else None
        words = query_words(x, meaning, tiling.keys)

        def tile(key_start: Any, offset: Any, masked: bool) -> None:
            place = pl.ds(offset, tiling.keys)
            value = x.value[place]
            mask = None
            if masked:
                key_ids = x.key_ids[:, place] if meaning.segmented else None
                mask = allowed(
                    meaning, query_start, tiling.queries, key_start, tiling.keys, query_ids, key_ids, Axis.QUERIES_DOWN
                )
                if area.keys % tiling.keys:
                    value = rows_within(value, key_start, area.keys)
            bias = _bias_by_queries(meaning, tiling, x, query_start, key_start, offset)
            values, _ = scores(meaning, dot(query, x.key[place], (1, 1)), bias, mask)
            weights, top[...], total[...], ratio = softmax_step(values, top[...], total[...])
            if words is not None:
                weights = jnp.where(keep(*words, x.g[:, place], meaning.rate), weights, 0.0)
            sums[...] = sums[...] * widen(ratio, v_size) + dot(weights.astype(value.dtype), value, (1, 0))

        frame.walk(s, b, i, c, tile)

        @pl.when(c == frame.chunks - 1)
        def _() -> None:
            factor, end = softmax_end(top[...], total[...])
            out[...] = (sums[...] * widen(factor * (1 / (1 - meaning.rate)), v_size)).astype(out.dtype)
            lse[...] = as_row(end)

    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs],
            out_specs=[
                pl.BlockSpec((None, None, tiling.queries, v_size), lambda b, h, i, c, s: (b, h, i, 0)),
                pl.BlockSpec((None, None, 1, tiling.queries), lambda b, h, i, c, s: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((tiling.queries, v_size), jnp.float32),
                pltpu.VMEM((tiling.queries, LANES), jnp.float32),
                pltpu.VMEM((tiling.queries, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, heads, area.queries, v_size), operands.query.dtype),
            jax.ShapeDtypeStruct((b, heads, 1, area.queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="attention_forward",
    )(frame.scalars.packed, arrays)
    return out, lse[:, :, 0]


def _bias_by_queries(
    meaning: Meaning, tiling: Tiling, x: Inputs, query_start: Any, key_start: Any, offset: Any
) -> Array | None:
    """Return the bias of a tile whose queries run along dimension 0."""
    if meaning.bias == "row":
        start = row_part(query_start, key_start, tiling.queries, ceil_to(meaning.area.queries, tiling.queries))
        return skew(x.row[:, pl.ds(start, tiling.queries + tiling.keys)], tiling.queries, tiling.keys)
    if meaning.bias == "dense":
        return in_log2(x.dense[:, pl.ds(offset, tiling.keys)])
    return None


def query_gradient(
    operands: Operands, cotangents: Cotangents, meaning: Meaning, tiling: Tiling, interpret: Any
) -> tuple[Array, Array | None]:
    """Compute the gradient of the queries [B, H, L, D] and, where there is one, of the Toeplitz row of each (row,
    head).

    The latter is float32 [B, H, L+S-1].
    """
    frame = make_frame(operands, meaning, tiling, by_keys=False)
    arrays, specs, grid = inputs_by_queries(operands, cotangents, frame)
    area, size = meaning.area, operands.query.shape[3]
    q_padded = ceil_to(area.queries, tiling.queries)

    def kernel(s: Any, x: Inputs, gradient: Any, *rest: Any) -> None:
        *row_gradient, sums = rest
        b, i, c = (pl.program_id(axis) for axis in (0, 2, 3))
        query_start = i * tiling.queries

        @pl.when(c == 0)
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        if row_gradient:

            @pl.when((c == 0) & (i == 0))
            def _() -> None:
                row_gradient[0][...] = jnp.zeros_like(row_gradient[0])

        query, out = x.query[...], x.out[...]
        if area.queries % tiling.queries:
            query, out = rows_within(query, query_start, area.queries), rows_within(out, query_start, area.queries)
        lse, delta = (widen(column(row[...]), tiling.keys) for row in (x.lse, x.delta))
        lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
        query_ids = column(x.query_ids[...]) if meaning.segmented else None
        words = query_words(x, meaning, tiling.keys)

        def tile(key_start: Any, offset: Any, masked: bool) -> None:
            place = pl.ds(offset, tiling.keys)
            key, value = x.key[place], x.value[place]
            mask = None
            if masked:
                key_ids = x.key_ids[:, place] if meaning.segmented else None
                mask = allowed(
                    meaning, query_start, tiling.queries, key_start, tiling.keys, query_ids, key_ids, Axis.QUERIES_DOWN
                )
                if area.keys % tiling.keys:
                    key, value = rows_within(key, key_start, area.keys), rows_within(value, key_start, area.keys)
            bias = _bias_by_queries(meaning, tiling, x, query_start, key_start, offset)
            values, bent = scores(meaning, dot(query, key, (1, 1)), bias, mask)
            bits = None if words is None else keep(*words, x.g[:, place], meaning.rate)
            weights, products = jnp.exp2(values - lse), dot(out, value, (1, 1))
            _, change = score_gradient(meaning, weights, products, delta, bent, bits, mask)
            if row_gradient:
                start = row_part(query_start, key_start, tiling.queries, q_padded)
                row_gradient[0][:, pl.ds(start, tiling.queries + tiling.keys)] += unskew(change)
            sums[...] += dot(change.astype(key.dtype), key, (1, 0))

        frame.walk(s, b, i, c, tile)

        @pl.when(c == frame.chunks - 1)
        def _() -> None:
            gradient[...] = (sums[...] * meaning.scale).astype(gradient.dtype)

    out_specs = [pl.BlockSpec((None, None, tiling.queries, size), lambda b, h, i, c, s: (b, h, i, 0))]
    out_shape = [jax.ShapeDtypeStruct(operands.query.shape, operands.query.dtype)]
    if meaning.bias == "row":
        length = arrays.row.shape[2]
        out_specs.append(pl.BlockSpec((None, None, 1, length), lambda b, h, i, c, s: (b, h, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((*operands.query.shape[:2], 1, length), jnp.float32))
    gradient, *row_gradient = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((tiling.queries, size), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            # The row's gradient accumulates over the query blocks.
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if meaning.bias == "row" else "parallel",
                "arbitrary",
            )
        ),
        interpret=interpret,
        name="attention_query_gradient",
    )(frame.scalars.packed, arrays)
    if not row_gradient:
        return gradient, None
    first = q_padded - area.queries + 1
    return gradient, row_gradient[0][:, :, 0, first : first + area.queries + area.keys - 1]


MOST_SUMS = 4 * 2**20
"""Bytes of VMEM that all of a row's query gradients may take, as sums and as what is written."""


def fits_together(group: int, queries: int, size: int, width: int, tiling: Tiling) -> bool:
    """Tell whether one kernel computes all gradients of queries, keys and values: with five products, not seven.

    The keys' kernel must hold the query gradients of a whole row, and come to a head's keys one after the other.

    Args:
      group: number of query heads that share a key head.
      queries: length of the row, L.
      size: head size D.
      width: bytes of an element, as the kernels compute.
      tiling: of the keys' kernel.
    """
    return group == 1 and ceil_to(queries, tiling.chunk) * ceil_to(size, LANES) * (4 + 2 * width) <= MOST_SUMS


def key_value_gradients(
    operands: Operands, cotangents: Cotangents, meaning: Meaning, tiling: Tiling, interpret: Any, *, together: bool
) -> tuple[Array, Array, Array | None, Array | None]:
    """Compute the gradients of the keys [B, K, S, D] and of the values [B, K, S, Dv].

    `together` adds those of the queries and of the Toeplitz row, as `query_gradient` returns them, instead of None.
    """
    frame = make_frame(operands, meaning, tiling, by_keys=True)
    arrays, specs, grid = inputs_by_keys(operands, cotangents, frame)
    area, size, v_size = meaning.area, operands.key.shape[3], operands.value.shape[3]
    group = operands.query.shape[1] // operands.key.shape[1]
    b, heads = operands.query.shape[:2]
    q_padded, k_padded = ceil_to(area.queries, tiling.chunk), ceil_to(area.keys, tiling.keys)
    of_row = together and meaning.bias == "row"

    def kernel(s: Any, x: Inputs, key_gradient: Any, value_gradient: Any, *rest: Any) -> None:
        *more, key_sums, value_sums = rest[: len(rest) - together]
        query_sums = rest[-1] if together else None
        b, j, g, c = (pl.program_id(axis) for axis in (0, 2, 3, 4))
        key_start = j * tiling.keys

        @pl.when((j == 0) & (c == 0))
        def _() -> None:
            if query_sums is not None:
                query_sums[...] = jnp.zeros_like(query_sums)
            if of_row:
                more[1][...] = jnp.zeros_like(more[1])

        @pl.when((c == 0) & (g == 0))
        def _() -> None:
            key_sums[...] = jnp.zeros_like(key_sums)
            value_sums[...] = jnp.zeros_like(value_sums)

        key, value = x.key[...], x.value[...]
        if area.keys % tiling.keys:
            key, value = rows_within(key, key_start, area.keys), rows_within(value, key_start, area.keys)
        key_ids = column(x.key_ids[...]) if meaning.segmented else None
        key_words = widen(column(x.g[...]), tiling.queries) if meaning.rate else None

        def tile(query_start: Any, offset: Any, masked: bool) -> None:
            place = pl.ds(offset, tiling.queries)
            query, out = x.query[place], x.out[place]
            lse, delta = x.lse[:, place], x.delta[:, place]
            lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
            mask = None
            if masked:
                query_ids = x.query_ids[:, place] if meaning.segmented else None
                mask = allowed(
                    meaning, query_start, tiling.queries, key_start, tiling.keys, query_ids, key_ids, Axis.KEYS_DOWN
                )
                if area.queries % tiling.queries:
                    query, out = (
                        rows_within(query, query_start, area.queries),
                        rows_within(out, query_start, area.queries),
                    )
            bias = None
            if meaning.bias == "row":
                start = row_part(key_start, query_start, tiling.keys, k_padded)
                bias = skew(x.row[:, pl.ds(start, tiling.keys + tiling.queries)], tiling.keys, tiling.queries)
            elif meaning.bias == "dense":
                bias = jnp.transpose(in_log2(x.dense[place]))
            values, bent = scores(meaning, dot(key, query, (1, 1)), bias, mask)
            bits = None if key_words is None else keep(x.a[:, place], x.b[:, place], key_words, meaning.rate)
            weights, change = score_gradient(
                meaning, jnp.exp2(values - lse), dot(value, out, (1, 1)), delta, bent, bits, mask
            )
            value_sums[...] += dot(weights.astype(out.dtype), out, (1, 0))
            if of_row:
                start = row_part(key_start, query_start, tiling.keys, k_padded)
                more[1][:, pl.ds(start, tiling.keys + tiling.queries)] += unskew(change)
            change = change.astype(query.dtype)
            key_sums[...] += dot(change, query, (1, 0))
            if query_sums is not None:
                query_sums[pl.ds(pl.multiple_of(query_start, LANES), tiling.queries)] += dot(change, key, (0, 0))

        frame.walk(s, b, j, c, tile)

        @pl.when((c == frame.chunks - 1) & (g == group - 1))
        def _() -> None:
            key_gradient[...] = (key_sums[...] * meaning.scale).astype(key_gradient.dtype)
            value_gradient[...] = value_sums[...].astype(value_gradient.dtype)

        if query_sums is not None:

            @pl.when((c == frame.chunks - 1) & (j == grid[2] - 1))
            def _() -> None:
                more[0][...] = (query_sums[...] * meaning.scale).astype(more[0].dtype)

    shapes = [(tiling.keys, lanes) for lanes in (size, v_size)]
    out_specs = [pl.BlockSpec((None, None, *shape), lambda b, k, j, g, c, s: (b, k, j, 0)) for shape in shapes]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.key, operands.value)]
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in shapes]
    if together:
        wholes = [((q_padded, size), operands.query.dtype)]
        wholes += [((1, k_padded + q_padded), jnp.dtype(jnp.float32))] if of_row else []
        out_specs += [pl.BlockSpec((None, None, *shape), lambda b, k, j, g, c, s: (b, k, 0, 0)) for shape, _ in wholes]
        out_shape += [jax.ShapeDtypeStruct((b, heads, *shape), dtype) for shape, dtype in wholes]
        scratch.append(pltpu.VMEM((q_padded, size), jnp.float32))
    key, value, *more = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=[specs], out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            # The query gradients accumulate over the key blocks.
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if together else "parallel",
                "arbitrary",
                "arbitrary",
            )
        ),
        interpret=interpret,
        name="attention_gradients" if together else "attention_key_value_gradients",
    )(frame.scalars.packed, arrays)
    query = more[0][:, :, : area.queries] if together else None
    first = k_padded - area.keys + 1
    row = more[1][:, :, 0, first : first + area.queries + area.keys - 1][..., ::-1] if of_row else None
    return key, value, query, row


def dense_gradient(
    operands: Operands, cotangents: Cotangents, meaning: Meaning, tiling: Tiling, interpret: Any
) -> Array:
    """Compute the gradient of a dense bias, in its shape and dtype; it is summed where rows or heads share the bias.

    This is a separate kernel that recomputes the scores, so that a call whose bias is not learned can omit it.
    """
    frame = make_frame(operands, meaning, dataclasses.replace(tiling, chunk=tiling.keys), by_keys=False)
    tiling, area = frame.tiling, meaning.area
    b, heads, _, size = operands.query.shape
    group = heads // operands.key.shape[1]
    v_size = operands.value.shape[3]
    rows, shown = operands.dense.shape[:2]
    heads_summed = heads // shown
    summed = (b // rows) * heads_summed
    of_row = row_index(operands.g)

    def which(y: Any, z: Any, r: Any) -> tuple[Any, Any]:
        """Return the row and head that step r adds to the bias of row y, head z."""
        b = lax.div(r, heads_summed) if rows == 1 else y
        return b, (lax.rem(r, heads_summed) if shown == 1 else z)

    def by_query(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tiling.queries, lanes), lambda y, z, i, j, r, s: (*which(y, z, r), i, 0))

    def by_query_row() -> pl.BlockSpec:
        return pl.BlockSpec((None, None, 1, tiling.queries), lambda y, z, i, j, r, s: (*which(y, z, r), 0, i))

    def by_key(lanes: int) -> pl.BlockSpec:
        def index(y: Any, z: Any, i: Any, j: Any, r: Any, s: Any) -> tuple[Any, ...]:
            b, h = which(y, z, r)
            return b, lax.div(h, group), j, 0

        return pl.BlockSpec((None, None, tiling.keys, lanes), index)

    arrays = inputs_by_queries(operands, cotangents, frame)[0]
    specs = Inputs(
        query=by_query(size),
        key=by_key(size),
        value=by_key(v_size),
        query_ids=pl.BlockSpec((None, 1, tiling.queries), lambda y, z, i, j, r, s: (which(y, z, r)[0], 0, i)),
        key_ids=pl.BlockSpec((None, 1, tiling.keys), lambda y, z, i, j, r, s: (which(y, z, r)[0], 0, j)),
        row=None,
        dense=pl.BlockSpec((None, None, tiling.queries, tiling.keys), lambda y, z, i, j, r, s: (y, z, i, j)),
        a=by_query_row(),
        b=by_query_row(),
        g=pl.BlockSpec((None, 1, tiling.keys), lambda y, z, i, j, r, s: (of_row(which(y, z, r)[0]), 0, j)),
        out=by_query(v_size),
        lse=by_query_row(),
        delta=by_query_row(),
    )
    specs = Inputs(*(spec if array is not None else None for array, spec in zip(arrays, specs, strict=True)))

    def kernel(s: Any, x: Inputs, gradient: Any, sums: Any) -> None:
        y, z, i, j, r = (pl.program_id(axis) for axis in range(5))
        b, _ = which(y, z, r)
        query_start, key_start = i * tiling.queries, j * tiling.keys

        @pl.when(r == 0)
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        def tile(masked: bool) -> None:
            query, key, value, out = x.query[...], x.key[...], x.value[...], x.out[...]
            mask = None
            if masked:
                query_ids, key_ids = (column(x.query_ids[...]), x.key_ids[...]) if meaning.segmented else (None, None)
                mask = allowed(
                    meaning, query_start, tiling.queries, key_start, tiling.keys, query_ids, key_ids, Axis.QUERIES_DOWN
                )
                if area.queries % tiling.queries:
                    query, out = (
                        rows_within(query, query_start, area.queries),
                        rows_within(out, query_start, area.queries),
                    )
                if area.keys % tiling.keys:
                    key, value = rows_within(key, key_start, area.keys), rows_within(value, key_start, area.keys)
            lse, delta = (widen(column(row[...]), tiling.keys) for row in (x.lse, x.delta))
            lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
            values, bent = scores(meaning, dot(query, key, (1, 1)), in_log2(x.dense[...]), mask)
            words = query_words(x, meaning, tiling.keys)
            bits = None if words is None else keep(*words, x.g[...], meaning.rate)
            weights, products = jnp.exp2(values - lse), dot(out, value, (1, 1))
            _, change = score_gradient(meaning, weights, products, delta, bent, bits, mask)
            sums[...] += change

        frame.at(s, b, i, j, tile)

        @pl.when(r == summed - 1)
        def _() -> None:
            gradient[...] = sums[...].astype(gradient.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, shown, pl.cdiv(area.queries, tiling.queries), pl.cdiv(area.keys, tiling.keys), summed),
            in_specs=[specs],
            out_specs=specs.dense,
            scratch_shapes=[pltpu.VMEM((tiling.queries, tiling.keys), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(operands.dense.shape, operands.dense.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
        interpret=interpret,
        name="attention_dense_bias_gradient",
    )(frame.scalars.packed, arrays)
