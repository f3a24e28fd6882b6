"""The segments of a batch's rows, and what tells rows and examples apart for dropout."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# The segments of a row: one array of both queries and keys, or a pair (of the queries, of the keys) where they differ.
Segments = Array | tuple[Array, Array] | None


def reference_segments(attention_mask: Array) -> tuple[Array, Array]:
    """Return segments with which padding behaves as in the reference implementation: never attended to, but attending.

    Padding of this package (segment 0) attends to nothing, so that attention returns zeros for it. In the reference it
    attends to the row's tokens. These outputs are never used, so that only a comparison of them needs this.

    Args:
        attention_mask: [B, L] int, 1 for tokens and 0 for padding.

    Returns:
        ([B, L] of ones, the mask), for any `segment_ids` argument of this package's models.
    """
    return jnp.ones_like(attention_mask), attention_mask


def split_segments(segment_ids: Segments) -> tuple[Array | None, Array | None]:
    """Return (segments of the queries, segments of the keys)."""
    return segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)


def gather_positions(hidden: Array, positions: Array) -> Array:
    """Gather hidden [B, L, E] at positions [B, P] int -> [B, P, E]. A position outside 0..L-1 gives NaN."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1, mode="fill")


def segments_at(segment_ids: Segments, positions: Array) -> Segments:
    """Return the segments of the queries at positions [B, X] of their rows, and of all keys."""
    queries, keys = split_segments(segment_ids)
    if queries is None:
        return None if keys is None else (jnp.ones(positions.shape, keys.dtype), keys)
    return jnp.take_along_axis(queries, positions, axis=1), queries if keys is None else keys


class ByExample(NamedTuple):
    """Each token's example and its place in it: an example then drops the same elements in whatever row it is packed.

    Attributes:
        examples: integers [B, L], a number that tells the examples of a step apart; any number for padding.
        positions: int32 [B, L], position within the example, from 0.
    """

    examples: Array
    positions: Array


# What dropout is drawn by besides the "dropout" stream: row numbers [B] uint32, or each token's example.
Rows = Array | ByExample


def row_numbers(rows: Rows | None, input_ids: Array) -> Rows:
    """Return `rows`, or row numbers [B] uint32, counted from 0, if they are None."""
    return jnp.arange(input_ids.shape[0], dtype=jnp.uint32) if rows is None else rows


def rows_at(rows: Rows, positions: Array) -> Rows:
    """Return the rows of the tokens at `positions` [B, X] int, or [B], of their rows; row numbers are those of all."""
    if not isinstance(rows, ByExample):
        return rows
    places = positions.reshape(len(positions), -1)
    return ByExample(*(jnp.take_along_axis(part, places, axis=1).reshape(positions.shape) for part in rows))
