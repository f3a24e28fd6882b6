"""Features of packed texts: combine the hidden states of several layers, and pool one vector per text.

Letters for shapes: K selected layers, B rows, L tokens, X texts in a row, E model width.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ..layers.segments import gather_positions

POOLINGS = ("cls", "mean", "max", "mean_sqrt_len", "last")


def combine(hidden: Array, how: str) -> Array:
    """Combine layers: hidden [K, ..., E] -> [..., E] (sum or mean) or [..., K·E] (concatenated in order)."""
    if how == "concat":
        return jnp.concatenate(list(hidden), axis=-1)
    return hidden.sum(axis=0) if how == "sum" else hidden.mean(axis=0)


def mix(hidden: Array, weights: Array, gamma: Array) -> Array:
    """Mix layers: γ · Σ_k softmax(w)_k · hidden_k (Peters et al. 2018, "Deep contextualized", formula 1).

    Args:
        hidden: [..., K, E].
        weights: [K], before the softmax.
        gamma: [].
    """
    return gamma * jnp.einsum("...ke,k->...e", hidden, jax.nn.softmax(weights), precision="highest")


def pool(hidden: Array, segment_ids: Array, cls_positions: Array, how: str) -> Array:
    """Pool one float32 vector per text of packed rows.

    Args:
        hidden: [B, L, E].
        segment_ids: [B, L] int32; text x of a row is where it is x + 1.
        cls_positions: [B, X] int32, the first token of each text.
        how: "cls" takes the first token and "last" the last one; "mean" and "max" pool over all tokens of a text,
            special tokens included, as sentence-transformers does; "mean_sqrt_len" divides their sum by the square root
            of their number.

    Returns:
        [B, X, E]; undefined for slots without a text.
    """
    hidden = hidden.astype(jnp.float32)
    rows, slots = cls_positions.shape
    if how == "last":
        texts = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
        belongs = segment_ids[:, None, :] == texts[None, :, None]
        places = jnp.where(belongs, jnp.arange(segment_ids.shape[1])[None, None], 0)
        return gather_positions(hidden, places.max(axis=-1))
    if how == "cls":
        return gather_positions(hidden, cls_positions)
    if how == "max":
        numbers = jnp.arange(rows, dtype=segment_ids.dtype)[:, None] * (slots + 1) + segment_ids
        highest = jax.ops.segment_max(
            hidden.reshape(-1, hidden.shape[-1]), numbers.reshape(-1), num_segments=rows * (slots + 1)
        )
        return highest.reshape(rows, slots + 1, -1)[:, 1:]
    texts = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
    belongs = (segment_ids[:, None, :] == texts[None, :, None]).astype(jnp.float32)  # [B, X, L]
    total = jnp.einsum("bxl,ble->bxe", belongs, hidden, precision="highest")
    count = jnp.maximum(belongs.sum(axis=-1, keepdims=True), 1.0)
    return total / (count if how == "mean" else jnp.sqrt(count))


def normalize(vectors: Array) -> Array:
    """Divide vectors [..., E] by their length; zero vectors stay zero."""
    length = jnp.sqrt(jnp.square(vectors).sum(axis=-1, keepdims=True))
    return vectors / jnp.maximum(length, 1e-12)
