"""Backward pass on Hopper. Each block writes its own part of the result, so that no sum depends on timing.

- `query_gradient`: a block holds queries and iterates over keys.
- `key_gradient`: a block holds keys and iterates over the queries of all heads that share them: dk and dv.
- `bias_gradient`, in `bias.py`: a block holds a tile of the bias.

All of them recompute the weights from lse instead of storing them (Dao et al. 2022, 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .operands import BiasTiles, Vectors, in_tiles, launch, out_in_tiles, registers
from .tile import (
    WARPGROUP_ROWS,
    Blocks,
    Options,
    Side,
    accumulate,
    four_products,
    kept,
    matrix,
    product,
    recomputed,
    release,
    score_gradient,
    two_products,
    zeros,
)
from .work import Ring, work

Extra = Mapping[str, Array]


def query_gradient(
    options: Options, blocks: Blocks, query: Array, key: Array, value: Array, gradient: Array, extra: Extra
) -> Array:
    """Compute dq [B, L, H, D] from the gradient of the output [B, L, H, Dv].

    `extra` holds, in addition to the forward pass's: "lse" [B, H, L] in units of log2, +inf for an empty row, and
    "delta" [B, H, L], the sum of the output times its gradient, minus the gradient of lse.
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

    def body(refs: Mapping[str, Any], outs: Any, scratch: Any) -> None:
        b, head, w = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")
        first = tile * rows
        bounds = items.read(refs.get("ranges"), b, tile)

        @pl.when(w == blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=False)
            key_head = head if group == 1 else lax.div(head, jnp.int32(group))
            for i in range(blocks.warpgroups):
                place = pl.ds(first + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                for name in ("q", "do"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, head], scratch[name].at[i], scratch["own"])
            vectors.copy_queries(refs, scratch, 0, b, head, pl.ds(first, rows), scratch["own"])

            def step(t: Array, _: None) -> None:
                n = t - bounds.first
                slot, place = ring.slot(n), pl.ds(t * columns, columns)
                ring.wait_free(scratch["free"], n)
                ready = scratch["ready"].at[slot]
                for name in ("k", "v"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, key_head], scratch[name].at[slot], ready)
                vectors.copy_keys(refs, scratch, slot, b, place, ready)
                biases.copy(refs, scratch, slot, b, head, first, t * columns, ready)

            lax.fori_loop(bounds.first, bounds.stop, step, None)
            ring.drain(jnp.int32(bounds.stop - bounds.first), scratch["free"])

        @pl.when(w < blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=True)
            shape, mine = (WARPGROUP_ROWS, columns), pl.ds(w * WARPGROUP_ROWS, WARPGROUP_ROWS)
            plgpu.barrier_wait(scratch["own"])
            own = Side(first + w * WARPGROUP_ROWS, jnp.int32(0), shape, 0)
            loaded = {name: own.load_queries(scratch[name].at[0, mine]) for name in vectors.queries}

            def step(t: Array, total: Array) -> Array:
                slot = ring.slot(t - bounds.first)
                side = Side(own.query, t * columns, shape, 0)
                plgpu.barrier_wait(scratch["ready"].at[slot])
                every = loaded | {name: side.load_keys(scratch[name].at[slot]) for name in vectors.keys}
                bias = biases.tile(scratch, slot, w, side)
                pairs = (
                    (scratch["q"].at[w], scratch["k"].at[slot].T),
                    (scratch["do"].at[w], scratch["v"].at[slot].T),
                )
                whole = bounds.whole(t)
                (weights, slope), dropped = two_products(
                    pairs, lambda s: recomputed(whole, options, s, bias, side, keys, every)
                )
                scores = score_gradient(whole, options, weights, slope, dropped, side, keys, every).astype(query.dtype)
                (total,) = accumulate(options, [(total, lambda: scores, scratch["k"].at[slot])])
                if vectors.keys or bias is not None:
                    release()
                plgpu.barrier_arrive(scratch["free"].at[slot])
                return total

            total = lax.fori_loop(bounds.first, bounds.stop, step, zeros((WARPGROUP_ROWS, size)))
            scratch["q"].at[w][...] = (total * options.scale).astype(query.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch["q"].at[w], outs[0].at[b, pl.ds(own.query, WARPGROUP_ROWS), head])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "q": matrix((blocks.warpgroups, WARPGROUP_ROWS, size), query.dtype),
        "do": matrix((blocks.warpgroups, WARPGROUP_ROWS, value_size), query.dtype),
        "k": matrix((stages, columns, size), query.dtype),
        "v": matrix((stages, columns, value_size), query.dtype),
        "own": plgpu.Barrier(num_arrivals=2 * blocks.warpgroups + len(vectors.queries)),
        "ready": plgpu.Barrier(num_arrivals=2 + len(vectors.keys) + biases.copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=stages),
    }
    scratch |= vectors.scratch((1, rows), (stages, columns)) | biases.scratch()
    grid = {"head": heads, "tile": -(-queries // rows), "batch": batch}
    out = [out_in_tiles(query.shape, query.dtype)]
    return launch("attention_query_gradient", body, blocks, inputs, out, scratch, grid)[0][:, :queries]


def key_gradient(
    options: Options,
    blocks: Blocks,
    query: Array,
    key: Array,
    value: Array,
    gradient: Array,
    extra: Extra,
    wanted: tuple[str, ...] = ("k", "v"),
) -> list[Array]:
    """Compute those of dk [B, S, K, D] and dv [B, S, K, Dv] that are `wanted`. `extra` as in `query_gradient`."""
    batch, queries, heads, size = query.shape
    keys, key_heads, value_size = value.shape[1:]
    rows, columns, stages, group = blocks.rows, blocks.columns, blocks.stages, heads // key_heads
    sizes = {"k": size, "v": value_size}
    vectors = Vectors(options, extra, columns, rows)
    biases = BiasTiles(options, extra, blocks, queries, axis=1)
    ids = extra.get("query_segments"), extra.get("key_segments")
    items = work(options.area(queries, keys), columns, rows, *ids, axis=2)
    inputs = dict(zip(("q", "k", "v", "do"), in_tiles(query, key, value, gradient), strict=True))
    inputs |= vectors.arrays | biases.arrays
    if items.ranges is not None:
        inputs["ranges"] = items.ranges
    ring = Ring(stages)

    def body(refs: Mapping[str, Any], outs: Any, scratch: Any) -> None:
        b, key_head, w = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")
        first = tile * rows
        bounds = items.read(refs.get("ranges"), b, tile)
        count = jnp.int32(bounds.stop - bounds.first)

        def place_of(n: Array) -> tuple[Array, Array]:
            """Return the head and the query tile of step n."""
            if group == 1:
                return key_head, bounds.first + n
            return key_head * group + lax.div(n, count), bounds.first + lax.rem(n, count)

        @pl.when(w == blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=False)
            for i in range(blocks.warpgroups):
                place = pl.ds(first + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                for name in ("k", "v"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, key_head], scratch[name].at[i], scratch["own"])
            vectors.copy_keys(refs, scratch, 0, b, pl.ds(first, rows), scratch["own"])

            def step(n: Array, _: None) -> None:
                head, t = place_of(n)
                slot, place = ring.slot(n), pl.ds(t * columns, columns)
                ring.wait_free(scratch["free"], n)
                ready = scratch["ready"].at[slot]
                for name in ("q", "do"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, head], scratch[name].at[slot], ready)
                vectors.copy_queries(refs, scratch, slot, b, head, place, ready)
                biases.copy(refs, scratch, slot, b, head, t * columns, first, ready)

            lax.fori_loop(0, count * group, step, None)
            ring.drain(count * group, scratch["free"])

        @pl.when(w < blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=True)
            shape, mine = (WARPGROUP_ROWS, columns), pl.ds(w * WARPGROUP_ROWS, WARPGROUP_ROWS)
            plgpu.barrier_wait(scratch["own"])
            own = Side(jnp.int32(0), first + w * WARPGROUP_ROWS, shape, 1, sums_over_keys=False)
            loaded = {name: own.load_keys(scratch[name].at[0, mine]) for name in vectors.keys}

            def step(n: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                _, t = place_of(n)
                slot = ring.slot(n)
                side = Side(t * columns, own.key, shape, 1, sums_over_keys=False)
                plgpu.barrier_wait(scratch["ready"].at[slot])
                every = loaded | {name: side.load_queries(scratch[name].at[slot]) for name in vectors.queries}
                bias = biases.tile(scratch, slot, w, side)
                pairs = (
                    (scratch["k"].at[w], scratch["q"].at[slot].T),
                    (scratch["v"].at[w], scratch["do"].at[slot].T),
                )

                whole = bounds.whole(t)

                def recompute(products: Array) -> tuple[Array, Array | None]:
                    return recomputed(whole, options, products, bias, side, keys, every)

                def dropped_weights(weights: Array) -> Array:
                    if options.dropout_rate:
                        keep = kept(options, side, every["a"], every["b"], every["g"])
                        weights = jnp.where(keep, weights, 0.0)
                    return weights.astype(query.dtype)

                def gradient_of(weights: Array, slope: Array | None, products: Array) -> Array:
                    change = score_gradient(whole, options, weights, slope, products, side, keys, every)
                    return change.astype(query.dtype)

                def first(products: Array) -> tuple[tuple[Array, Array | None], Array]:
                    weights, slope = recompute(products)
                    return (weights, slope), dropped_weights(weights)

                other = {"k": scratch["q"].at[slot], "v": scratch["do"].at[slot]}
                if wanted == ("k", "v"):
                    d_value, d_key = four_products(
                        options,
                        pairs,
                        totals[::-1],
                        first,
                        lambda kept, x: gradient_of(kept[0], kept[1], x),
                        (other["v"], other["k"]),
                    )
                    done = [d_key, d_value]
                elif wanted == ("k",):
                    (weights, slope), weight_gradient = two_products(pairs, recompute)
                    done = accumulate(
                        options, [(totals[0], lambda: gradient_of(weights, slope, weight_gradient), other["k"])]
                    )
                else:
                    weights, _ = recompute(product(pairs[0]))
                    done = accumulate(options, [(totals[0], lambda: dropped_weights(weights), other["v"])])
                release()
                plgpu.barrier_arrive(scratch["free"].at[slot])
                return tuple(done)

            start = tuple(zeros((WARPGROUP_ROWS, sizes[name])) for name in wanted)
            totals = lax.fori_loop(0, count * group, step, start)
            factors = {"k": options.scale, "v": 1 / (1 - options.dropout_rate)}
            for name, total in zip(wanted, totals, strict=True):
                scratch[name].at[w][...] = (total * factors[name]).astype(query.dtype)
            plgpu.commit_smem()
            for name, out in zip(wanted, outs, strict=True):
                plgpu.copy_smem_to_gmem(scratch[name].at[w], out.at[b, pl.ds(own.key, WARPGROUP_ROWS), key_head])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "q": matrix((stages, columns, size), query.dtype),
        "do": matrix((stages, columns, value_size), query.dtype),
        "k": matrix((blocks.warpgroups, WARPGROUP_ROWS, size), query.dtype),
        "v": matrix((blocks.warpgroups, WARPGROUP_ROWS, value_size), query.dtype),
        "own": plgpu.Barrier(num_arrivals=2 * blocks.warpgroups + len(vectors.keys)),
        "ready": plgpu.Barrier(num_arrivals=2 + len(vectors.queries) + biases.copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=stages),
    }
    scratch |= vectors.scratch((stages, columns), (1, rows)) | biases.scratch()
    grid = {"head": key_heads, "tile": -(-keys // rows), "batch": batch}
    out = [out_in_tiles((batch, keys, key_heads, sizes[name]), query.dtype) for name in wanted]
    return [x[:, :keys] for x in launch("attention_key_gradient", body, blocks, inputs, out, scratch, grid)]
