"""Work of the Hopper kernels: which tiles each block computes, in what order, and the ring that delivers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import blocks


@dataclasses.dataclass(frozen=True)
class Work:
    """Tiles of one block: [first, stop). Those in [clear, clear_stop) need no mask."""

    first: Any
    stop: Any
    clear: Any
    clear_stop: Any

    def whole(self, tile: Any) -> Any:
        return (tile >= self.clear) & (tile < self.clear_stop)


@dataclasses.dataclass(frozen=True)
class Items:
    """Tiles of all blocks: `ranges`, int32 [1 or B, blocks, 4], or None if `all` holds for every block."""

    ranges: Array | None
    all: Work

    def read(self, ref: Any, b: Any, block: Any) -> Work:
        if self.ranges is None:
            return self.all
        row = ref.at[b if self.ranges.shape[0] > 1 else 0, block]
        return Work(*(row[i] for i in range(4)))


def work(
    area: blocks.Area,
    queries: int,
    keys: int,
    query_segments: Array | None,
    key_segments: Array | None,
    *,
    axis: int,
) -> Items:
    """Return the tiles of `queries` x `keys` that each block of queries (axis 1) or of keys (axis 2) must compute."""
    query_blocks, key_blocks = -(-area.queries // queries), -(-area.keys // keys)
    along = key_blocks if axis == 1 else query_blocks
    if area.left is None and area.right is None and query_segments is None:
        # Positions beyond the last query are harmless, so `whole` checks only keys.
        whole = area.keys // keys if axis == 1 else along
        if axis == 1 or area.keys % keys == 0:
            return Items(None, Work(0, along, 0, whole))
    query_ids = key_ids = None
    if query_segments is not None and key_segments is not None:
        query_ids, key_ids = blocks.segments(query_segments, queries), blocks.segments(key_segments, keys)
    first, stop = blocks.bounds(area, queries, keys, query_ids, key_ids)[axis - 1]
    query = np.arange(query_blocks, dtype=np.int32)[None, :, None] * queries
    key = np.arange(key_blocks, dtype=np.int32)[None, None, :] * keys
    if query_ids is not None and key_ids is not None:
        query_ids = blocks.Segments(*(part[:, :, None] for part in query_ids))
        key_ids = blocks.Segments(*(part[:, None, :] for part in key_ids))
    clear = blocks.whole(area, query, queries, key, keys, query_ids, key_ids)
    other = 3 - axis
    clear = jnp.broadcast_to(jnp.asarray(clear), (first.shape[0], query_blocks, key_blocks))
    place = jnp.arange(clear.shape[other], dtype=jnp.int32)
    place = place.reshape([-1 if a == other else 1 for a in range(3)])
    begin = jnp.min(jnp.where(clear, place, along), axis=other, keepdims=True)
    # Only the first run of unmasked tiles, which is exact whatever the order of the segments.
    end = jnp.min(jnp.where(~clear & (place > begin), place, along), axis=other, keepdims=True)
    begin, end = jnp.squeeze(begin, other), jnp.squeeze(end, other)
    return Items(jnp.stack([first, stop, begin, end], axis=-1), Work(0, 0, 0, 0))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which the blocks of a persistent grid take items: a batch row, a head and a tile of queries each.

    Blocks take one item each round. Where tiles differ in work the longest come first, so that what is left at the end
    is short; the heads of a tile, which have the same work, come together. Without a table all items are equally long,
    and the tiles of a head come together, since they read the same keys.

    Attributes:
      heads: number of heads.
      tiles: number of tiles of queries.
      items: number of items.
      grid: number of blocks.
      table: int32 [rounds, grid], `(row * heads + head) * tiles + tile` of each block's items; -1 is none. Or None.
    """

    heads: int
    tiles: int
    items: int
    grid: int
    table: Array | None

    @classmethod
    def of(cls, batch: int, heads: int, tiles: int, blocks: int, items: Items) -> Schedule:
        """Return the schedule of these items on at most this number of blocks."""
        count = batch * heads * tiles
        grid, table = min(count, blocks), None
        if items.ranges is not None and tiles > 1 and count > grid:
            table = _longest_first(items.ranges[..., 1] - items.ranges[..., 0], batch, heads, grid)
        return cls(heads, tiles, count, grid, table)

    def arrays(self, items: Items) -> dict[str, Array]:
        """Return the kernel's inputs "ranges" and "schedule", where there are any."""
        arrays = {"ranges": items.ranges, "schedule": self.table}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def rounds(self) -> int:
        """Return the number of items of the busiest block."""
        return -(-self.items // self.grid)

    def walk(self, block: Array, table: Any, visit: Callable[[Array, Array, Array, Array, Array], Array]) -> Array:
        """Call `visit` with each item of a block: its number there, row, head, tile, and the step so far.

        It returns the step after the item; that after the last one is the result. The next item's number is loaded
        meanwhile.
        """
        count = self.count(block, table)

        def item(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            number, step = carry
            following = self.number(block, jnp.minimum(n + 1, count - 1), table)
            return following, visit(n, *self.item(number), step)

        return lax.fori_loop(0, count, item, (self.number(block, jnp.int32(0), table), jnp.int32(0)))[1]

    def count(self, block: Array, table: Any) -> Array:
        """Return the number of items of a block. `table` is the reference to the array of that name, or None."""
        last = self.number(block, jnp.int32(self.rounds - 1), table)
        return self.rounds - ((last < 0) | (last >= self.items)).astype(jnp.int32)

    def number(self, block: Array, n: Array, table: Any) -> Array:
        """Return the number of a block's item n, of which there is one, in the form that `item` takes."""
        return block + n * self.grid if table is None else table[n, block]

    def item(self, number: Array) -> tuple[Array, Array, Array]:
        """Return the batch row, the head and the tile of an item."""
        row, tile = lax.div(number, jnp.int32(self.tiles)), lax.rem(number, jnp.int32(self.tiles))
        return lax.div(row, jnp.int32(self.heads)), lax.rem(row, jnp.int32(self.heads)), tile


def _longest_first(lengths: Array, batch: int, heads: int, grid: int) -> Array:
    """Return the table of a `Schedule` of tiles of these lengths, int32 [1 or B, tiles].

    Items sorted by length make rounds of one item a block. In a round whose items differ, some blocks get more than
    others. There are two ways to spread this: every second round in reverse; or each round turned by the number of
    blocks that got more so far. The one is better if lengths change slowly, the other if they change in steps; the one
    whose busiest block has less to do is taken.
    """
    tiles = lengths.shape[1]
    order = jnp.argsort(-lengths.reshape(-1), stable=True).astype(jnp.int32)
    # What every item costs besides its tiles of keys is about one of them.
    cost = jnp.repeat(lengths.reshape(-1)[order] + 1, batch * heads // lengths.shape[0])
    row, tile = order // tiles, order % tiles
    inner = jnp.arange(batch * heads // lengths.shape[0], dtype=jnp.int32)
    number = ((row[:, None] * inner.size + inner[None, :]) * tiles + tile[:, None]).reshape(-1)
    rounds = -(-number.size // grid)
    padding = (0, rounds * grid - number.size)
    number = jnp.pad(number, padding, constant_values=-1).reshape(rounds, grid)
    cost = jnp.pad(cost, padding).reshape(rounds, grid)
    turn = jnp.arange(rounds, dtype=jnp.int32)[:, None]
    place = jnp.arange(grid, dtype=jnp.int32)[None, :]
    reverse = jnp.where(turn % 2 == 0, place, grid - 1 - place)
    more = cost - cost[:, -1:]
    ahead = jnp.round(jnp.sum(more, axis=1) / jnp.maximum(jnp.max(more, axis=1), 1)).astype(jnp.int32)
    turned = (place - (jnp.cumsum(ahead) - ahead)[:, None]) % grid
    busiest = [jnp.max(jnp.sum(jnp.take_along_axis(cost, at, axis=1), axis=0)) for at in (reverse, turned)]
    return jnp.take_along_axis(number, jnp.where(busiest[0] <= busiest[1], reverse, turned), axis=1)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Ring buffer in shared memory for `stages` steps. A stage's barrier has the stage's number."""

    stages: int

    def slot(self, step: Any) -> Array:
        return lax.rem(jnp.asarray(step, jnp.int32), jnp.int32(self.stages))

    def wait_free(self, barriers: Any, step: Array) -> None:
        """Wait until the step that last used this step's slot has been read. (The first steps find theirs unused.)"""

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(barriers.at[self.slot(step)])

    def drain(self, steps: Array, *barriers: Any) -> None:
        """Wait until the last steps have been read, so that no barrier is left incomplete."""

        def one(step: Array, _: None) -> None:
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, one, None)


QUERY_PADDING, KEY_PADDING = np.iinfo(np.int32).min, np.iinfo(np.int32).min + 1
"""Ids of padding (id 0) within the kernels: no query's equals any key's, so that testing equality is enough."""


def pad_ids(ids: Array, multiple: int, padding: int) -> Array:
    """Replace segment id 0 by `padding`, and append `padding` up to a multiple of `multiple`."""
    ids = jnp.where(ids == 0, padding, ids)
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % multiple)), constant_values=padding)


def pad_words(words: Array, multiple: int) -> Array:
    """Pad vectors of queries [B, H, L] or of keys [B, S] with zeros to a multiple of `multiple`."""
    return jnp.pad(words, (*[(0, 0)] * (words.ndim - 1), (0, -words.shape[-1] % multiple)))


def pad_row(row: Array, rows: int, columns: int) -> Array:
    """Pad a Toeplitz row for tiles that extend beyond both ends: distance d is at `d + queries - 1 + rows`.

    The part for the tile at (query, key) starts at `key - query + queries`, and its element (i, j) is `j - i + rows -
    1` further on.
    """
    length = row.shape[1] + rows + columns
    return jnp.pad(row, ((0, 0), (rows, columns + (-length) % 4)))
