"""Vectors and bias tiles of the Hopper kernels, their register allocation, and their launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array

from .tile import WARPGROUP_ROWS, Blocks, Options, Side, ceil_to, matrix, toeplitz_tile
from .work import KEY_PADDING, QUERY_PADDING, pad_ids, pad_row, pad_words


class Vectors:
    """Vectors per query and per key: their arrays, their shared memory, and their copies into it."""

    def __init__(self, options: Options, extra: Mapping[str, Array], query_block: int, key_block: int) -> None:
        self.options = options
        self.arrays: dict[str, Array] = {}
        self.queries: dict[str, Any] = {}
        self.keys: dict[str, Any] = {}
        if "lse" in extra:  # in the backward pass
            padding = -extra["lse"].shape[2] % query_block
            # Positions beyond the last query have weight 0: exp2(score - inf) = 0.
            self.arrays["lse"] = jnp.pad(extra["lse"], ((0, 0), (0, 0), (0, padding)), constant_values=jnp.inf)
            self.arrays["delta"] = pad_words(extra["delta"], query_block)
            self.queries = {"lse": jnp.float32, "delta": jnp.float32}
        if options.segments:
            self.arrays["query_segments"] = pad_ids(extra["query_segments"], query_block, QUERY_PADDING)
            self.arrays["key_segments"] = pad_ids(extra["key_segments"], key_block, KEY_PADDING)
            self.queries["query_segments"] = jnp.int32
            self.keys["key_segments"] = jnp.int32
        if options.dropout_rate:
            self.arrays |= {name: pad_words(extra[name], query_block) for name in ("a", "b")}
            self.arrays["g"] = pad_words(extra["g"], key_block)
            self.queries |= {"a": jnp.uint32, "b": jnp.uint32}
            self.keys["g"] = jnp.uint32

    def scratch(self, query_shape: tuple[int, int], key_shape: tuple[int, int]) -> dict[str, Any]:
        out = {name: plgpu.SMEM(query_shape, kind) for name, kind in self.queries.items()}
        return out | {name: plgpu.SMEM(key_shape, kind) for name, kind in self.keys.items()}

    def copy_queries(self, refs: Any, scratch: Any, slot: Any, b: Any, head: Any, place: Any, barrier: Any) -> None:
        for name in self.queries:
            source = refs[name].at[b] if name == "query_segments" else refs[name].at[b, head]
            plgpu.copy_gmem_to_smem(source.at[place], scratch[name].at[slot], barrier)

    def copy_keys(self, refs: Any, scratch: Any, slot: Any, b: Any, place: Any, barrier: Any) -> None:
        for name in self.keys:
            source = refs[name].at[b if self.arrays[name].shape[0] > 1 else 0]
            plgpu.copy_gmem_to_smem(source.at[place], scratch[name].at[slot], barrier)


class BiasTiles:
    """Bias of a step's tile: its array, its shared memory, its copies, and the tile as a warpgroup reads it.

    `axis` is the axis of the queries in a warpgroup's tile: 0 if a warpgroup holds queries, 1 if it holds keys.
    """

    def __init__(self, options: Options, extra: Mapping[str, Array], blocks: Blocks, queries: int, axis: int) -> None:
        self.options, self.blocks, self.length, self.axis = options, blocks, queries, axis
        self.arrays: dict[str, Array] = {}
        extents = (blocks.rows, blocks.columns) if axis == 0 else (blocks.columns, blocks.rows)
        if options.bias == "row":
            self.arrays["bias"] = pad_row(extra["row"], *extents)
        elif options.bias == "dense":
            # A warpgroup reads its own rows; if they are keys, from the transposed bias.
            dense = extra["dense"] if axis == 0 else jnp.swapaxes(extra["dense"], 2, 3)
            # The copy engine's tiles of float32 are 8 x 32.
            self.arrays["bias"] = jnp.pad(dense, ((0, 0), (0, 0), (0, -dense.shape[2] % 8), (0, -dense.shape[3] % 32)))

    @property
    def copies(self) -> int:
        return {None: 0, "row": len(self._parts), "dense": self.blocks.warpgroups}[self.options.bias]

    @property
    def _parts(self) -> list[tuple[int, int]]:
        """Return (start, length) of each copy of a tile's part of a Toeplitz row; lengths are at most 256."""
        length = self.blocks.rows + self.blocks.columns
        return [(start, min(256, length - start)) for start in range(0, length, 256)]

    def scratch(self) -> dict[str, Any]:
        blocks = self.blocks
        if self.options.bias == "row":
            return {"bias": plgpu.SMEM((blocks.stages, blocks.rows + blocks.columns), jnp.float32)}
        if self.options.bias == "dense":
            return {"bias": matrix((blocks.stages, blocks.warpgroups, WARPGROUP_ROWS, blocks.columns), jnp.float32)}
        return {}

    def copy(self, refs: Any, scratch: Any, slot: Any, b: Any, head: Any, query: Any, key: Any, barrier: Any) -> None:
        blocks = self.blocks
        if self.options.bias == "row":
            for start, length in self._parts:
                source = refs["bias"].at[head, pl.ds(key - query + self.length + start, length)]
                plgpu.copy_gmem_to_smem(source, scratch["bias"].at[slot, pl.ds(start, length)], barrier)
        elif self.options.bias == "dense":
            shape = self.arrays["bias"].shape
            source = refs["bias"].at[b if shape[0] > 1 else 0, head if shape[1] > 1 else 0]
            row, column = (query, key) if self.axis == 0 else (key, query)
            for w in range(blocks.warpgroups):
                part = pl.ds(row + w * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(column, blocks.columns)
                plgpu.copy_gmem_to_smem(source.at[part], scratch["bias"].at[slot, w], barrier)

    def tile(self, scratch: Any, slot: Any, w: Any, side: Side) -> Array | None:
        blocks = self.blocks
        if self.options.bias == "row":
            # Later queries read earlier elements of the row, later keys later ones.
            ahead = (blocks.warpgroups - 1 - w) if self.axis == 0 else w
            part = pl.ds(ahead * WARPGROUP_ROWS, WARPGROUP_ROWS + blocks.columns)
            return toeplitz_tile(self.options, scratch["bias"].at[slot, part], side)
        if self.options.bias == "dense":
            return plgpu.load(scratch["bias"].at[slot, w], layout=plgpu.Layout.WGMMA)
        return None


def registers(options: Options, blocks: Blocks, *, computing: bool) -> None:
    """Set the registers per thread: the producer gives up those it does not need. (A single consumer has enough.)"""
    if options.interpret or blocks.warpgroups == 1:
        return
    if computing:
        plgpu.set_max_registers(240 if blocks.warpgroups == 2 else 160, action="increase")
    else:
        plgpu.set_max_registers(24 if blocks.warpgroups == 2 else 32, action="decrease")


def in_tiles(*matrices: Array) -> tuple[Array, ...]:
    """Pad matrices [B, L, H, D] with zeros to a multiple of 8 tokens: the copy engine handles whole tiles only."""
    return tuple(jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in matrices)


def out_in_tiles(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the shape that a kernel writes [B, L, H, D] to; see `in_tiles`."""
    batch, length, heads, size = shape
    return jax.ShapeDtypeStruct((batch, ceil_to(length, 8), heads, size), dtype)


def launch(
    name: str,
    body: Callable[..., None],
    blocks: Blocks,
    inputs: Mapping[str, Array],
    out_type: Any,
    scratch: Any,
    grid: Any,
) -> Any:
    names = list(inputs)

    def flat(*refs: Any, **scratch: Any) -> None:
        body(dict(zip(names, refs, strict=False)), refs[len(names) :], scratch)

    return plgpu.kernel(
        flat,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
