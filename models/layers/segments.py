"""The segments and the numbers of a batch's rows."""

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


def row_numbers(rows: Array | None, input_ids: Array) -> Array:
    """Return row numbers [B] uint32, counted from 0 if none are given."""
    return jnp.arange(input_ids.shape[0], dtype=jnp.uint32) if rows is None else rows
