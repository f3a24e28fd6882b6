"""Find the tiles of the score matrix that are not fully masked, from positions and the range of segment ids per block.

The fast backends cut the scores [L, S] into tiles of queries x keys. A tile is *needed* unless causality, the window or
the segments mask all of it; it is *whole* if nothing in it is masked, so that it needs no mask code. The ranges are
only bounds: segment ids in any order give correct results, since a needed tile that is not whole still compares every
pair; scattered ids merely cost work.

`needed` and `whole` are arithmetic on integers of any kind: NumPy, traced arrays that broadcast together, or the
scalars within a kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Area:
    """Query-key pairs allowed by position alone: -left <= j - i <= right for query i and key j.

    Attributes:
      queries: number of queries, L.
      keys: number of keys, S.
      left: how many earlier keys are visible; None for no limit.
      right: how many later keys are visible; None for no limit.
    """

    queries: int
    keys: int
    left: int | None
    right: int | None


class Segments(NamedTuple):
    """Ranges of the segment ids of each block of tokens, int32 [B, blocks] each, ignoring padding (id 0).

    Attributes:
      low: smallest id; the largest int32 if there is only padding.
      high: largest id; the smallest int32 if there is only padding.
      only: the id of all tokens in the block; 0 if they differ or if there is any padding.
    """

    low: Any
    high: Any
    only: Any


def segments(ids: Array, block: int) -> Segments:
    """Return the ranges of `ids`, int32 [B, L], per block of `block` tokens. An incomplete last block is padded."""
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block))).reshape(ids.shape[0], -1, block)
    low = jnp.min(jnp.where(ids == 0, _INT32.max, ids), axis=2)
    high = jnp.max(jnp.where(ids == 0, _INT32.min, ids), axis=2)
    full = jnp.all(ids != 0, axis=2)
    return Segments(low, high, jnp.where(full & (low == high), low, 0))


def needed(
    area: Area, query: Any, queries: int, key: Any, keys: int, query_ids: Segments | None, key_ids: Segments | None
) -> Any:
    """Tell whether the tile of queries [query, query + queries) and keys [key, key + keys) may contain unmasked pairs.

    Without segments and with an unlimited area the result is a plain True.
    """
    answer: Any = True
    if area.left is not None:
        answer = answer & (key + (keys - 1) - query >= -area.left)
    if area.right is not None:
        answer = answer & (key - (query + (queries - 1)) <= area.right)
    if query_ids is not None and key_ids is not None:
        answer = answer & (query_ids.low <= key_ids.high) & (key_ids.low <= query_ids.high)
    return answer


def whole(
    area: Area, query: Any, queries: int, key: Any, keys: int, query_ids: Segments | None, key_ids: Segments | None
) -> Any:
    """Tell whether the tile lies within the score matrix and every query in it attends to every key in it."""
    answer: Any = True
    if area.queries % queries:
        answer = answer & (query + queries <= area.queries)
    if area.keys % keys:
        answer = answer & (key + keys <= area.keys)
    if area.left is not None:
        answer = answer & (key - (query + (queries - 1)) >= -area.left)
    if area.right is not None:
        answer = answer & (key + (keys - 1) - query <= area.right)
    if query_ids is not None and key_ids is not None:
        answer = answer & (query_ids.only == key_ids.only) & (query_ids.only != 0)
    return answer


def bounds(
    area: Area, queries: int, keys: int, query_ids: Segments | None = None, key_ids: Segments | None = None
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return the range of needed tiles for each block of queries and for each block of keys.

    Args:
      area: the pairs allowed by position.
      queries: queries per tile.
      keys: keys per tile.
      query_ids: `segments` of the queries in blocks of `queries`, or None.
      key_ids: `segments` of the keys in blocks of `keys`, or None.

    Returns:
      (first, stop) of the key blocks of each query block, int32 [B, ceil(L / queries)], and (first, stop) of the query
      blocks of each key block, int32 [B, ceil(S / keys)]; B is 1 without segments. A block without work has
      first = stop = 0. Blocks within a range are not necessarily needed.
    """
    query = jnp.arange(-(-area.queries // queries), dtype=jnp.int32)[None, :, None] * queries
    key = jnp.arange(-(-area.keys // keys), dtype=jnp.int32)[None, None, :] * keys
    if query_ids is not None and key_ids is not None:
        query_ids = Segments(*(part[:, :, None] for part in query_ids))
        key_ids = Segments(*(part[:, None, :] for part in key_ids))
    tiles = needed(area, query, queries, key, keys, query_ids, key_ids)
    rows = 1 if query_ids is None else query_ids.low.shape[0]
    tiles = jnp.broadcast_to(jnp.asarray(tiles), (rows, query.size, key.size))
    return _ends(tiles, axis=2), _ends(tiles, axis=1)


def _ends(tiles: Array, axis: int) -> tuple[Array, Array]:
    length = tiles.shape[axis]
    place = jnp.arange(length, dtype=jnp.int32).reshape([-1 if a == axis else 1 for a in range(3)])
    stop = jnp.max(jnp.where(tiles, place + 1, 0), axis=axis)
    first = jnp.min(jnp.where(tiles, place, length), axis=axis)
    return jnp.where(stop > 0, first, 0), stop
