"""Optimisers against their papers' formulas, and the learning rate's course."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.train.config import OptimConfig
from bestiary.train.errors import RunError
from bestiary.train.optim import decay_mask, optimizer, schedule


def tree(rng: np.random.Generator) -> dict:
    return {
        "layers": {"kernel": rng.normal(size=(3, 4, 5)), "bias": rng.normal(size=(3, 5)), "scale": np.ones((3, 5))},
        "embedding": rng.normal(size=(7, 4)),
    }


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree(rng))
    gradients = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree(rng)) for _ in range(3)]
    stacked = {"layers": dict.fromkeys(("kernel", "bias", "scale"), True), "embedding": False}
    return params, gradients, stacked


def reference(config: OptimConfig, params, gradients, rates):
    """The update rule in float64 NumPy, layer by layer, from the papers."""
    flat = {
        "/".join(str(k.key) for k in path): np.float64(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    first = {name: np.zeros_like(value) for name, value in flat.items()}
    second = {name: np.zeros_like(value) for name, value in flat.items()}
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        leaves = jax.tree_util.tree_leaves_with_path(gradient)
        grads = {"/".join(str(k.key) for k in path): np.float64(leaf) for path, leaf in leaves}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, weight in flat.items():
            gradient_ = grads[name] * shrink
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient_
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient_**2
            mean = first[name] / (1 - config.beta1**number)
            spread = second[name] / (1 - config.beta2**number)
            update = mean / (np.sqrt(spread) + config.epsilon)
            decays = name.endswith(("kernel", "embedding"))
            if decays:
                update = update + config.weight_decay * weight
            if decays and config.optimizer == "lamb":
                slices = range(len(weight)) if name.startswith("layers") else [slice(None)]
                for one in slices:
                    update[one] *= np.linalg.norm(weight[one]) / np.linalg.norm(update[one])
            flat[name] = weight - rate * update
    return flat


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_equal_the_formula(problem, name, clip):
    params, gradients, stacked = problem
    config = OptimConfig(
        optimizer=name, learning_rate=0.1, weight_decay=0.1, clip_norm=clip, warmup=0.34, decay="linear"
    )
    rate = schedule(config, [(3, None)])
    transform = optimizer(config, rate, stacked)
    expected = reference(config, params, gradients, [float(rate(step)) for step in range(3)])
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wanted = expected["/".join(str(key.key) for key in path)]
        np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=2e-6)


def test_a_parameter_of_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="'gate'"):
        decay_mask({"layer": {"gate": jnp.ones(2)}})


def test_warm_up_then_decay():
    config = OptimConfig(learning_rate=1.0, warmup=10, decay="linear")
    rate = schedule(config, [(110, None)])
    assert float(rate(0)) == pytest.approx(0.1)
    assert float(rate(9)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(0.5)
    assert float(rate(110)) == 0.0
    cosine = schedule(OptimConfig(learning_rate=1.0, warmup=10, decay="cosine"), [(110, None)])
    assert float(cosine(35)) == pytest.approx(0.5 * (1 + np.cos(np.pi / 4)))
    constant = schedule(OptimConfig(learning_rate=1.0, warmup=10, decay="constant"), [(110, None)])
    assert float(constant(109)) == 1.0
    share = schedule(OptimConfig(learning_rate=1.0, warmup=0.1, decay="constant"), [(100, None)])
    assert float(share(4)) == pytest.approx(0.5)


def test_a_cool_down_ends_any_course_at_zero():
    config = OptimConfig(learning_rate=1.0, warmup=20, decay="inverse_sqrt", cooldown=0.25)
    rate, whole = (schedule(c, [(100, None)]) for c in (config, dataclasses.replace(config, cooldown=0.0)))
    assert [float(rate(step)) for step in (5, 50, 80)] == [float(whole(step)) for step in (5, 50, 80)]
    assert float(rate(90)) == pytest.approx(float(whole(90)) / 2)
    assert float(rate(99)) == pytest.approx(float(whole(99)) / 20)
    with pytest.raises(RunError, match="20 steps and cooldown 90, but the phase has 100"):
        schedule(OptimConfig(warmup=20, cooldown=90), [(100, None)])


def test_phases_go_on_or_warm_up_anew():
    config = OptimConfig(learning_rate=1.0, warmup=0.1)
    through = schedule(config, [(90, None), (10, None)])
    whole = schedule(config, [(100, None)])
    assert [float(through(step)) for step in (0, 50, 95)] == [float(whole(step)) for step in (0, 50, 95)]
    anew = schedule(config, [(90, None), (10, 0.5)])
    assert float(anew(89)) == pytest.approx(1 - (89 - 9) / 81)
    assert float(anew(90)) == pytest.approx(0.5)
    assert float(anew(99)) == pytest.approx(0.5 * (1 - 8 / 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=0.0), "--learning-rate is 0.0; it must be above 0."),
        (dict(beta2=1.0), "--beta2 is 1.0"),
        (dict(weight_decay=-1.0), "--weight-decay is -1.0"),
        (dict(learning_rate=float("nan")), "--learning-rate is nan"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(RunError, match=message):
        OptimConfig(**changes)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(RunError, match="20 steps, but the phase has 10"):
        schedule(OptimConfig(warmup=20), [(10, None)])
