"""Losses of a student that imitates a teacher (Hinton et al. 2015; Sanh et al. 2019).

As in `losses`, a loss is a sum over predictions, and its weight is known before. Nothing is learnt by the teacher.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...kernels.platform import platform
from .losses import CHUNK_LOGITS

COSINE_EPSILON = 1e-12
"""Added to squared lengths, as in PyTorch's CosineEmbeddingLoss."""


def divergence(logits: Array, taught: Array, temperature: float) -> Array:
    """Compute T² · KL(softmax(taught / T) ‖ softmax(logits / T)); the factor T² keeps the gradient's size.

    Args:
        logits: [..., V] of the student, any float type; computed in float32.
        taught: [..., V] of the teacher.
        temperature: T.

    Returns:
        [...] float32
    """
    told = jax.nn.log_softmax(taught.astype(jnp.float32) / temperature)
    said = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return temperature**2 * (jnp.exp(told) * (told - said)).sum(axis=-1)


def cosine_distance(hidden: Array, taught: Array) -> Array:
    """Compute 1 - cosine of vectors [..., E] of any float type -> [...] float32."""
    a, b = hidden.astype(jnp.float32), taught.astype(jnp.float32)
    squares = ((a * a).sum(axis=-1) + COSINE_EPSILON) * ((b * b).sum(axis=-1) + COSINE_EPSILON)
    return 1 - (a * b).sum(axis=-1) / jnp.sqrt(squares)


def divergence_of_words(
    words: Callable[[Any, Array], Array],
    params: Any,
    hidden: Array,
    teacher_words: Callable[[Any, Array], Array],
    teacher_params: Any,
    taught: Array,
    weights: Array,
    *,
    temperature: float,
    vocabulary: int,
) -> Array:
    """Sum `divergence` over tokens in chunks, without storing all logits.

    The gradient is computed together with the loss, chunk by chunk, so that logits are computed once; the backward pass
    keeps only tensors of the sizes of the hidden states and the parameters.

    Args:
        words: (params, hidden [B, C, E]) -> logits [B, C, V or more] of the student.
        params: the student's parameters that `words` uses; no others, since their gradient is added up over chunks.
        hidden: [B, L, E], the student's last hidden states.
        teacher_words: the same of the teacher.
        teacher_params: parameters that `teacher_words` uses.
        taught: [B, L, F], the teacher's last hidden states.
        weights: [B, L] float32; a token of weight 0 contributes exactly nothing.
        temperature: T.
        vocabulary: number of words, V. A table may have more rows than there are words.

    Returns:
        [] float32
    """
    batch, length = weights.shape
    columns = max(1, CHUNK_LOGITS.get(platform(), 1 << 28) // (2 * vocabulary * batch))
    count = -(-length // columns)
    columns = -(-length // count)

    def cut(x: Array) -> Array:  # into chunks of columns, not of rows, which may be sharded over devices
        x = jnp.pad(x, ((0, 0), (0, count * columns - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, columns, *x.shape[2:]), 1, 0)

    def joined(chunks: Any) -> Array:
        return jnp.moveaxis(chunks, 0, 1).reshape(batch, count * columns, *chunks.shape[3:])[:, :length]

    def of_chunk(params: Any, hidden: Array, told: Array, weights: Array) -> Array:
        logits = words(params, hidden)[..., :vocabulary]
        return (divergence(logits, told[..., :vocabulary], temperature) * weights).sum()

    def over_chunks(
        with_gradient: bool, params: Any, hidden: Array, teacher_params: Any, taught: Array, w: Array
    ) -> Any:
        def step(carry: tuple[Array, Any], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
            loss, to_params = carry
            part, taught_part, weight = chunk
            told = teacher_words(teacher_params, taught_part)
            if not with_gradient:
                return (loss + of_chunk(params, part, told, weight), to_params), None
            value, (own, to_part) = jax.value_and_grad(of_chunk, argnums=(0, 1))(params, part, told, weight)
            return (loss + value, jax.tree.map(jnp.add, to_params, own)), to_part

        start = jnp.float32(0), jax.tree.map(jnp.zeros_like, params) if with_gradient else ()
        (loss, to_params), to_parts = jax.lax.scan(step, start, (cut(hidden), cut(taught), cut(w)))
        return loss, (to_params, joined(to_parts)) if with_gradient else None

    @jax.custom_vjp
    def summed(params: Any, hidden: Array, teacher_params: Any, taught: Array, weights: Array) -> Array:
        return over_chunks(False, params, hidden, teacher_params, taught, weights)[0]

    def backward(residuals: tuple[Any, Array], gradient: Array) -> tuple[Any, ...]:
        to_params, to_hidden = jax.tree.map(lambda g: (g.astype(jnp.float32) * gradient).astype(g.dtype), residuals)
        return to_params, to_hidden, None, None, None

    summed.defvjp(partial(over_chunks, True), backward)
    return summed(params, hidden, teacher_params, taught, weights)
