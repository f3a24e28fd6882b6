"""word2vec's updates, against loops over pairs as word2vec.c has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.words.word2vec import (
    Stream,
    Tables,
    Word2VecConfig,
    drawn_against,
    keep_probabilities,
    update,
)

WORDS, WIDTH = 7, 4
IDS = np.array([0, 0, 3, 1, 4, 1, 5, 2, 6, 0, 0])
SENTENCES = np.array([-1, -1, 0, 0, 0, 0, 1, 1, 1, -1, -1])


@pytest.mark.parametrize(("kind", "gradient"), [("skipgram", "sum"), ("cbow", "sum"), ("cbow", "mean")])
def test_a_batch_sums_the_updates_of_its_pairs(kind: str, gradient: str) -> None:
    config = Word2VecConfig(kind, WIDTH, 2, 3, gradient)  # type: ignore[arg-type]
    draw = np.random.default_rng(0)
    inputs, outputs = (draw.normal(size=(WORDS, WIDTH)) * 2 for _ in range(2))
    bounds, key = drawn_against(np.arange(1, WORDS + 1)), jax.random.key(3)
    tables = Tables(jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32))
    stream = Stream(jnp.asarray(IDS, jnp.int32), jnp.asarray(SENTENCES, jnp.int32))
    found, loss, pairs = jax.jit(update, static_argnums=0)(
        config, tables, stream, jnp.asarray(bounds), jnp.float32(0.1), key
    )
    # The same random numbers, and then pair by pair, from the vectors before the batch.
    windows, words = jax.random.split(key)
    reach = np.asarray(jax.random.randint(windows, (7,), 1, 3))
    bits = np.asarray(jax.random.bits(words, (7, 3), jnp.uint32))
    assert set(reach.tolist()) == {1, 2}
    new_inputs, new_outputs, total, count = inputs.copy(), outputs.copy(), 0.0, 0
    for i in range(7):
        at = i + 2
        near = [
            IDS[at + o]
            for o in (-2, -1, 1, 2)
            if abs(o) <= reach[i] and SENTENCES[at + o] == SENTENCES[at] and SENTENCES[at] >= 0
        ]
        drawn = [int((b >= bounds).sum()) for b in bits[i]]
        for group in [[word] for word in near] if kind == "skipgram" else [near] if near else []:
            count += 1
            vector = inputs[group].mean(axis=0)
            for target, label in [(IDS[at], 1), *((word, 0) for word in drawn if word != IDS[at])]:
                logit = vector @ outputs[target]
                chance = 1.0 if logit > 6 else 0.0 if logit < -6 else 1 / (1 + np.exp(-logit))
                total += np.log1p(np.exp(-logit)) if label else np.log1p(np.exp(logit))
                new_outputs[target] += 0.1 * (label - chance) * vector
                share = 0.1 * (label - chance) * outputs[target] / (len(group) if gradient == "mean" else 1)
                for word in group:
                    new_inputs[word] += share
    np.testing.assert_allclose(found.inputs, new_inputs, atol=1e-5)
    np.testing.assert_allclose(found.outputs, new_outputs, atol=1e-5)
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert pairs == count


def test_words_are_drawn_by_their_counts_to_three_quarters() -> None:
    counts = np.array([1000, 100, 10])
    bounds = drawn_against(counts)
    drawn = np.searchsorted(bounds, np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32), side="right")
    share = counts**0.75 / (counts**0.75).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 100_000, share, atol=0.005)


def test_frequent_words_are_left_out_as_in_the_authors_code() -> None:
    keep = keep_probabilities(np.array([900, 99, 1]), 0.01)
    np.testing.assert_allclose(keep[0], (np.sqrt(90) + 1) / 90)
    assert keep[1] < 1 == keep[2]
    assert keep_probabilities(np.array([5]), 0.0) == 1
