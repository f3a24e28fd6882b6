"""Encodings of positions: rotary, sinusoidal and relative (T5)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ...kernels.bias import RelativeBias, relative_position_bucket
from .linear import partitioned


def rotate(vectors: Array, position_ids: Array, theta: float) -> Array:
    """Apply rotary position embedding (Su et al. 2021, 3.4.2): rotate channels i and i + D/2 by position·theta^(-2i/D).

    Args:
        vectors: [B, L, H, D], queries or keys; D is even.
        position_ids: int [B or 1, L].
        theta: base of the frequencies.

    Returns:
        [B, L, H, D] of the same dtype. Angles and products are computed in float32.
    """
    half = vectors.shape[-1] // 2
    frequencies = jnp.asarray(1.0 / theta ** (np.arange(half, dtype=np.float32) / np.float32(half)))
    angles = (position_ids[:, :, None].astype(jnp.float32) * frequencies[None, None])[:, :, None]
    sines, cosines = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, axis=-1).astype(vectors.dtype)


class RelativePositions(nn.Module):
    """T5's relative position biases (Raffel et al. 2020, 2.1), one table for all layers of a stack.

    Attributes:
        heads: number of heads of each layer, H.
        bidirectional: whether keys after the query have their own buckets.
        buckets: number of buckets of distances.
        max_distance: distance in tokens from which on all distances share the last bucket.
    """

    heads: int
    bidirectional: bool
    table_init: Initializer
    buckets: int = 32
    max_distance: int = 128

    @nn.compact
    def __call__(self) -> RelativeBias:
        """Return the bias for each layer's `Attention`."""
        axes = partitioned(self.table_init, "positions", "heads")
        table = self.param("table", axes, (self.buckets, self.heads), jnp.float32)
        return RelativeBias(table, self.bidirectional, self.max_distance)


def bias_of_slots(bias: RelativeBias, positions: Array, slot_positions: Array) -> Array:
    """Return the bias of one query per row and of the keys in a cache's slots, [B, H, 1, slots] float32.

    Args:
        bias: the bias.
        positions: [B] int32, position of each row's query.
        slot_positions: [B, slots] int32, position of the token in each slot.
    """
    bucket = relative_position_bucket(
        slot_positions - positions[:, None],
        bidirectional=bias.bidirectional,
        buckets=len(bias.table),
        max_distance=bias.max_distance,
    )
    return jnp.moveaxis(jnp.take(bias.table, bucket, axis=0), 2, 1)[:, :, None]


def sinusoids(positions: int, width: int, *, interleaved: bool) -> np.ndarray:
    """Return sin and cos of position / 10000^(2i / E), [positions, E] float32 (Vaswani et al. 2017, 3.5).

    Args:
        positions: number of positions.
        width: number of channels, E.
        interleaved: channels 2i and 2i + 1 are the sine and the cosine of one frequency, as the paper writes it; else
            all sines come first and then all cosines, as in the paper's own code and most later code.
    """
    angles = np.arange(positions)[:, None] / np.power(10_000, 2 * np.arange(-(-width // 2)) / width)
    sines, cosines = np.sin(angles), np.cos(angles[:, : width // 2])
    if not interleaved:
        return np.concatenate([sines, cosines], axis=1).astype(np.float32)
    table = np.empty((positions, width), np.float32)
    table[:, 0::2], table[:, 1::2] = sines, cosines
    return table
