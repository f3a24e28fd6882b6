"""Shared by the TPU kernels for long rows: which tiles a step visits, and which blocks it fetches (see `long.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from .. import blocks
from ..blocks import Segments
from .tile import LANES, Cotangents, Meaning, Operands, ceil_to, dense_index, in_log2, pad_row, row_index, to_lanes


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile and chunk sizes of one kernel, in tokens. All are multiples of 128.

    Attributes:
      queries: queries per tile.
      keys: keys per tile.
      chunk: tokens of the streamed side that are fetched at once; a multiple of that side's tile size.
    """

    queries: int
    keys: int
    chunk: int

    def scalars_of_row(self, queries: int, keys: int, *, segmented: bool) -> int:
        """Return how many scalars `make_frame` makes for a row of a batch with this many queries and keys."""
        blocks = pl.cdiv(queries, self.queries), pl.cdiv(keys, self.keys)
        return 2 * max(blocks) + (len(Segments._fields) * sum(blocks) if segmented else 0)


class Scalars:
    """Small integers read by the scalar unit and the index maps: several arrays [B, n] packed into one."""

    def __init__(self, **parts: Array) -> None:
        self._widths: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        flat = []
        offset = 0
        for name, part in parts.items():
            self._offsets[name], self._widths[name] = offset, part.shape[1]
            flat.append(part.astype(jnp.int32).reshape(-1))
            offset += flat[-1].size
        self.packed = jnp.concatenate(flat)

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def read(self, ref: Any, name: str, b: Any, index: Any) -> Any:
        return ref[self._offsets[name] + b * self._widths[name] + index]


@dataclasses.dataclass(frozen=True)
class Frame:
    """State shared by the kernels of one call: sizes, scalars, and which tiles are needed.

    `by_keys` says that a kernel holds keys and streams queries, instead of the other way round.
    """

    meaning: Meaning
    tiling: Tiling
    scalars: Scalars
    heads: int
    by_keys: bool

    @property
    def streamed(self) -> int:
        """Size of a tile along the streamed side, in tokens."""
        return self.tiling.queries if self.by_keys else self.tiling.keys

    @property
    def tiles(self) -> int:
        """Number of tiles per chunk."""
        return self.tiling.chunk // self.streamed

    @property
    def chunks(self) -> int:
        length = self.meaning.area.queries if self.by_keys else self.meaning.area.keys
        return pl.cdiv(length, self.tiling.chunk)

    def bounds(self, ref: Any, b: Any, block: Any) -> tuple[Any, Any]:
        """Return (first, stop), the tiles of the streamed side between which a block of the other side has work."""
        return self.scalars.read(ref, "first", b, block), self.scalars.read(ref, "stop", b, block)

    def chunk(self, ref: Any, b: Any, block: Any, c: Any) -> Any:
        """Return the chunk to hold in step c: c itself, or the nearest one with work, so that no other is fetched."""
        first, stop = self.bounds(ref, b, block)
        return jnp.clip(c, lax.div(first, self.tiles), lax.div(jnp.maximum(stop - 1, 0), self.tiles))

    def walk(self, ref: Any, b: Any, block: Any, c: Any, tile: Callable[[Any, Any, bool], None]) -> None:
        """Call `tile(token, offset, masked)` for every needed tile of chunk c.

        `token` is the tile's first token of the streamed side, `offset` its position in the chunk.
        """
        first, stop = self.bounds(ref, b, block)
        area, tiling = self.meaning.area, self.tiling

        def step(index: Any, _: None) -> None:
            token = index * self.streamed
            offset = pl.multiple_of(token - c * tiling.chunk, LANES)
            i, j = (index, block) if self.by_keys else (block, index)
            query, key = i * tiling.queries, j * tiling.keys
            ids = (self._ids(ref, "query", b, i), self._ids(ref, "key", b, j))
            needed = blocks.needed(area, query, tiling.queries, key, tiling.keys, *ids)
            whole = blocks.whole(area, query, tiling.queries, key, tiling.keys, *ids)
            _branch(needed, whole, lambda masked: tile(token, offset, masked))

        lax.fori_loop(jnp.maximum(first, c * self.tiles), jnp.minimum(stop, (c + 1) * self.tiles), step, None)

    def at(self, ref: Any, b: Any, i: Any, j: Any, tile: Callable[[bool], None]) -> None:
        """Call `tile(masked)` if tile (i, j) is needed."""
        tiling = self.tiling
        ids = (self._ids(ref, "query", b, i), self._ids(ref, "key", b, j))
        where = (self.meaning.area, i * tiling.queries, tiling.queries, j * tiling.keys, tiling.keys, *ids)
        _branch(blocks.needed(*where), blocks.whole(*where), tile)

    def _ids(self, ref: Any, side: str, b: Any, block: Any) -> Segments | None:
        if not self.meaning.segmented:
            return None
        return Segments(*(self.scalars.read(ref, f"{side}_{part}", b, block) for part in Segments._fields))


def _branch(needed: Any, whole: Any, tile: Callable[[bool], None]) -> None:
    """Emit the tile's code with and without the mask, selected at run time; a case that cannot occur is left out."""
    if needed is True:
        if whole is True:
            tile(False)
            return
        needed = jnp.bool_(True)
    pl.when(needed & whole)(lambda: tile(False))
    if whole is not True:
        pl.when(needed & jnp.logical_not(whole))(lambda: tile(True))


def make_frame(operands: Operands, meaning: Meaning, tiling: Tiling, *, by_keys: bool) -> Frame:
    b, heads = operands.query.shape[:2]
    ids: tuple[Segments | None, Segments | None] = (None, None)
    parts = {}
    if meaning.segmented:
        ids = (
            blocks.segments(operands.query_ids, tiling.queries),
            blocks.segments(operands.key_ids, tiling.keys),
        )
        for side, ranges in zip(("query", "key"), ids, strict=True):
            parts |= {f"{side}_{part}": value for part, value in ranges._asdict().items()}
    first, stop = blocks.bounds(meaning.area, tiling.queries, tiling.keys, *ids)[int(by_keys)]
    parts |= {"first": jnp.broadcast_to(first, (b, first.shape[1])), "stop": jnp.broadcast_to(stop, (b, stop.shape[1]))}
    return Frame(meaning, tiling, Scalars(**parts), heads, by_keys)


class Inputs(NamedTuple):
    """Inputs of a kernel, or their block specs."""

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


def inputs_by_queries(
    operands: Operands, cotangents: Cotangents | None, frame: Frame
) -> tuple[Inputs, Inputs, tuple[int, ...]]:
    """Return arrays, block specs and grid (B, H, blocks, chunks) of a kernel that holds queries and streams keys."""
    tiling, area = frame.tiling, frame.meaning.area
    b, heads, _, size = operands.query.shape
    group = heads // operands.key.shape[1]
    v_size = operands.value.shape[3]
    q_padded, k_padded = ceil_to(area.queries, tiling.queries), ceil_to(area.keys, tiling.chunk)
    row = None if operands.row is None else pad_row(in_log2(operands.row), area.queries, area.keys, q_padded, k_padded)
    of_row = row_index(operands.g)

    def held(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tiling.queries, lanes), lambda b, h, i, c, s: (b, h, i, 0))

    def held_row() -> pl.BlockSpec:
        return pl.BlockSpec((None, None, 1, tiling.queries), lambda b, h, i, c, s: (b, h, 0, i))

    def streamed(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, tiling.chunk, lanes), lambda b, h, i, c, s: (b, lax.div(h, group), frame.chunk(s, b, i, c), 0)
        )

    arrays = Inputs(
        query=operands.query,
        key=operands.key,
        value=operands.value,
        query_ids=to_lanes(operands.query_ids, tiling.queries),
        key_ids=to_lanes(operands.key_ids, tiling.chunk),
        row=row,
        dense=operands.dense,
        a=to_lanes(operands.a, tiling.queries),
        b=to_lanes(operands.b, tiling.queries),
        g=to_lanes(operands.g, tiling.chunk),
    )
    specs = Inputs(
        query=held(size),
        key=streamed(size),
        value=streamed(v_size),
        query_ids=pl.BlockSpec((None, 1, tiling.queries), lambda b, h, i, c, s: (b, 0, i)),
        key_ids=pl.BlockSpec((None, 1, tiling.chunk), lambda b, h, i, c, s: (b, 0, frame.chunk(s, b, i, c))),
        row=pl.BlockSpec((None, 1, q_padded + k_padded), lambda b, h, i, c, s: (h, 0, 0)),
        dense=None
        if operands.dense is None
        else pl.BlockSpec(
            (None, None, tiling.queries, tiling.chunk),
            lambda b, h, i, c, s: (*dense_index(operands.dense.shape)(b, h), i, frame.chunk(s, b, i, c)),
        ),
        a=held_row(),
        b=held_row(),
        g=pl.BlockSpec((None, 1, tiling.chunk), lambda b, h, i, c, s: (of_row(b), 0, frame.chunk(s, b, i, c))),
    )
    if cotangents is not None:
        arrays = arrays._replace(
            out=cotangents.out,
            lse=to_lanes(cotangents.lse, tiling.queries, jnp.inf),
            delta=to_lanes(cotangents.delta, tiling.queries),
        )
        specs = specs._replace(out=held(v_size), lse=held_row(), delta=held_row())
    specs = Inputs(*(spec if array is not None else None for array, spec in zip(arrays, specs, strict=True)))
    grid = (b, heads, pl.cdiv(area.queries, tiling.queries), frame.chunks)
    return arrays, specs, grid


def inputs_by_keys(operands: Operands, cotangents: Cotangents, frame: Frame) -> tuple[Inputs, Inputs, tuple[int, ...]]:
    """Return arrays, block specs and grid of a kernel that holds keys and streams queries.

    The grid is (B, K, blocks, query heads per key head, chunks).
    """
    tiling, area = frame.tiling, frame.meaning.area
    b, k_heads, _, size = operands.key.shape
    group = operands.query.shape[1] // k_heads
    v_size = operands.value.shape[3]
    q_padded, k_padded = ceil_to(area.queries, tiling.chunk), ceil_to(area.keys, tiling.keys)
    row = operands.row
    if row is not None:  # Keys run along dimension 0 here, so the row is reversed.
        row = pad_row(in_log2(row[:, ::-1]), area.keys, area.queries, k_padded, q_padded)
    of_row = row_index(operands.g)

    def held(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tiling.keys, lanes), lambda b, k, j, g, c, s: (b, k, j, 0))

    def streamed(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, tiling.chunk, lanes),
            lambda b, k, j, g, c, s: (b, k * group + g, frame.chunk(s, b, j, c), 0),
        )

    def streamed_row() -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, 1, tiling.chunk), lambda b, k, j, g, c, s: (b, k * group + g, 0, frame.chunk(s, b, j, c))
        )

    arrays = Inputs(
        query=operands.query,
        key=operands.key,
        value=operands.value,
        query_ids=to_lanes(operands.query_ids, tiling.chunk),
        key_ids=to_lanes(operands.key_ids, tiling.keys),
        row=row,
        dense=operands.dense,
        a=to_lanes(operands.a, tiling.chunk),
        b=to_lanes(operands.b, tiling.chunk),
        g=to_lanes(operands.g, tiling.keys),
        out=cotangents.out,
        lse=to_lanes(cotangents.lse, tiling.chunk, jnp.inf),
        delta=to_lanes(cotangents.delta, tiling.chunk),
    )
    specs = Inputs(
        query=streamed(size),
        key=held(size),
        value=held(v_size),
        query_ids=pl.BlockSpec((None, 1, tiling.chunk), lambda b, k, j, g, c, s: (b, 0, frame.chunk(s, b, j, c))),
        key_ids=pl.BlockSpec((None, 1, tiling.keys), lambda b, k, j, g, c, s: (b, 0, j)),
        row=pl.BlockSpec((None, 1, q_padded + k_padded), lambda b, k, j, g, c, s: (k * group + g, 0, 0)),
        dense=None
        if operands.dense is None
        else pl.BlockSpec(
            (None, None, tiling.chunk, tiling.keys),
            lambda b, k, j, g, c, s: (
                *dense_index(operands.dense.shape)(b, k * group + g),
                frame.chunk(s, b, j, c),
                j,
            ),
        ),
        a=streamed_row(),
        b=streamed_row(),
        g=pl.BlockSpec((None, 1, tiling.keys), lambda b, k, j, g, c, s: (of_row(b), 0, j)),
        out=streamed(v_size),
        lse=streamed_row(),
        delta=streamed_row(),
    )
    specs = Inputs(*(spec if array is not None else None for array, spec in zip(arrays, specs, strict=True)))
    return arrays, specs, (b, k_heads, pl.cdiv(area.keys, tiling.keys), group, frame.chunks)
