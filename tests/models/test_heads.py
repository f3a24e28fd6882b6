"""Losses against their formulas, and what weights of zero leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models import heads


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def reference(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cross_entropy_and_its_gradient(scale: float) -> None:
    logits, labels, weights = scale * draw(3, 5, 17), jnp.arange(15).reshape(3, 5), draw(3, 5, seed=1)
    losses, hits = heads.cross_entropy(logits, labels)
    np.testing.assert_allclose(losses, reference(logits, labels), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(hits, logits.argmax(-1) == labels)
    ours = jax.grad(lambda x: (heads.cross_entropy(x, labels)[0] * weights).sum())(logits)
    theirs = jax.grad(lambda x: (reference(x, labels) * weights).sum())(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_cross_entropy_of_bfloat16_is_computed_in_float32() -> None:
    logits, labels = draw(64, 33).astype(jnp.bfloat16), jnp.zeros(64, jnp.int32)
    losses, _ = heads.cross_entropy(logits, labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, reference(logits.astype(jnp.float32), labels), rtol=1e-6)
    assert jax.grad(lambda x: heads.cross_entropy(x, labels)[0].sum())(logits).dtype == jnp.bfloat16


def test_prediction_sums_leave_out_what_has_no_weight() -> None:
    logits, labels = draw(2, 4, 9), jnp.array([[1, 2, 0, 0], [3, heads.IGNORED_LABEL, 5, 8]])
    weights = jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 0]])
    kept = jnp.array([[1.0, 1, 0, 0], [1, 0, 1, 0]])
    losses = reference(logits, jnp.maximum(labels, 0))
    sums = heads.prediction_sums(logits, labels, weights)
    np.testing.assert_allclose(sums.loss, (losses * kept).sum(), rtol=1e-6)
    assert float(sums.weight) == 4
    assert float(sums.correct) == ((logits.argmax(-1) == labels) * kept).sum()
    loss = heads.masked_language_model_loss(logits, labels, weights)
    assert (loss.total, loss.weight) == (sums.loss, sums.weight)
    gradient = jax.grad(lambda x: heads.masked_language_model_loss(x, labels, weights).total)(logits)
    np.testing.assert_array_equal((gradient != 0).any(-1), kept == 1)


def test_sums_add_up_over_parts() -> None:
    logits, labels = draw(6, 5), jnp.arange(6) % 5
    whole = heads.classification_loss(logits, labels)
    parts = [heads.classification_loss(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(p.total for p in parts), whole.total, rtol=1e-6)
    assert sum(float(p.weight) for p in parts) == float(whole.weight) == 6


def test_a_span_outside_of_the_window_counts_for_nothing() -> None:
    start, end = draw(3, 7), draw(3, 7, seed=1)
    starts, ends = jnp.array([1, 9, 3]), jnp.array([2, 7, 6])
    first, last = heads.span_loss(start, end, starts, ends)
    assert (float(first.weight), float(last.weight)) == (2, 2)
    np.testing.assert_allclose(first.total, reference(start, jnp.array([1, 0, 3]))[jnp.array([0, 2])].sum(), rtol=1e-6)


def test_a_sequence_loss_follows_its_problem_type() -> None:
    logits = draw(4, 3)
    yes = (draw(4, 3, seed=1) > 0).astype(jnp.float32)
    np.testing.assert_allclose(
        heads.sequence_loss(None, logits, yes).total,
        -(yes * jax.nn.log_sigmoid(logits) + (1 - yes) * jax.nn.log_sigmoid(-logits)).sum(),
        rtol=1e-6,
    )
    assert float(heads.sequence_loss(None, logits, yes).weight) == 12
    np.testing.assert_allclose(
        heads.sequence_loss("regression", logits, yes).total, jnp.square(logits - yes).sum(), rtol=1e-6
    )
    assert float(heads.sequence_loss(None, logits[:, :1], yes[:, 0]).weight) == 4
    classes = jnp.array([0, 1, 2, 0])
    np.testing.assert_allclose(
        heads.sequence_loss(None, logits, classes).total, reference(logits, classes).sum(), rtol=1e-6
    )


def test_positions_outside_of_the_row_give_nan() -> None:
    hidden = draw(2, 4, 3)
    taken = heads.gather_positions(hidden, jnp.array([[3, 0], [4, 1]]))
    np.testing.assert_array_equal(taken[0], hidden[0, jnp.array([3, 0])])
    assert jnp.isnan(taken[1, 0]).all()
    assert not jnp.isnan(taken[1, 1]).any()
