"""Gradient of the bias on Hopper, summed within a kernel and always in the same order.

A block iterates over all score tiles that share a tile of the bias, and sums their gradients in registers. For a
Toeplitz row these are the tiles of one diagonal band, over all rows of the batch; the sum along the diagonals
themselves is taken once per band, outside the kernel, instead of once per tile. The kernel writes a few times H x (L +
S) x 128 numbers, linear in the lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .operands import BiasTiles, Vectors, in_tiles, launch, registers
from .tile import (
    MULTIPROCESSORS,
    WARPGROUP_ROWS,
    Blocks,
    Options,
    Side,
    ceil_to,
    matrix,
    recomputed,
    release,
    score_gradient,
    two_products,
    zeros,
)
from .work import Ring, Work, work


def bias_gradient(
    options: Options,
    blocks: Blocks,
    query: Array,
    key: Array,
    value: Array,
    gradient: Array,
    extra: Mapping[str, Array],
) -> Array:
    """Compute the gradient of the bias, float32: [H, L+S-1] for a Toeplitz row, else the dense bias's shape.

    `extra` as in `query_gradient`.
    """
    batch, queries, heads, size = query.shape
    keys, key_heads, value_size = value.shape[1:]
    rows, columns, stages, group = blocks.rows, blocks.columns, blocks.stages, heads // key_heads
    vectors = Vectors(options, extra, rows, columns)
    biases = BiasTiles(options, extra, blocks, queries, axis=0)
    ids = extra.get("query_segments"), extra.get("key_segments")
    items = work(options.area(queries, keys), rows, columns, *ids, axis=1)
    inputs = dict(zip(("q", "k", "v", "do"), in_tiles(query, key, value, gradient), strict=True))
    inputs |= vectors.arrays | biases.arrays
    if items.ranges is not None:
        inputs["ranges"] = items.ranges
    ring = Ring(stages)
    query_tiles, key_tiles = -(-queries // rows), -(-keys // columns)
    ratio = rows // columns
    if rows % columns:
        raise ValueError(f"expected columns that divide the {rows} rows of a block, found {blocks}")
    rows_of_bias, heads_of_bias = extra["dense"].shape[:2] if options.bias == "dense" else (1, heads)
    listed = None
    if options.bias == "row":
        # Band n holds the tiles whose first key and first query are (n - before) * columns apart.
        before = (query_tiles - 1) * ratio
        grid = {"tile": key_tiles + before, "head": heads}
        parts = max(1, min(batch, 2 * MULTIPROCESSORS // (grid["tile"] * heads)))
        grid["batch"] = parts
        share = -(-batch // parts)
        out_shape: tuple[int, ...] = (heads, grid["tile"], parts, rows, columns)
        if items.ranges is not None:
            listed, inputs["counts"] = _needed_steps(items.ranges, batch, key_tiles, ratio, parts)
            inputs["steps"] = listed
    else:
        before = parts = share = 0
        grid = {"tile": query_tiles * key_tiles, "head": heads_of_bias, "batch": rows_of_bias}
        out_shape = (rows_of_bias, heads_of_bias, ceil_to(queries, 8), ceil_to(keys, 32))  # whole tiles are stored

    def steps_of(
        refs: Mapping[str, Any], tile: Any, h: Any, part: Any
    ) -> tuple[Any, Callable[[Any], tuple[Any, Any, Any, Any]]]:
        """Return a block's number of steps, and a function from a step to its batch row, head, query and key tile."""
        if listed is not None:

            def at_listed(n: Any) -> tuple[Any, Any, Any, Any]:
                pair = refs["steps"][tile, part, n]
                b, i = lax.div(pair, jnp.int32(query_tiles)), lax.rem(pair, jnp.int32(query_tiles))
                return b, h, i, i * ratio + (tile - before)

            return refs["counts"][tile, part], at_listed
        if options.bias == "row":
            offset = tile - before
            low = jnp.maximum(lax.div(ratio - 1 - offset, jnp.int32(ratio)), 0)
            high = jnp.minimum(lax.div(key_tiles - 1 - offset, jnp.int32(ratio)), query_tiles - 1)
            length = jnp.maximum(high - low + 1, 0)
            some = jnp.maximum(jnp.minimum(share, batch - part * share), 0)

            def at(n: Any) -> tuple[Any, Any, Any, Any]:
                i = low + lax.rem(n, length)
                return part * share + lax.div(n, length), h, i, i * ratio + offset

            return some * length, at
        i, j = lax.div(tile, jnp.int32(key_tiles)), lax.rem(tile, jnp.int32(key_tiles))
        head_count = heads if heads_of_bias == 1 else 1
        count = (batch if rows_of_bias == 1 else 1) * head_count

        def at_dense(n: Any) -> tuple[Any, Any, Any, Any]:
            b = lax.div(n, jnp.int32(head_count)) if rows_of_bias == 1 else part
            return b, (lax.rem(n, jnp.int32(head_count)) if heads_of_bias == 1 else h), i, j

        return jnp.int32(count), at_dense

    def body(refs: Mapping[str, Any], outs: Any, scratch: Any) -> None:
        tile, h, part, w = (lax.axis_index(name) for name in ("tile", "head", "batch", "warpgroup"))
        count, at = steps_of(refs, tile, h, part)

        def bounds_of(n: Array) -> tuple[Any, Any, Any, Any, Work, Any]:
            b, head, i, j = at(n)
            bounds = items.read(refs.get("ranges"), b, i)
            # The steps of a Toeplitz row are needed, all of them.
            return b, head, i, j, bounds, options.bias == "row" or (j >= bounds.first) & (j < bounds.stop)

        @pl.when(w == blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=False)

            def step(n: Array, done: Array) -> Array:
                b, head, i, j, _bounds, needed = bounds_of(n)

                def copy() -> None:
                    key_head = head if group == 1 else lax.div(head, jnp.int32(group))
                    slot = ring.slot(done)
                    ring.wait_free(scratch["free"], done)
                    ready = scratch["ready"].at[slot]
                    for own in range(blocks.warpgroups):
                        place = pl.ds(i * rows + own * WARPGROUP_ROWS, WARPGROUP_ROWS)
                        for name in ("q", "do"):
                            plgpu.copy_gmem_to_smem(refs[name].at[b, place, head], scratch[name].at[slot, own], ready)
                    place = pl.ds(j * columns, columns)
                    for name in ("k", "v"):
                        plgpu.copy_gmem_to_smem(refs[name].at[b, place, key_head], scratch[name].at[slot], ready)
                    vectors.copy_queries(refs, scratch, slot, b, head, pl.ds(i * rows, rows), ready)
                    vectors.copy_keys(refs, scratch, slot, b, place, ready)
                    biases.copy(refs, scratch, slot, b, head, i * rows, j * columns, ready)

                if needed is True:
                    copy()
                    return done + 1
                pl.when(needed)(copy)
                return done + needed.astype(jnp.int32)

            ring.drain(lax.fori_loop(0, count, step, jnp.int32(0)), scratch["free"])

        @pl.when(w < blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=True)
            shape, mine = (WARPGROUP_ROWS, columns), pl.ds(w * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def add(i: Any, j: Any, bounds: Work, done: Array, total: Array) -> Array:
                slot = ring.slot(done)
                side = Side(i * rows + w * WARPGROUP_ROWS, j * columns, shape, 0)
                plgpu.barrier_wait(scratch["ready"].at[slot])
                every = {name: side.load_queries(scratch[name].at[slot, mine]) for name in vectors.queries}
                every |= {name: side.load_keys(scratch[name].at[slot]) for name in vectors.keys}
                bias = biases.tile(scratch, slot, w, side)
                pairs = (
                    (scratch["q"].at[slot, w], scratch["k"].at[slot].T),
                    (scratch["do"].at[slot, w], scratch["v"].at[slot].T),
                )
                whole = bounds.whole(j)
                (weights, slope), dropped = two_products(
                    pairs, lambda s: recomputed(whole, options, s, bias, side, keys, every)
                )
                release()
                plgpu.barrier_arrive(scratch["free"].at[slot])
                return total + score_gradient(whole, options, weights, slope, dropped, side, keys, every)

            def step(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                done, total = carry
                _b, _head, i, j, bounds, needed = bounds_of(n)
                if needed is True:
                    return done + 1, add(i, j, bounds, done, total)
                total = lax.cond(needed, lambda total: add(i, j, bounds, done, total), lambda total: total, total)
                return done + needed.astype(jnp.int32), total

            _, total = lax.fori_loop(0, count, step, (jnp.int32(0), zeros(shape)))
            scratch["out"].at[w][...] = total
            plgpu.commit_smem()
            if options.bias == "row":
                target = outs[0].at[h, tile, part, mine]
            else:
                i, j = lax.div(tile, jnp.int32(key_tiles)), lax.rem(tile, jnp.int32(key_tiles))
                place = pl.ds(i * rows + w * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(j * columns, columns)
                target = outs[0].at[part, h].at[place]
            plgpu.copy_smem_to_gmem(scratch["out"].at[w], target)
            plgpu.wait_smem_to_gmem(0)

    w = blocks.warpgroups
    scratch = {
        "q": matrix((stages, w, WARPGROUP_ROWS, size), query.dtype),
        "do": matrix((stages, w, WARPGROUP_ROWS, value_size), query.dtype),
        "k": matrix((stages, columns, size), query.dtype),
        "v": matrix((stages, columns, value_size), query.dtype),
        "out": matrix((w, WARPGROUP_ROWS, columns), jnp.float32),
        "ready": plgpu.Barrier(
            num_arrivals=2 * w + 2 + len(vectors.queries) + len(vectors.keys) + biases.copies, num_barriers=stages
        ),
        "free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
    }
    scratch |= vectors.scratch((stages, rows), (stages, columns)) | biases.scratch()
    out = [jax.ShapeDtypeStruct(out_shape, jnp.float32)]
    out = launch("attention_bias_gradient", body, blocks, inputs, out, scratch, grid)[0]
    if options.bias == "dense":
        return out[..., :queries, :keys]
    return _sum_of_bands(jnp.sum(out, axis=2), queries, keys)


def _needed_steps(ranges: Array, batch: int, key_tiles: int, ratio: int, parts: int) -> tuple[Array, Array]:
    """List the steps that each band of a Toeplitz row needs, since a block would walk past all the others.

    Args:
      ranges: int32 [1 or B, query tiles, 4], as in `Items`.
      batch: number of batch rows.
      key_tiles: number of tiles of keys.
      ratio: rows over columns of a tile.
      parts: parts into which the batch rows are cut, each of which has blocks of its own.

    Returns:
      int32 [bands, parts, steps], `batch row * query tiles + query tile`, the needed ones first; and their numbers,
      int32 [bands, parts].
    """
    query_tiles = ranges.shape[1]
    before = (query_tiles - 1) * ratio
    share = -(-batch // parts)
    ranges = jnp.pad(jnp.broadcast_to(ranges, (batch, query_tiles, 4)), ((0, parts * share - batch), (0, 0), (0, 0)))
    first, stop = (ranges[:, :, end].reshape(1, parts, share * query_tiles) for end in (0, 1))
    tile = jnp.tile(jnp.arange(query_tiles, dtype=jnp.int32), share)[None, None, :]
    key = tile * ratio + jnp.arange(-before, key_tiles, dtype=jnp.int32)[:, None, None]
    needed = (key >= first) & (key < stop)
    steps = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    steps = steps + jnp.arange(parts, dtype=jnp.int32)[None, :, None] * (share * query_tiles)
    return steps, jnp.sum(needed, axis=2, dtype=jnp.int32)


def _sum_of_bands(bands: Array, queries: int, keys: int) -> Array:
    """Sum along every diagonal, [H, bands, rows, columns] -> [H, L+S-1], without a scatter.

    Padding the rows to one more than `width` and reshaping to `width` shifts each row one element further right, so
    that a diagonal becomes a column. Neighbouring bands overlap by `rows` columns.
    """
    heads, count, rows, columns = bands.shape
    width = rows + columns
    # Element (row, column) of a band lies at column + (rows - 1 - row).
    skewed = jnp.pad(bands[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, width + 1 - columns)))
    skewed = skewed.reshape(heads, count, rows * (width + 1))[:, :, : rows * width]
    sums = jnp.sum(skewed.reshape(heads, count, rows, width), axis=2)
    pieces = sums.reshape(heads, count, width // columns, columns)
    total = jnp.zeros((heads, count + width // columns - 1, columns), jnp.float32)
    for i in range(width // columns):
        total = total + jnp.pad(pieces[:, :, i], ((0, 0), (i, width // columns - 1 - i), (0, 0)))
    # The first element is the distance of the last (padded) query to key 0.
    last = -(-queries // rows) * rows
    first = last - queries
    return total.reshape(heads, -1)[:, first : first + queries + keys - 1]
