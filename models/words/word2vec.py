"""word2vec: skip-gram and CBOW with negative sampling.

Mikolov et al. 2013, "Efficient Estimation of Word Representations in Vector Space" and "Distributed Representations of
Words and Phrases and their Compositionality"; what the papers leave open is as in the authors' word2vec.c.

Both predict a word from those around it. Skip-gram has a pair for each: the word's vector is an input, and the word in
the middle what it predicts. CBOW has one input, their mean. A prediction is one against words drawn by their count to
the power of 0.75; a draw that hits the word itself is skipped. The window's size is drawn from 1 to `window` for each
word in the middle, after frequent words were left out at random, so that windows reach further.

A batch has many words in the middle, and the gradients of all its pairs are summed, not averaged: each pair moves the
vectors as far as it would alone. The pairs of a word in the middle share what is drawn against it; word2vec.c draws
anew for each, which is as good and takes six times the vectors.

CBOW's two gradients: with "sum", that of word2vec.c and gensim, each word of the window gets the whole gradient of the
mean; with "mean" its share, which is the true gradient (Irsoy et al. 2021, "Corrected CBOW Performs as well as
Skip-gram").
"""

from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SATURATED = 6.0
"""Logit beyond which the sigmoid counts as 0 or 1, as in word2vec.c's table."""


@dataclass(frozen=True)
class Word2VecConfig:
    """Settings of the model."""

    kind: Literal["skipgram", "cbow"] = "skipgram"
    width: int = 100
    """size of the vectors, D"""
    window: int = 5
    """maximum number of words on each side"""
    negatives: int = 5
    """number of words drawn against each prediction"""
    cbow_gradient: Literal["sum", "mean"] = "sum"
    """gradient of a word in CBOW's window"""


class Tables(NamedTuple):
    """The parameters."""

    inputs: Array  # [V, D] float32, the word vectors
    outputs: Array  # [V, D] float32


class Stream(NamedTuple):
    """A part of the text, with a window of words before and after it."""

    ids: Array  # [window + N + window] int32
    sentences: Array  # the same shape; words of one sentence have the same number, -1 is no word


def new_tables(config: Word2VecConfig, words: int, seed: int) -> Tables:
    """Draw new parameters: inputs uniform within ±0.5/D, outputs zero."""
    inputs = np.random.default_rng(seed).random((words, config.width), np.float32)
    return Tables(jnp.asarray((inputs - 0.5) / config.width), jnp.zeros((words, config.width)))


def keep_probabilities(counts: np.ndarray, threshold: float) -> np.ndarray:
    """Return the probability of keeping each word, (sqrt(f/t) + 1) t/f for its frequency f, at most 1 (word2vec.c)."""
    if not threshold:
        return np.ones(len(counts))
    share = counts / counts.sum() / threshold
    return np.minimum(1.0, (np.sqrt(share) + 1) / share)


def drawn_against(counts: np.ndarray) -> np.ndarray:
    """Return the bounds [V] uint32 of each word's part of 2^32, in proportion to its count to the power of 0.75."""
    share = np.cumsum(counts.astype(np.float64) ** 0.75)
    return np.minimum(share / share[-1] * 2.0**32, 2.0**32 - 1).astype(np.uint32)


def update(
    config: Word2VecConfig, tables: Tables, stream: Stream, bounds: Array, rate: Array, key: Array
) -> tuple[Tables, Array, Array]:
    """Do the update of one batch, of the N words in the middle of `stream`.

    Args:
        config: settings.
        tables: the parameters.
        stream: the words.
        bounds: [V] uint32, by `drawn_against`.
        rate: learning rate.
        key: random key.

    Returns:
        (parameters, summed losses of all predictions, number of pairs)
    """
    c, words = config, tables.inputs.shape[0]
    count = stream.ids.shape[0] - 2 * c.window
    draw_window, draw_words = jax.random.split(key)
    reach = jax.random.randint(draw_window, (count,), 1, c.window + 1)
    offsets = np.array([offset for offset in range(-c.window, c.window + 1) if offset])
    size = stream.ids.shape[0]
    spans = [slice(c.window + offset, c.window + offset + count) for offset in offsets.tolist()]
    middle, sentence = (part[c.window : c.window + count] for part in stream)
    near = jnp.abs(jnp.asarray(offsets))[None] <= reach[:, None]
    same = jnp.stack([stream.sentences[span] == sentence for span in spans], axis=1)
    valid = near & same & (sentence >= 0)[:, None]  # [N, C]
    drawn = jnp.searchsorted(bounds, jax.random.bits(draw_words, (count, c.negatives), jnp.uint32), side="right")
    drawn = jnp.minimum(drawn.astype(jnp.int32), words - 1)
    targets = jnp.concatenate([middle[:, None], drawn], axis=1)  # [N, 1 + K]
    labels = jnp.zeros(targets.shape).at[:, 0].set(1.0)
    counted = jnp.concatenate([jnp.ones((count, 1), bool), drawn != middle[:, None]], axis=1)
    # Windows overlap: a word's vector is read, and changed, once for all windows that it is in.
    # The barriers keep XLA from computing what several terms of a sum share anew for each of them.
    vectors, against = jax.lax.optimization_barrier((tables.inputs[stream.ids], tables.outputs[targets]))
    found = valid.sum(axis=1).astype(jnp.float32)
    weights = valid.astype(jnp.float32)
    share = 1 / jnp.maximum(found, 1.0)
    if c.kind == "cbow":
        total = reduce(add, [weights[:, place, None] * vectors[span] for place, span in enumerate(spans)])
        given, pairs = [jax.lax.optimization_barrier(total * share[:, None])], (found > 0)[:, None]
    else:
        given, pairs = [vectors[span] for span in spans], valid
    # Sums that are written out term by term: as products of small matrices they take several times as long on a CPU.
    logits = jnp.stack([jnp.einsum("nd,nkd->nk", vector, against) for vector in given], axis=1)
    chance = jnp.where(logits > SATURATED, 1.0, jnp.where(logits < -SATURATED, 0.0, jax.nn.sigmoid(logits)))
    used = (pairs[:, :, None] & counted[:, None]).astype(jnp.float32)
    loss = (used * (jax.nn.softplus(logits) - labels[:, None] * logits)).sum()
    error = jax.lax.optimization_barrier(rate * used * (labels[:, None] - chance))
    to_given = [
        reduce(add, [error[:, place, k, None] * against[:, k] for k in range(1 + c.negatives)])
        for place in range(len(given))
    ]
    to_outputs = reduce(add, [error[:, place, :, None] * vector[:, None] for place, vector in enumerate(given)])
    if c.kind == "cbow":
        own = to_given[0] if c.cbow_gradient == "sum" else to_given[0] * share[:, None]
        own = jax.lax.optimization_barrier(own)
        to_given = [weights[:, place, None] * own for place in range(len(spans))]
    to_given = jax.lax.optimization_barrier(to_given)
    to_vectors = reduce(
        add,
        [jnp.pad(part, ((span.start, size - span.stop), (0, 0))) for part, span in zip(to_given, spans, strict=True)],
    )
    inputs = tables.inputs.at[stream.ids].add(to_vectors)
    outputs = tables.outputs.at[targets.reshape(-1)].add(to_outputs.reshape(-1, c.width))
    return Tables(inputs, outputs), loss, pairs.sum().astype(jnp.float32)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def updates(
    config: Word2VecConfig, tables: Tables, streams: Stream, bounds: Array, rates: Array, key: Array
) -> tuple[Tables, Array, Array]:
    """Do the updates of several batches, one after the other.

    Args:
        config: settings.
        tables: the parameters; not to be used afterwards.
        streams: [M, N + 2 * window] each.
        bounds: [V] uint32.
        rates: [M] float32, learning rates.
        key: random key.

    Returns:
        (parameters, sum of losses, number of pairs)
    """

    def step(tables: Tables, xs: tuple[Stream, Array, Array]) -> tuple[Tables, tuple[Array, Array]]:
        stream, rate, number = xs
        tables, *sums = update(config, tables, stream, bounds, rate, jax.random.fold_in(key, number))
        return tables, (sums[0], sums[1])

    numbers = jnp.arange(rates.shape[0], dtype=jnp.uint32)
    tables, (losses, pairs) = jax.lax.scan(step, tables, (streams, rates, numbers))
    return tables, losses.sum(), pairs.sum()
