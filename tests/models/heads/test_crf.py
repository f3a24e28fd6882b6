"""The CRF against the sum and the maximum over every sequence of tags, written out in float64."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.encoders.bert import FAMILY, BertConfig
from bestiary.models.heads.crf import CrfWeights, constrained, decode, legal_steps, log_likelihood

NAMES = ("O", "B-a", "I-a", "B-b", "I-b")
C = len(NAMES)

# Chains of 3, 1 and 4 tagged positions and one of another row; a dot is passed over, in and between the chains.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 0, 0], [2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 12], np.int32)
TAGGED = np.array([[0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 12], bool)


def chains(row: int) -> list[list[int]]:
    """The tagged positions of each segment."""
    numbers = [s for s in dict.fromkeys(SEGMENTS[row].tolist()) if s]
    return [[t for t in range(SEGMENTS.shape[1]) if TAGGED[row, t] and SEGMENTS[row, t] == s] for s in numbers]


def score(weights: CrfWeights, emissions: np.ndarray, tags: tuple[int, ...]) -> float:
    """The formula of one chain, emissions [n, C]."""
    total = weights.start[tags[0]] + weights.end[tags[-1]]
    total += sum(emissions[t, tag] for t, tag in enumerate(tags))
    return float(total + sum(weights.transitions[a, b] for a, b in itertools.pairwise(tags)))


def every_sequence(length: int, legal: bool) -> list[tuple[int, ...]]:
    begins, steps = legal_steps(NAMES)
    return [
        tags
        for tags in itertools.product(range(C), repeat=length)
        if not legal or (begins[tags[0]] and all(steps[a, b] for a, b in itertools.pairwise(tags)))
    ]


@pytest.fixture(scope="module")
def drawn() -> tuple[CrfWeights, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    weights = CrfWeights(*(random.normal(0, 2, shape) for shape in ((C,), (C, C), (C,))))
    return weights, random.normal(0, 2, (*SEGMENTS.shape, C)), random.integers(0, C, SEGMENTS.shape, np.int32)


@pytest.mark.parametrize("legal", [False, True])
def test_likelihood_and_best_tags_are_those_of_all_sequences(drawn, legal):
    weights, emissions, tags = drawn
    if legal:
        tags = np.where(np.isin(tags, (2, 4)), 0, tags)  # no I-x, so every given sequence is legal
    with jax.enable_x64(True):
        used = CrfWeights(*map(jnp.asarray, weights))
        used = constrained(used, NAMES) if legal else used
        found = jax.jit(log_likelihood)(used, emissions, tags, SEGMENTS, TAGGED)
        best = np.asarray(jax.jit(decode)(used, emissions, SEGMENTS, TAGGED))
    assert found.dtype == np.float64
    for row in range(len(SEGMENTS)):
        expected = 0.0
        for places in chains(row):
            options = every_sequence(len(places), legal)
            scores = np.array([score(weights, emissions[row, places], option) for option in options])
            given = score(weights, emissions[row, places], tuple(tags[row, places]))
            expected += given - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
            assert tuple(best[row, places]) == options[int(scores.argmax())]
        np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-12)
    assert not best[~TAGGED].any()


def test_chains_do_not_cross_segments(drawn):
    """What stands in a chain's own segment decides alone: no gradient from another, nor from what is passed over."""
    weights, emissions, tags = drawn
    emissions = jnp.asarray(emissions)
    first = TAGGED & (SEGMENTS == 1)

    @jax.jit
    def of_first_row(emissions):
        return log_likelihood(CrfWeights(*map(jnp.asarray, weights)), emissions, tags, SEGMENTS, first)[0]

    alone = of_first_row(emissions)
    others = jnp.where(first[:, :, None], emissions, 1e6)
    assert of_first_row(others) == alone
    gradient = jax.jit(jax.grad(of_first_row))(emissions)
    assert np.asarray(gradient)[first].any()
    assert not np.asarray(gradient)[~first].any()


def test_gradients_under_constraints_are_finite_and_zero_for_what_is_forbidden(drawn):
    weights, emissions, tags = drawn

    def loss(weights):
        legal = np.where(np.isin(tags, (2, 4)), 0, tags)
        return -log_likelihood(constrained(weights, NAMES), emissions, legal, SEGMENTS, TAGGED).sum()

    gradient = jax.jit(jax.grad(loss))(CrfWeights(*(jnp.asarray(weight, jnp.float32) for weight in weights)))
    begins, steps = legal_steps(NAMES)
    assert all(np.isfinite(part).all() for part in gradient)
    assert not np.asarray(gradient.transitions)[~steps].any()
    assert not np.asarray(gradient.start)[~begins].any()
    assert np.asarray(gradient.transitions)[steps].all()


def test_new_weights_leave_the_linear_head_as_it_is(drawn):
    _, emissions, tags = drawn
    zero = CrfWeights(jnp.zeros(C), jnp.zeros((C, C)), jnp.zeros(C))
    expected = np.take_along_axis(jax.nn.log_softmax(emissions, axis=-1), tags[..., None], axis=-1)[..., 0]
    found = jax.jit(log_likelihood)(zero, emissions, tags, SEGMENTS, TAGGED)
    np.testing.assert_allclose(found, (np.asarray(expected) * TAGGED).sum(axis=1), atol=1e-4)
    assert (jax.jit(decode)(zero, emissions, SEGMENTS, TAGGED) == np.where(TAGGED, emissions.argmax(axis=-1), 0)).all()


def test_a_checkpoint_keeps_the_transitions(tmp_path):
    config = BertConfig(
        vocab_size=20, width=32, layers=2, heads=2, feed_forward=64, positions=16, num_labels=C, label_names=NAMES
    )
    plain = FAMILY.build("tokens", config)
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.tree.map(np.asarray, nn.unbox(jax.jit(plain.init)(jax.random.key(0), ids))["params"])
    models.save(tmp_path / "plain", plain, params)
    made = models.load(tmp_path / "plain", head="crf")
    assert made.model.head == "crf"
    assert not made.params["crf"]["transitions"].any()
    made.params["crf"] = {"start": np.arange(5.0), "transitions": np.arange(25.0).reshape(5, 5), "end": -np.arange(5.0)}
    models.save(tmp_path / "crf", made.model, made.params)
    again = models.load(tmp_path / "crf")
    assert again.model.head == "crf"
    assert again.config.label_names == NAMES
    for name, weight in made.params["crf"].items():
        np.testing.assert_array_equal(again.params["crf"][name], weight)
    np.testing.assert_array_equal(
        jax.jit(again.model.apply)({"params": again.params}, ids), jax.jit(plain.apply)({"params": params}, ids)
    )
    # Without the CRF its tensors are of no use, which is no error.
    without = models.load(tmp_path / "crf", head="tokens")
    assert "crf" not in without.params
    np.testing.assert_array_equal(without.params["classifier"]["kernel"], params["classifier"]["kernel"])
