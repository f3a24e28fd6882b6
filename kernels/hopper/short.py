"""Short rows on Hopper, whose keys all fit in one tile: a one-pass softmax, and one kernel for dq, dk and dv.

On such rows the time goes into fetching and launching. Blocks are persistent and process many heads in turn: the
producer warpgroup fetches the next heads' queries, keys and values while the consumers compute. The forward pass knows
a query's maximum before it computes any exponential, so nothing is rescaled. The backward pass reads everything once: a
block holds all keys of a key head, so that it computes the whole gradient of a query, always summing in the same order.

Calls with a dense bias, and those that do not fit in shared memory (`fits_forward`, `fits_backward`), use the general
kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .operands import BiasTiles, Vectors, in_tiles, out_in_tiles, registers
from .tile import (
    LOG2E,
    LOWEST,
    MULTIPROCESSORS,
    SHARED_MEMORY,
    WARPGROUP_ROWS,
    Blocks,
    Options,
    Side,
    accumulate,
    ceil_to,
    kept,
    logits,
    mask_unless,
    matrix,
    product,
    recomputed,
    release,
    score_gradient,
    toeplitz_tile,
    two_products,
    zeros,
)
from .work import Ring, work

LONGEST = 256
"""Longest row of queries or keys, in tokens, that these kernels support."""

MOST_KEYS_BACKWARD = 128
"""Longest row of the backward kernel: two warpgroups with 64 keys each hold dk and dv in registers."""


def forward_blocks(queries: int, keys: int, stages: int) -> Blocks:
    """Return the tile sizes of the forward pass: 64 queries per warpgroup, and all keys."""
    return Blocks(2 if queries > WARPGROUP_ROWS else 1, ceil_to(keys, 64), stages)


def backward_blocks(keys: int, stages: int) -> Blocks:
    """Return the tile sizes of the backward pass: 64 keys per warpgroup; as many queries per step as keys per block."""
    return Blocks(2 if keys > WARPGROUP_ROWS else 1, 64, stages)


def fits_forward(options: Options, query: tuple[int, ...], value: tuple[int, ...], stages: int, out_dtype: Any) -> bool:
    """Tell whether `forward` supports a call of these shapes with `stages` pipeline stages."""
    (_, queries, _, size), (_, keys, _, value_size) = query, value
    if not stages or max(queries, keys) > LONGEST:
        return False
    blocks = forward_blocks(queries, keys, stages)
    rows, columns = blocks.rows, blocks.columns
    staged = 2 * (rows * size + columns * (size + value_size))
    by_query, by_key = _vectors(options)
    staged += 4 * (by_query * rows + by_key * columns)
    staged += 4 * {None: 0, "row": rows + columns, "dense": rows * columns}[options.bias]
    written = rows * (jnp.dtype(out_dtype).itemsize * value_size + 4)
    return stages * staged + written <= SHARED_MEMORY


def fits_backward(options: Options, query: tuple[int, ...], value: tuple[int, ...], stages: int) -> bool:
    """Tell whether `backward` supports a call of these shapes with `stages` pipeline stages."""
    (_, queries, _, size), (_, keys, _, value_size) = query, value
    if not stages or options.bias == "dense" or queries > LONGEST or keys > MOST_KEYS_BACKWARD:
        return False
    rows = backward_blocks(keys, stages).rows
    matrices = 2 * rows * (size + value_size)
    by_query, by_key = _vectors(options)
    staged = matrices + 4 * rows * (2 + by_query + 2 * (options.bias == "row"))
    held = matrices + 4 * rows * by_key
    written = 2 * rows * (size if size == value_size else size + value_size)
    return stages * staged + 2 * held + _gradient_buffers(rows) * 2 * rows * rows + written <= SHARED_MEMORY


def traced_zero(n: Array) -> Array:
    """Return a traced 0 for n >= 0: a constant slice may not exceed the last key, nor `accumulate` take constants."""
    return jnp.minimum(n, 0)


def _vectors(options: Options) -> tuple[int, int]:
    """Return the number of 4-byte words that the forward pass reads per query and per key; see `Vectors`."""
    dropout = bool(options.dropout_rate)
    return options.segments + 2 * dropout, options.segments + dropout


def forward(
    options: Options,
    stages: int,
    query: Array,
    key: Array,
    value: Array,
    extra: Mapping[str, Array],
    out_dtype: Any = None,
) -> tuple[Array, Array]:
    """Compute the output [B, L, H, Dv] and lse [B, H, L]; the arguments are those of `hopper.forward.forward`."""
    out_dtype = out_dtype or query.dtype
    batch, queries, heads, size = query.shape
    keys, key_heads, value_size = value.shape[1:]
    blocks = forward_blocks(queries, keys, stages)
    w, rows, columns, group = blocks.warpgroups, blocks.rows, blocks.columns, heads // key_heads
    area = options.area(queries, keys)
    items = work(area, rows, columns, extra.get("query_segments"), extra.get("key_segments"), axis=1)
    tiles = -(-queries // rows)
    total = batch * heads * tiles
    # Blocks with a single consumer are small: a multiprocessor holds two.
    grid = min(total, MULTIPROCESSORS * (3 - w))
    # With one stage, a warpgroup's turn could wait for an item that waits for the warpgroup to free its slot.
    takes_turns = w == 2 and stages > 1
    ring = Ring(stages)

    inputs: dict[str, Array] = dict(zip(("query", "key", "value"), in_tiles(query, key, value), strict=True))
    if items.ranges is not None:
        inputs["ranges"] = items.ranges
    vectors = Vectors(options, extra, rows, columns)
    biases = BiasTiles(options, extra, blocks, queries, axis=0)
    inputs |= vectors.arrays | biases.arrays
    names = list(inputs)

    def body(*refs: Any, **scratch: Any) -> None:
        refs_in, (out_ref, lse_ref) = dict(zip(names, refs, strict=False)), refs[len(names) :]
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = lax.div(total - 1 - block, jnp.int32(grid)) + 1

        def item(n: Array) -> tuple[Array, Array, Array]:
            """Return the batch row, the head and the query tile of a block's item n."""
            index = block + n * grid
            rest, tile = lax.div(index, jnp.int32(tiles)), lax.rem(index, jnp.int32(tiles))
            return lax.div(rest, jnp.int32(heads)), lax.rem(rest, jnp.int32(heads)), tile

        @pl.when(warpgroup < w)
        def _() -> None:
            registers(options, blocks, computing=True)
            compute(refs_in, out_ref, lse_ref, scratch, warpgroup, count, item)

        @pl.when(warpgroup == w)
        def _() -> None:
            registers(options, blocks, computing=False)
            move(refs_in, scratch, count, item)

    def move(refs: Mapping[str, Any], scratch: Any, count: Array, item: Any) -> None:
        def one(n: Array, _: None) -> None:
            b, head, tile = item(n)
            key_head = head if group == 1 else lax.div(head, jnp.int32(group))
            first, slot = tile * rows, ring.slot(n)
            ring.wait_free(scratch["free"], n)
            ready = scratch["ready"].at[slot]
            for i in range(w):
                place = pl.ds(first + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(refs["query"].at[b, place, head], scratch["q"].at[slot, i], ready)
            start = traced_zero(n) * WARPGROUP_ROWS
            every = pl.ds(start, columns)
            plgpu.copy_gmem_to_smem(refs["key"].at[b, every, key_head], scratch["k"].at[slot], ready)
            vectors.copy_queries(refs, scratch, slot, b, head, pl.ds(first, rows), ready)
            vectors.copy_keys(refs, scratch, slot, b, every, ready)
            biases.copy(refs, scratch, slot, b, head, first, start, ready)
            plgpu.copy_gmem_to_smem(
                refs["value"].at[b, every, key_head], scratch["v"].at[slot], scratch["v_ready"].at[slot]
            )

        lax.fori_loop(0, count, one, None)
        ring.drain(count, scratch["free"])

    def compute(
        refs: Mapping[str, Any], out_ref: Any, lse_ref: Any, scratch: Any, i: Array, count: Array, item: Any
    ) -> None:
        def turn() -> None:
            if takes_turns:
                plgpu.barrier_arrive(scratch["turn"])
                plgpu.barrier_wait(scratch["turn"])

        pl.when(i == 1)(turn)
        mine = pl.ds(i * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def one(n: Array, _: None) -> None:
            b, head, tile = item(n)
            slot = ring.slot(n)
            side = Side(tile * rows + i * WARPGROUP_ROWS, jnp.int32(0), (WARPGROUP_ROWS, columns), 0)
            whole = items.read(refs.get("ranges"), b, tile).whole(jnp.int32(0))
            plgpu.barrier_wait(scratch["ready"].at[slot])
            scores = product((scratch["q"].at[slot, i], scratch["k"].at[slot].T), then=turn)
            own = {name: side.load_queries(scratch[name].at[slot, mine]) for name in vectors.queries}
            own |= {name: side.load_keys(scratch[name].at[slot]) for name in vectors.keys}
            bias = biases.tile(scratch, slot, i, side)
            if not options.simple:
                scores = logits(options, scores, bias)
            ids = own.get("query_segments"), own.get("key_segments")
            scores = mask_unless(whole, options, scores, side, keys, lambda: ids)
            unit = options.scale * LOG2E if options.simple else 1.0
            top = jnp.maximum(jnp.max(scores, axis=1) * unit, LOWEST)
            weights = jnp.exp2(scores * unit - side.along_queries(top))
            weight = jnp.sum(weights, axis=1)
            if options.dropout_rate:
                weights = jnp.where(kept(options, side, own["a"], own["b"], own["g"]), weights, 0.0)
            top, weight, weights16 = lax.optimization_barrier((top, weight, weights.astype(query.dtype)))
            if takes_turns:
                plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["v_ready"].at[slot])
            if takes_turns:
                plgpu.barrier_wait(scratch["turn"])
            start = zeros((WARPGROUP_ROWS, value_size))
            (sums,) = accumulate(options, [(start, lambda: weights16, scratch["v"].at[slot])])
            if own or bias is not None:
                release()
            plgpu.barrier_arrive(scratch["free"].at[slot])
            empty = weight == 0.0
            share = (1 / (1 - options.dropout_rate)) / jnp.where(empty, 1.0, weight)
            sums = sums * lax.broadcast_in_dim(share, sums.shape, [0])
            lse = jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(jnp.where(empty, 1.0, weight)))
            # The copy of the last item must have left shared memory before this one is written there.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["out"].at[i][...] = sums.astype(out_dtype)
            scratch["lse"].at[i][...] = lse
            plgpu.commit_smem()
            place = pl.ds(side.query, WARPGROUP_ROWS)
            plgpu.copy_smem_to_gmem(scratch["out"].at[i], out_ref.at[b, place, head])
            plgpu.copy_smem_to_gmem(scratch["lse"].at[i], lse_ref.at[b, head, place])

        lax.fori_loop(0, count, one, None)
        pl.when(i == 0)(turn)
        plgpu.wait_smem_to_gmem(0)

    dtype = query.dtype
    copies = w + 1 + len(vectors.queries) + len(vectors.keys) + biases.copies
    scratch = {
        "q": matrix((stages, w, WARPGROUP_ROWS, size), dtype),
        "k": matrix((stages, columns, size), dtype),
        "v": matrix((stages, columns, value_size), dtype),
        "out": matrix((w, WARPGROUP_ROWS, value_size), out_dtype),
        "lse": plgpu.SMEM((w, WARPGROUP_ROWS), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
    }
    if takes_turns:
        scratch["turn"] = plgpu.Barrier(num_arrivals=2)
    scratch |= vectors.scratch((stages, rows), (stages, columns)) | biases.scratch()

    out, lse = plgpu.kernel(
        body,
        out_type=(
            out_in_tiles((batch, queries, heads, value_size), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("block",),
        num_threads=w + 1,
        thread_name="warpgroup",
        kernel_name="attention_one_pass",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    return out[:, :queries], lse[:, :, :queries]


def _gradient_buffers(rows: int) -> int:
    """Return 2 if warpgroups read each other's part, so that one barrier per step is enough."""
    return 2 if rows > WARPGROUP_ROWS else 1


def backward(
    options: Options,
    stages: int,
    query: Array,
    key: Array,
    value: Array,
    gradient: Array,
    extra: Mapping[str, Array],
) -> tuple[Array, Array, Array]:
    """Compute dq [B, L, H, D], dk [B, S, K, D] and dv [B, S, K, Dv]; the arguments are those of `query_gradient`.

    A warpgroup holds 64 keys. For each tile of 64 queries it computes the gradients of their scores, accumulates dk and
    dv, and stores the gradients in shared memory, from which each warpgroup computes dq of its own query tile.
    """
    batch, queries, heads, size = query.shape
    keys, key_heads, value_size = value.shape[1:]
    blocks = backward_blocks(keys, stages)
    w, rows, group = blocks.warpgroups, blocks.rows, heads // key_heads
    tile_shape = WARPGROUP_ROWS, WARPGROUP_ROWS
    vectors = Vectors(options, extra, rows, rows)
    ids = extra.get("query_segments"), extra.get("key_segments")
    items = work(options.area(queries, keys), WARPGROUP_ROWS, WARPGROUP_ROWS, *ids, axis=2)
    inputs = dict(zip(("q", "k", "v", "do"), in_tiles(query, key, value, gradient), strict=True)) | vectors.arrays
    if items.ranges is not None:
        inputs["ranges"] = items.ranges
    biases = BiasTiles(options, extra, Blocks(w, rows, stages), queries, axis=1)
    inputs |= biases.arrays
    names = list(inputs)
    tiles = -(-queries // rows)
    steps = group * tiles
    total = batch * key_heads
    grid = min(total, MULTIPROCESSORS * (3 - w))
    ring, held, buffers = Ring(stages), Ring(2), Ring(_gradient_buffers(rows))

    def body(*refs: Any, **scratch: Any) -> None:
        refs_in, outs = dict(zip(names, refs, strict=False)), refs[len(names) :]
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = lax.div(total - 1 - block, jnp.int32(grid)) + 1

        def item(n: Array) -> tuple[Array, Array]:
            """Return the batch row and the key head of a block's item n."""
            index = block + n * grid
            return lax.div(index, jnp.int32(key_heads)), lax.rem(index, jnp.int32(key_heads))

        def place_of(key_head: Array, step: Array) -> tuple[Array, Array]:
            """Return the head and the first query of an item's step."""
            return key_head * group + lax.div(step, jnp.int32(tiles)), lax.rem(step, jnp.int32(tiles)) * rows

        @pl.when(warpgroup < w)
        def _() -> None:
            registers(options, blocks, computing=True)
            compute(refs_in, outs, scratch, warpgroup, count, item, place_of)

        @pl.when(warpgroup == w)
        def _() -> None:
            registers(options, blocks, computing=False)
            move(refs_in, scratch, count, item, place_of)

    def move(refs: Mapping[str, Any], scratch: Any, count: Array, item: Any, place_of: Any) -> None:
        def one(n: Array, _: None) -> None:
            b, key_head = item(n)
            slot = held.slot(n)
            held.wait_free(scratch["held_free"], n)
            ready = scratch["held_ready"].at[slot]
            zero = traced_zero(n)
            start = zero * WARPGROUP_ROWS
            for name in ("k", "v"):
                for i in range(w):
                    place = pl.ds(start + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    plgpu.copy_gmem_to_smem(refs[name].at[b, place, key_head], scratch[name].at[slot, i], ready)
            vectors.copy_keys(refs, scratch, slot, b, pl.ds(0, rows), ready)

            def step(m: Array, _: None) -> None:
                head, first = place_of(key_head, m)
                done = n * steps + m
                slot = ring.slot(done)
                ring.wait_free(scratch["free"], done)
                ready = scratch["ready"].at[slot]
                for i in range(w):
                    place = pl.ds(first + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    for name in ("q", "do"):
                        plgpu.copy_gmem_to_smem(refs[name].at[b, place, head], scratch[name].at[slot, i], ready)
                vectors.copy_queries(refs, scratch, slot, b, head, pl.ds(first, rows), ready)
                biases.copy(refs, scratch, slot, b, head, first, start, ready)

            lax.fori_loop(zero, zero + steps, step, None)

        lax.fori_loop(0, count, one, None)
        ring.drain(count * steps, scratch["free"])
        held.drain(count, scratch["held_free"])

    def compute(
        refs: Mapping[str, Any], outs: Any, scratch: Any, own: Array, count: Array, item: Any, place_of: Any
    ) -> None:
        mine = pl.ds(own * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def write(name: str, total: Array, target: Any) -> None:
            """Copy registers to `target` through this warpgroup's shared memory, once that is free again."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch[name].at[own][...] = total.astype(query.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch[name].at[own], target)

        def one(n: Array, _: None) -> None:
            b, key_head = item(n)
            place, zero = held.slot(n), traced_zero(n)
            bounds = items.read(refs.get("ranges"), b, own)
            plgpu.barrier_wait(scratch["held_ready"].at[place])
            k, v = scratch["k"].at[place, own], scratch["v"].at[place, own]
            side = Side(jnp.int32(0), own * WARPGROUP_ROWS, tile_shape, 1)
            loaded = {name: side.load_keys(scratch[name].at[place, mine]) for name in vectors.keys}

            def step(m: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
                head, first = place_of(key_head, m)
                done = n * steps + m
                slot, buffer = ring.slot(done), buffers.slot(done)
                plgpu.barrier_wait(scratch["ready"].at[slot])
                for i in range(w):
                    totals = tile(zero + i, first + i * WARPGROUP_ROWS, slot, buffer, totals)
                release()
                plgpu.barrier_arrive(scratch["free"].at[slot])
                if w > 1:
                    plgpu.barrier_arrive(scratch["left"])
                    plgpu.barrier_wait(scratch["left"])
                query_gradient = product(
                    *((scratch["ds"].at[buffer, own, i].T, scratch["k"].at[place, i]) for i in range(w))
                )
                target = outs[0].at[b, pl.ds(first + own * WARPGROUP_ROWS, WARPGROUP_ROWS), head]
                write("dq", query_gradient * options.scale, target)
                return totals

            def tile(i: Array, first: Array, slot: Array, buffer: Array, totals: tuple[Array, Array]) -> Any:
                """Compute the scores of this warpgroup's keys with the step's i-th query tile."""
                side = Side(first, own * WARPGROUP_ROWS, tile_shape, 1)
                part = pl.ds(i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                every = loaded | {name: side.load_queries(scratch[name].at[slot, part]) for name in vectors.queries}
                bias = None
                if options.bias == "row":
                    part = pl.ds((own + w - 1 - i) * WARPGROUP_ROWS, 2 * WARPGROUP_ROWS)
                    bias = toeplitz_tile(options, scratch["bias"].at[slot, part], side)
                q, do = scratch["q"].at[slot, i], scratch["do"].at[slot, i]
                whole = bounds.whole(lax.div(first, jnp.int32(WARPGROUP_ROWS)))
                (weights, slope), weight_gradient = two_products(
                    ((k, q.T), (v, do.T)),
                    lambda products: recomputed(whole, options, products, bias, side, keys, every),
                )
                dropped = weights
                if options.dropout_rate:
                    dropped = jnp.where(kept(options, side, every["a"], every["b"], every["g"]), weights, 0.0)
                dropped = dropped.astype(query.dtype)
                scores = score_gradient(whole, options, weights, slope, weight_gradient, side, keys, every)
                scores = scores.astype(query.dtype)
                scratch["ds"].at[buffer, i, own][...] = scores
                key_sums, value_sums = totals
                value_sums, key_sums = accumulate(
                    options, [(value_sums, lambda: dropped, do), (key_sums, lambda: scores, q)]
                )
                return key_sums, value_sums

            start = tuple(zeros((WARPGROUP_ROWS, width)) for width in (size, value_size))
            key_sums, value_sums = lax.fori_loop(zero, zero + steps, step, start)
            if vectors.keys:
                release()
            plgpu.barrier_arrive(scratch["held_free"].at[place])
            target = pl.ds(own * WARPGROUP_ROWS, WARPGROUP_ROWS)
            write("dq", key_sums * options.scale, outs[1].at[b, target, key_head])
            write(
                "dq" if size == value_size else "dv",
                value_sums * (1 / (1 - options.dropout_rate)),
                outs[2].at[b, target, key_head],
            )

        lax.fori_loop(0, count, one, None)
        plgpu.wait_smem_to_gmem(0)

    dtype = query.dtype
    copies = 2 * w + len(vectors.queries) + biases.copies
    scratch = {
        "q": matrix((stages, w, WARPGROUP_ROWS, size), dtype),
        "do": matrix((stages, w, WARPGROUP_ROWS, value_size), dtype),
        "k": matrix((2, w, WARPGROUP_ROWS, size), dtype),
        "v": matrix((2, w, WARPGROUP_ROWS, value_size), dtype),
        "ds": matrix((buffers.stages, w, w, WARPGROUP_ROWS, WARPGROUP_ROWS), dtype),
        "dq": matrix((w, WARPGROUP_ROWS, size), dtype),
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
        "held_ready": plgpu.Barrier(num_arrivals=2 * w + len(vectors.keys), num_barriers=2),
        "held_free": plgpu.Barrier(num_arrivals=w, num_barriers=2),
    }
    if w > 1:
        scratch["left"] = plgpu.Barrier(num_arrivals=w)
    if size != value_size:
        scratch["dv"] = matrix((w, WARPGROUP_ROWS, value_size), dtype)
    scratch |= vectors.scratch((stages, rows), (2, rows)) | biases.scratch()
    dq, dk, dv = plgpu.kernel(
        body,
        out_type=[out_in_tiles(x.shape, dtype) for x in (query, key, value)],
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("block",),
        num_threads=w + 1,
        thread_name="warpgroup",
        kernel_name="attention_fused",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]
