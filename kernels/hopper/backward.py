"""Backward pass on Hopper. Each part of the result is one block's item, so that no sum depends on timing.

- `query_gradient`: an item is a tile of queries, which meets all its keys.
- `key_gradient`: an item is a tile of keys, which meets the queries of all heads that share it: dk and dv.
- `bias_gradient`, in `bias.py`: a block holds a tile of the bias.

The first two are persistent, as the forward pass is: the first products of an item do not wait for its copies. All of
them recompute the weights from lse instead of storing them (Dao et al. 2022, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .operands import BiasTiles, Vectors, in_tiles, launch, out_in_tiles, registers
from .tile import (
    MULTIPROCESSORS,
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
from .work import Items, Ring, Schedule, Work, work

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
    schedule = Schedule.of(batch, heads, -(-queries // rows), MULTIPROCESSORS, items)
    inputs = dict(zip(("q", "k", "v", "do"), in_tiles(query, key, value, gradient), strict=True))
    inputs |= vectors.arrays | biases.arrays | schedule.arrays(items)
    ring = Ring(stages)

    def body(refs: Mapping[str, Any], outs: Any, scratch: Any) -> None:
        w = lax.axis_index("warpgroup")

        def move(n: Array, b: Array, head: Array, tile: Array, bounds: Work, start: Array) -> Array:
            first = tile * rows
            key_head = head if group == 1 else lax.div(head, jnp.int32(group))

            @pl.when(n > 0)
            def _() -> None:
                plgpu.barrier_wait(scratch["own_free"])

            for i in range(blocks.warpgroups):
                place = pl.ds(first + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                for name in ("q", "do"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, head], scratch[name].at[i], scratch["own"])
            vectors.copy_queries(refs, scratch, 0, b, head, pl.ds(first, rows), scratch["own"])

            def step(t: Array, n: Array) -> Array:
                slot, place = ring.slot(n), pl.ds(t * columns, columns)
                ring.wait_free(scratch["free"], n)
                ready = scratch["ready"].at[slot]
                for name in ("k", "v"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, key_head], scratch[name].at[slot], ready)
                vectors.copy_keys(refs, scratch, slot, b, place, ready)
                biases.copy(refs, scratch, slot, b, head, first, t * columns, ready)
                return n + 1

            return lax.fori_loop(bounds.first, bounds.stop, step, start)

        def compute(_n: Array, b: Array, head: Array, tile: Array, bounds: Work, start: Array) -> Array:
            shape, mine = (WARPGROUP_ROWS, columns), pl.ds(w * WARPGROUP_ROWS, WARPGROUP_ROWS)
            plgpu.barrier_wait(scratch["own"])
            own = Side(tile * rows + w * WARPGROUP_ROWS, jnp.int32(0), shape, 0)
            loaded = {name: own.load_queries(scratch[name].at[0, mine]) for name in vectors.queries}

            def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                total, n = carry
                slot = ring.slot(n)
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
                return total, n + 1

            total, end = lax.fori_loop(bounds.first, bounds.stop, step, (zeros((WARPGROUP_ROWS, size)), start))
            if loaded:
                release()
            plgpu.barrier_arrive(scratch["own_free"])
            # The copy of the last item must have left shared memory before this one is written there.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["dq"].at[w][...] = (total * options.scale).astype(query.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch["dq"].at[w], outs[0].at[b, pl.ds(own.query, WARPGROUP_ROWS), head])
            return end

        _persist(options, blocks, schedule, items, refs, scratch, ring, move, compute)

    scratch = {
        "q": matrix((blocks.warpgroups, WARPGROUP_ROWS, size), query.dtype),
        "do": matrix((blocks.warpgroups, WARPGROUP_ROWS, value_size), query.dtype),
        "k": matrix((stages, columns, size), query.dtype),
        "v": matrix((stages, columns, value_size), query.dtype),
        "dq": matrix((blocks.warpgroups, WARPGROUP_ROWS, size), query.dtype),
        "own": plgpu.Barrier(num_arrivals=2 * blocks.warpgroups + len(vectors.queries)),
        "own_free": plgpu.Barrier(num_arrivals=blocks.warpgroups),
        "ready": plgpu.Barrier(num_arrivals=2 + len(vectors.keys) + biases.copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=stages),
    }
    scratch |= vectors.scratch((1, rows), (stages, columns)) | biases.scratch()
    grid = {"block": schedule.grid}
    out = [out_in_tiles(query.shape, query.dtype)]
    return launch("attention_query_gradient", body, blocks, inputs, out, scratch, grid)[0][:, :queries]


Visit = Callable[[Array, Array, Array, Array, Work, Array], Array]
"""What a warpgroup does with an item: its number, row, head, tile and work, and the ring's step before and after it."""


def _persist(
    options: Options,
    blocks: Blocks,
    schedule: Schedule,
    items: Items,
    refs: Mapping[str, Any],
    scratch: Any,
    ring: Ring,
    move: Visit,
    compute: Visit,
) -> None:
    """Walk through a block's items: one warpgroup copies ahead, through the ring into the next item; others compute.

    `scratch` has barriers "free" of the ring's slots, and "own_free" of what is loaded once an item.
    """
    block, w = lax.axis_index("block"), lax.axis_index("warpgroup")

    def walk(visit: Visit) -> Array:
        def read(n: Array, b: Array, head: Array, tile: Array, step: Array) -> Array:
            return visit(n, b, head, tile, items.read(refs.get("ranges"), b, tile), step)

        return schedule.walk(block, refs.get("schedule"), read)

    @pl.when(w == blocks.warpgroups)
    def _() -> None:
        registers(options, blocks, computing=False)
        steps = walk(move)
        plgpu.barrier_wait(scratch["own_free"])
        ring.drain(steps, scratch["free"])

    @pl.when(w < blocks.warpgroups)
    def _() -> None:
        registers(options, blocks, computing=True)
        walk(compute)
        plgpu.wait_smem_to_gmem(0)


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
    schedule = Schedule.of(batch, key_heads, -(-keys // rows), MULTIPROCESSORS, items)
    inputs = dict(zip(("q", "k", "v", "do"), in_tiles(query, key, value, gradient), strict=True))
    inputs |= vectors.arrays | biases.arrays | schedule.arrays(items)
    ring = Ring(stages)

    def place_of(n: Array, key_head: Array, bounds: Work) -> tuple[Array, Array]:
        """Return the head and the query tile of an item's step n."""
        if group == 1:
            return key_head, bounds.first + n
        count = jnp.int32(bounds.stop - bounds.first)
        return key_head * group + lax.div(n, count), bounds.first + lax.rem(n, count)

    def body(refs: Mapping[str, Any], outs: Any, scratch: Any) -> None:
        w = lax.axis_index("warpgroup")

        def move(n: Array, b: Array, key_head: Array, tile: Array, bounds: Work, start: Array) -> Array:
            first = tile * rows

            @pl.when(n > 0)
            def _() -> None:
                plgpu.barrier_wait(scratch["own_free"])

            for i in range(blocks.warpgroups):
                place = pl.ds(first + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                for name in ("k", "v"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, key_head], scratch[name].at[i], scratch["own"])
            vectors.copy_keys(refs, scratch, 0, b, pl.ds(first, rows), scratch["own"])

            def step(n: Array, step: Array) -> Array:
                head, t = place_of(n, key_head, bounds)
                slot, place = ring.slot(step), pl.ds(t * columns, columns)
                ring.wait_free(scratch["free"], step)
                ready = scratch["ready"].at[slot]
                for name in ("q", "do"):
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, head], scratch[name].at[slot], ready)
                vectors.copy_queries(refs, scratch, slot, b, head, place, ready)
                biases.copy(refs, scratch, slot, b, head, t * columns, first, ready)
                return step + 1

            return lax.fori_loop(0, jnp.int32(bounds.stop - bounds.first) * group, step, start)

        def compute(_n: Array, b: Array, key_head: Array, tile: Array, bounds: Work, start: Array) -> Array:
            shape, mine = (WARPGROUP_ROWS, columns), pl.ds(w * WARPGROUP_ROWS, WARPGROUP_ROWS)
            plgpu.barrier_wait(scratch["own"])
            own = Side(jnp.int32(0), tile * rows + w * WARPGROUP_ROWS, shape, 1, sums_over_keys=False)
            loaded = {name: own.load_keys(scratch[name].at[0, mine]) for name in vectors.keys}

            def step(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                *totals, step = carry
                _, t = place_of(n, key_head, bounds)
                slot = ring.slot(step)
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
                return *done, step + 1

            empty = (zeros((WARPGROUP_ROWS, sizes[name])) for name in wanted)
            count = jnp.int32(bounds.stop - bounds.first) * group
            *totals, end = lax.fori_loop(0, count, step, (*empty, start))
            if loaded:
                release()
            plgpu.barrier_arrive(scratch["own_free"])
            factors = {"k": options.scale, "v": 1 / (1 - options.dropout_rate)}
            # The copy of the last item must have left shared memory before this one is written there.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for name, total in zip(wanted, totals, strict=True):
                scratch["d" + name].at[w][...] = (total * factors[name]).astype(query.dtype)
            plgpu.commit_smem()
            for name, out in zip(wanted, outs, strict=True):
                plgpu.copy_smem_to_gmem(scratch["d" + name].at[w], out.at[b, pl.ds(own.key, WARPGROUP_ROWS), key_head])
            return end

        _persist(options, blocks, schedule, items, refs, scratch, ring, move, compute)

    scratch = {
        "q": matrix((stages, columns, size), query.dtype),
        "do": matrix((stages, columns, value_size), query.dtype),
        "k": matrix((blocks.warpgroups, WARPGROUP_ROWS, size), query.dtype),
        "v": matrix((blocks.warpgroups, WARPGROUP_ROWS, value_size), query.dtype),
        "own": plgpu.Barrier(num_arrivals=2 * blocks.warpgroups + len(vectors.keys)),
        "own_free": plgpu.Barrier(num_arrivals=blocks.warpgroups),
        "ready": plgpu.Barrier(num_arrivals=2 + len(vectors.queries) + biases.copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=stages),
    }
    scratch |= {"d" + name: matrix((blocks.warpgroups, WARPGROUP_ROWS, sizes[name]), query.dtype) for name in wanted}
    scratch |= vectors.scratch((stages, columns), (1, rows)) | biases.scratch()
    grid = {"block": schedule.grid}
    out = [out_in_tiles((batch, keys, key_heads, sizes[name]), query.dtype) for name in wanted]
    return [x[:, :keys] for x in launch("attention_key_gradient", body, blocks, inputs, out, scratch, grid)]
