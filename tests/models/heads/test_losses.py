"""Losses against their formulas, and what weights of zero leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.heads import losses
from bestiary.models.layers.segments import gather_positions


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def reference(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cross_entropy_and_its_gradient(scale: float) -> None:
    logits, labels, weights = scale * draw(3, 5, 17), jnp.arange(15).reshape(3, 5), draw(3, 5, seed=1)
    found, hits = losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(found, reference(logits, labels), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(hits, logits.argmax(-1) == labels)
    ours = jax.grad(lambda x: (losses.cross_entropy(x, labels)[0] * weights).sum())(logits)
    theirs = jax.grad(lambda x: (reference(x, labels) * weights).sum())(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_cross_entropy_of_bfloat16_is_computed_in_float32() -> None:
    logits, labels = draw(64, 33).astype(jnp.bfloat16), jnp.zeros(64, jnp.int32)
    found, _ = losses.cross_entropy(logits, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(logits.astype(jnp.float32), labels), rtol=1e-6)
    assert jax.grad(lambda x: losses.cross_entropy(x, labels)[0].sum())(logits).dtype == jnp.bfloat16


def test_prediction_sums_leave_out_what_has_no_weight() -> None:
    logits, labels = draw(2, 4, 9), jnp.array([[1, 2, 0, 0], [3, losses.IGNORED_LABEL, 5, 8]])
    weights = jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 0]])
    kept = jnp.array([[1.0, 1, 0, 0], [1, 0, 1, 0]])
    each = reference(logits, jnp.maximum(labels, 0))
    sums = losses.prediction_sums(logits, labels, weights)
    np.testing.assert_allclose(sums.loss, (each * kept).sum(), rtol=1e-6)
    assert float(sums.weight) == 4
    assert float(sums.correct) == ((logits.argmax(-1) == labels).astype(jnp.float32) * kept).sum()
    found = losses.class_losses(logits, labels, weights)
    assert found == {"loss": (sums.loss, sums.weight), "accuracy": (sums.correct, sums.weight)}
    gradient = jax.grad(lambda x: losses.class_losses(x, labels, weights)["loss"].total)(logits)
    np.testing.assert_array_equal((gradient != 0).any(-1), kept == 1)


def test_sums_add_up_over_parts() -> None:
    logits, labels = draw(6, 5), jnp.arange(6) % 5
    whole = losses.class_losses(logits, labels)["loss"]
    parts = [losses.class_losses(logits[i : i + 2], labels[i : i + 2])["loss"] for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(p.total for p in parts), whole.total, rtol=1e-6)
    assert sum(float(p.weight) for p in parts) == float(whole.weight) == 6


def test_a_span_outside_of_the_row_counts_for_nothing() -> None:
    start, end = draw(3, 7), draw(3, 7, seed=1)
    starts, ends = jnp.array([[1], [9], [3]]), jnp.array([[2], [7], [6]])
    first, last = losses.span_sums(start, end, starts, ends)
    assert (float(first.weight), float(last.weight)) == (2, 2)
    np.testing.assert_allclose(first.loss, reference(start, jnp.array([1, 0, 3]))[jnp.array([0, 2])].sum(), rtol=1e-6)


def test_a_span_is_chosen_from_its_own_window() -> None:
    """Two windows in one row give the losses of two rows."""
    start, end = draw(1, 9), draw(1, 9, seed=1)
    starts, ends = jnp.array([[1, 5]]), jnp.array([[3, 8]])
    windows = jnp.stack([jnp.arange(9) < 4, jnp.arange(9) >= 4])[None]
    both = losses.span_sums(start, end, starts, ends, jnp.array([[1.0, 0.5]]), windows)
    first = losses.span_sums(start[:, :4], end[:, :4], starts[:, :1], ends[:, :1])
    second = losses.span_sums(start[:, 4:], end[:, 4:], starts[:, 1:] - 4, ends[:, 1:] - 4)
    for together, one, other in zip(both, first, second, strict=True):
        np.testing.assert_allclose(together.loss, one.loss + 0.5 * other.loss, rtol=1e-6)
        assert float(together.weight) == 1.5


def test_a_sequence_loss_follows_its_problem_type() -> None:
    logits = draw(4, 3)
    yes = (draw(4, 3, seed=1) > 0).astype(jnp.float32)
    np.testing.assert_allclose(
        losses.sequence_losses(None, logits, yes)["loss"].total,
        -(yes * jax.nn.log_sigmoid(logits) + (1 - yes) * jax.nn.log_sigmoid(-logits)).sum(),
        rtol=1e-6,
    )
    assert float(losses.sequence_losses(None, logits, yes)["loss"].weight) == 12
    np.testing.assert_allclose(
        losses.sequence_losses("regression", logits, yes)["loss"].total, jnp.square(logits - yes).sum(), rtol=1e-6
    )
    assert float(losses.sequence_losses(None, logits[:, :1], yes[:, 0])["loss"].weight) == 4
    classes = jnp.array([0, 1, 2, 0])
    np.testing.assert_allclose(
        losses.sequence_losses(None, logits, classes)["loss"].total, reference(logits, classes).sum(), rtol=1e-6
    )


def test_positions_outside_of_the_row_give_nan() -> None:
    hidden = draw(2, 4, 3)
    taken = gather_positions(hidden, jnp.array([[3, 0], [4, 1]]))
    np.testing.assert_array_equal(taken[0], hidden[0, jnp.array([3, 0])])
    assert jnp.isnan(taken[1, 0]).all()
    assert not jnp.isnan(taken[1, 1]).any()
