"""Functions of logits: words that have occurred, the best over several hypotheses, top-k and nucleus."""

import math

import jax
import jax.numpy as jnp
from jax import Array

LARGEST_SORT = 256
"""Maximum number of words that `continuations` sorts completely."""


def continuations(gains: Array, norm: Array, scores: Array, count: int) -> tuple[Array, Array, Array]:
    """Find the best continuations of a sentence's hypotheses: the largest of (gains - norm) + scores.

    They are all in the `count` columns of words with the largest maxima, which one pass without branches finds. Sorting
    everything takes three times as long on a CPU.

    Args:
        gains: [R, k, V] float32, logits.
        norm: [R, k] float32, subtracted to give log probabilities.
        scores: [R, k] float32, scores of the hypotheses.
        count: number of continuations.

    Returns:
        (values [R, count] float32, best first; hypotheses [R, count] int32; words [R, count] int32)
    """
    rows, k, words = gains.shape
    columns = _columns(words, math.isqrt(words * count // k))  # as many to sort as there are words in those chosen
    lines = -(-words // columns)
    whole = words // columns * columns
    tops = gains[..., :whole].reshape(rows, k, -1, columns).max(axis=2)
    if whole < words:
        rest = gains[..., whole:]
        tops = tops.at[..., : words - whole].max(rest)
    tops = tops - norm[..., None] + scores[..., None]
    tops, best = jax.lax.top_k(tops.reshape(rows, -1), count)
    if lines == 1:
        return tops, best // columns, best % columns
    parents = jnp.repeat(best // columns, lines, axis=1)
    inside = (best % columns)[..., None] + columns * jnp.arange(lines)[None, None]
    inside = inside.reshape(rows, -1)
    places = jnp.where(inside < words, parents * words + inside, k * words)
    values = jnp.take_along_axis(gains.reshape(rows, -1), places, axis=1, mode="fill", fill_value=-jnp.inf)
    values = values - jnp.take_along_axis(norm, parents, axis=1) + jnp.take_along_axis(scores, parents, axis=1)
    values, at = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(parents, at, axis=1), jnp.take_along_axis(inside, at, axis=1)


def likeliest(scores: Array) -> Array:
    """Return the word of the largest score, the first of several: scores [..., V] -> [...] int32.

    It is `argmax`, which XLA computes fifteen times slower on a CPU.
    """
    words = jnp.arange(scores.shape[-1], dtype=jnp.int32).reshape(*(1,) * (scores.ndim - 1), -1)
    return jnp.where(scores == scores.max(axis=-1, keepdims=True), words, scores.shape[-1] - 1).min(axis=-1)


def _columns(words: int, target: int) -> int:
    """Return the number of columns for the words: all if they are few, else about `target`; a divisor saves a copy."""
    if words <= LARGEST_SORT:
        return words
    divisors = [number for number in range(target // 3, 3 * target) if words % number == 0]
    return min(divisors, key=lambda number: abs(math.log(number / target)), default=target)


def marked(tokens: Array, words: int) -> Array:
    """Mark the words that are among tokens [R, K, X] int32, -1 for none: bool [R, K, words]."""
    rows, width, _ = tokens.shape
    row, beam = jnp.arange(rows)[:, None, None], jnp.arange(width)[None, :, None]
    place = jnp.where(tokens < 0, words, tokens)  # outside the array, so dropped
    return jnp.zeros((rows, width, words), bool).at[row, beam, place].set(True, mode="drop")


def counts(tokens: Array, words: int) -> Array:
    """Count the occurrences of each word among tokens [R, X]: float32 [R, words]."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), words), jnp.float32).at[rows, tokens].add(1.0)


def completions(history: Array, newest: Array, size: int) -> Array:
    """Find the tokens that would complete an n-gram that has occurred.

    Args:
        history: [R, K, T] int32, the tokens so far, -1 after them.
        newest: [R] int32, index of the newest token.
        size: length of the n-grams, n.

    Returns:
        [R, K, X] int32, -1 for none.
    """
    length = history.shape[2]
    if length < size:
        return jnp.full_like(history, -1)
    starts = length - size + 1
    follows = jnp.broadcast_to((newest + 2 >= size)[:, None, None], (*history.shape[:2], starts))
    for i in range(size - 1):
        place = jnp.maximum(newest - size + 2 + i, 0)[:, None, None]
        follows &= history[..., i : i + starts] == jnp.take_along_axis(history, place, axis=2)
    return jnp.where(follows, history[..., size - 1 :], -1)


def narrowed(scores: Array, top_k: int, top_p: float) -> Array:
    """Set scores [..., V] to -inf outside the `top_k` best words (0 for all) and the nucleus of probability `top_p`."""
    if top_k and top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if top_p < 1.0:
        ordered = -jnp.sort(-scores, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores
