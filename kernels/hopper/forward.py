"""Forward pass on Hopper: up to three consumer warpgroups compute, a producer warpgroup moves memory.

It follows FlashAttention-3 (Shah et al. 2024, 3.2). The grid is persistent: the producer runs ahead through a ring
buffer of keys and values, from one work item into the next. A consumer issues the product of the next tile's keys
together with that of this tile's values, and computes the next tile's exponentials while the latter runs. Consumers
issue in turn, so that one's exponentials run beside another's products, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    WARPGROUP_ROWS,
    Blocks,
    Options,
    Side,
    accumulate,
    beside,
    kept,
    logits,
    mask_unless,
    matrix,
    product,
    release,
    rescaled,
    zeros,
)
from .work import Ring, Schedule, Work, work

SLACK = 8.0
"""How far a score may exceed the maximum that its row's weights are relative to before that is raised, in log2.

Raising it means multiplying all sums of the row (FlashAttention-4 leaves that out likewise). Weights are then at most
2**8 instead of 1, which costs no precision and cannot overflow: float16 reaches 2**16.
"""


def forward(
    options: Options,
    blocks: Blocks,
    query: Array,
    key: Array,
    value: Array,
    extra: Mapping[str, Array],
    out_dtype: Any = None,
) -> tuple[Array, Array]:
    """Compute the output [B, L, H, Dv] and lse [B, H, L] (natural logarithm, float32).

    Args:
      options: static facts of the call.
      blocks: tile sizes.
      query: [B, L, H, D] as in `attention`, 16-bit, with D a multiple of 16.
      key: [B, S, K, D], likewise.
      value: [B, S, K, Dv], likewise, with Dv a multiple of 16.
      extra: the arrays that the options need: "row" [H, L+S-1] or "dense" [1 or B, 1 or H, L, S], float32, in units of
        log2; "query_segments" [B, L] and "key_segments" [B, S]; "a" and "b" [B, H, L] and "g"
        [1 or B, S], the words of dropout (`hash.Words`).
      out_dtype: dtype of the output; that of the query unless given.
    """
    out_dtype = out_dtype or query.dtype
    batch, queries, heads, size = query.shape
    keys, key_heads, value_size = value.shape[1:]
    rows, columns = blocks.rows, blocks.columns
    area = options.area(queries, keys)
    items = work(area, rows, columns, extra.get("query_segments"), extra.get("key_segments"), axis=1)
    tiles = -(-queries // rows)
    schedule = Schedule.of(batch, heads, tiles, MULTIPROCESSORS, items)
    takes_turns = blocks.warpgroups > 1

    inputs: dict[str, Array] = dict(zip(("query", "key", "value"), in_tiles(query, key, value), strict=True))
    vectors = Vectors(options, extra, rows, columns)
    biases = BiasTiles(options, extra, blocks, queries, axis=0)
    inputs |= vectors.arrays | biases.arrays | schedule.arrays(items)
    names = list(inputs)
    # Accumulators this wide leave no registers to load the keys' hash words before they are needed.
    late = {"g"} if options.dropout_rate and value_size > 128 else set()
    # Segment ids are loaded where a tile is not whole.
    at_once = vectors.keys.keys() - late - {"key_segments"}

    def body(*refs: Any, **scratch: Any) -> None:
        refs_in, (out_ref, lse_ref) = dict(zip(names, refs, strict=False)), refs[len(names) :]
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def items_in_turn(one: Callable[[Array, Array, Array, Array, Work, Array], Array]) -> Array:
            """Call `one` with every item of the block; return the last step."""

            def visit(n: Array, b: Array, head: Array, tile: Array, step: Array) -> Array:
                return one(n, b, head, tile, items.read(refs_in.get("ranges"), b, tile), step)

            return schedule.walk(block, refs_in.get("schedule"), visit)

        ring = Ring(blocks.stages)

        @pl.when(warpgroup < blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=True)
            compute(out_ref, lse_ref, scratch, warpgroup, items_in_turn, ring)

        @pl.when(warpgroup == blocks.warpgroups)
        def _() -> None:
            registers(options, blocks, computing=False)
            move(refs_in, scratch, items_in_turn, ring)

    def move(refs: Mapping[str, Any], scratch: Any, items_in_turn: Any, ring: Ring) -> None:
        group = heads // key_heads

        def one(n: Array, b: Array, head: Array, tile: Array, bounds: Work, step: Array) -> Array:
            key_head = head if group == 1 else lax.div(head, jnp.int32(group))
            first = tile * rows

            @pl.when(n > 0)
            def _() -> None:
                plgpu.barrier_wait(scratch["q_free"])

            for w in range(blocks.warpgroups):
                place = pl.ds(first + w * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(refs["query"].at[b, place, head], scratch["q"].at[w], scratch["q_ready"])
            vectors.copy_queries(refs, scratch, 0, b, head, pl.ds(first, rows), scratch["q_ready"])

            def tiles_of_keys(t: Array, step: Array) -> Array:
                slot = ring.slot(step)
                place = pl.ds(t * columns, columns)
                ring.wait_free(scratch["k_free"], step)
                ready = scratch["k_ready"].at[slot]
                plgpu.copy_gmem_to_smem(refs["key"].at[b, place, key_head], scratch["k"].at[slot], ready)
                vectors.copy_keys(refs, scratch, slot, b, place, ready)
                biases.copy(refs, scratch, slot, b, head, first, t * columns, ready)
                ring.wait_free(scratch["v_free"], step)
                plgpu.copy_gmem_to_smem(
                    refs["value"].at[b, place, key_head], scratch["v"].at[slot], scratch["v_ready"].at[slot]
                )
                return step + 1

            return lax.fori_loop(bounds.first, bounds.stop, tiles_of_keys, step)

        steps = items_in_turn(one)
        plgpu.barrier_wait(scratch["q_free"])
        ring.drain(steps, scratch["k_free"], scratch["v_free"])

    def compute(out_ref: Any, lse_ref: Any, scratch: Any, w: Array, items_in_turn: Any, ring: Ring) -> None:
        mine = pl.ds(w * WARPGROUP_ROWS, WARPGROUP_ROWS)
        shape = (WARPGROUP_ROWS, columns)
        unit = options.scale * LOG2E if options.simple else 1.0

        def one(_n: Array, b: Array, head: Array, tile: Array, bounds: Work, step: Array) -> Array:
            first = tile * rows + w * WARPGROUP_ROWS
            plgpu.barrier_wait(scratch["q_ready"])
            own_side = Side(first, jnp.int32(0), shape, 0)
            own = {name: own_side.load_queries(scratch[name].at[0, mine]) for name in vectors.queries}

            def pass_turn(t: Array) -> None:
                if takes_turns:
                    # Nobody waits for the turn after an item's last tile.
                    where = (w < blocks.warpgroups - 1) | (t + 1 < bounds.stop)
                    turn = lax.rem(w + 1, jnp.int32(blocks.warpgroups))
                    pl.when(where)(lambda: plgpu.barrier_arrive(scratch["turn"].at[turn]))

            def own_turn(t: Array) -> None:
                if takes_turns:
                    # The first warpgroup has an item's first turn.
                    where = (w > 0) | (t > bounds.first + 1)
                    pl.when(where)(lambda: plgpu.barrier_wait(scratch["turn"].at[w]))

            def await_next_keys(t: Array, step: Array) -> None:
                @pl.when(t + 1 < bounds.stop)
                def _() -> None:
                    plgpu.barrier_wait(scratch["k_ready"].at[ring.slot(step + 1)])

            def weigh(products: Array, t: Array, step: Array, top: Array, total: Array) -> tuple[Array, ...]:
                """Return a tile's weights, the maximum and the sum so far, and what the maximum's growth scales by."""
                slot = ring.slot(step)
                side = Side(first, t * columns, shape, 0)
                scores = products
                bias = biases.tile(scratch, slot, w, side)
                early = {name: side.load_keys(scratch[name].at[slot]) for name in vectors.keys if name in at_once}
                if early or bias is not None:
                    release()

                def segments() -> tuple[Array | None, Array | None]:
                    if not options.segments:
                        return None, None
                    ids = side.load_keys(scratch["key_segments"].at[slot])
                    release()
                    return own["query_segments"], ids

                def free_key() -> None:
                    plgpu.barrier_arrive(scratch["k_free"].at[slot])

                if not late and not options.segments:
                    free_key()
                if not options.simple:
                    scores = logits(options, scores, bias)
                scores = mask_unless(bounds.whole(t), options, scores, side, keys, segments)
                if not late and options.segments:
                    free_key()
                new_top = jnp.max(scores, axis=1) * unit
                new_top = jnp.where(new_top > top + SLACK, new_top, top)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * unit - side.along_queries(new_top))
                total = total * shrink
                dropped = weights
                if late:
                    early |= {name: side.load_keys(scratch[name].at[slot]) for name in late}
                    release()
                    free_key()
                if options.dropout_rate:
                    keep = kept(options, side, own["a"], own["b"], early["g"])
                    dropped = jnp.where(keep, weights, 0.0)
                total = total + jnp.sum(weights, axis=1)
                made = lax.optimization_barrier((dropped, new_top, total, shrink))
                await_next_keys(t, step)
                return made

            def tile_of_keys(t: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
                sums, weights16, top, total, step = carry
                slot = ring.slot(step)
                # Not earlier: with one stage, these values come when the last tile's have left.
                plgpu.barrier_wait(scratch["v_ready"].at[slot])
                own_turn(t)
                sums, (weights, top, total, shrink) = beside(
                    options,
                    (scratch["q"].at[w], scratch["k"].at[ring.slot(step + 1)].T),
                    (sums, weights16, scratch["v"].at[slot]),
                    then=lambda: pass_turn(t),
                    make=lambda products, made: weigh(products, t, step + 1, made[1], made[2]),
                    made=(zeros(shape), top, total, total),
                )
                plgpu.barrier_arrive(scratch["v_free"].at[slot])
                made = rescaled(options, sums, shrink), weights.astype(query.dtype)
                return *lax.optimization_barrier(made), top, total, step + 1

            shapes = (WARPGROUP_ROWS, value_size), (WARPGROUP_ROWS,)
            nothing = zeros(shapes[0]), zeros(shapes[1], 0, LOWEST), zeros(shapes[1], 0)

            def all_tiles() -> tuple[Array, Array, Array]:
                """Return the sum of weighted values, the maximum of the scores, and the sum of the weights."""
                sums, top, total = nothing
                plgpu.barrier_wait(scratch["k_ready"].at[ring.slot(step)])
                products = product((scratch["q"].at[w], scratch["k"].at[ring.slot(step)].T))
                weights, top, total, _ = weigh(products, jnp.int32(bounds.first), step, top, total)
                carry = sums, weights.astype(query.dtype), top, total, step
                sums, weights16, top, total, last = lax.fori_loop(bounds.first + 1, bounds.stop, tile_of_keys, carry)
                slot = ring.slot(last)
                plgpu.barrier_wait(scratch["v_ready"].at[slot])
                (sums,) = accumulate(options, [(sums, lambda: weights16, scratch["v"].at[slot])])
                plgpu.barrier_arrive(scratch["v_free"].at[slot])
                return sums, top, total

            sums, top, weight = lax.cond(bounds.first < bounds.stop, all_tiles, lambda: nothing)
            step = step + (bounds.stop - bounds.first)
            if own:
                release()
            plgpu.barrier_arrive(scratch["q_free"])
            empty = weight == 0.0
            share = (1 / (1 - options.dropout_rate)) / jnp.where(empty, 1.0, weight)
            sums = sums * lax.broadcast_in_dim(share, sums.shape, [0])
            lse = jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(jnp.where(empty, 1.0, weight)))
            # The copy of the last item must have left shared memory before this one is written there.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["out"].at[w][...] = sums.astype(out_dtype)
            scratch["lse"].at[w][...] = lse
            plgpu.commit_smem()
            place = pl.ds(first, WARPGROUP_ROWS)
            plgpu.copy_smem_to_gmem(scratch["out"].at[w], out_ref.at[b, place, head])
            plgpu.copy_smem_to_gmem(scratch["lse"].at[w], lse_ref.at[b, head, place])
            return step

        items_in_turn(one)
        plgpu.wait_smem_to_gmem(0)

    w, stages, dtype = blocks.warpgroups, blocks.stages, query.dtype
    scratch = {
        "q": matrix((w, WARPGROUP_ROWS, size), dtype),
        "k": matrix((stages, columns, size), dtype),
        "v": matrix((stages, columns, value_size), dtype),
        "out": matrix((w, WARPGROUP_ROWS, value_size), out_dtype),
        "lse": plgpu.SMEM((w, WARPGROUP_ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=w + len(vectors.queries)),
        "q_free": plgpu.Barrier(num_arrivals=w),
        "k_ready": plgpu.Barrier(num_arrivals=1 + len(vectors.keys) + biases.copies, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=w, num_barriers=stages),
    }
    if takes_turns:
        scratch["turn"] = plgpu.Barrier(num_arrivals=1, num_barriers=w)
    scratch |= vectors.scratch((1, rows), (stages, columns)) | biases.scratch()

    out, lse = plgpu.kernel(
        body,
        out_type=(
            out_in_tiles((batch, queries, heads, value_size), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(schedule.grid,),
        grid_names=("block",),
        num_threads=w + 1,
        thread_name="warpgroup",
        kernel_name="attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    return out[:, :queries], lse[:, :, :queries]
