"""Optimisers against their papers' formulas, and the learning rate's course."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bestiary.train.config import OptimConfig, Optimizer
from bestiary.train.errors import RunError
from bestiary.train.optim.optimizer import bias_correction, decay_mask, optimizer
from bestiary.train.optim.schedule import schedule


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
    specs = {
        "layers": {"kernel": P("layers", "embed", "mlp"), "bias": P("layers", "mlp"), "scale": P("layers", "mlp")},
        "embedding": P("vocab", "embed"),
    }
    return params, gradients, specs


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
            mean, spread = first[name], second[name]
            if config.bias_correction:
                mean, spread = mean / (1 - config.beta1**number), spread / (1 - config.beta2**number)
            update = mean / (np.sqrt(spread) + config.epsilon)
            if config.optimizer == "sgd":  # heavy-ball momentum: v = b v + g, whose moving mean is (1 - b) v
                update = first[name] / (1 - config.beta1)
            decays = name.endswith(("kernel", "embedding") if config.decay_embeddings else "kernel")
            strength = config.weight_decay / (config.learning_rate if config.independent_decay else 1)
            if decays:
                update = update + strength * weight
            for one in range(len(weight)) if name.startswith("layers") else [slice(None)]:
                if config.optimizer == "stable-adamw":
                    rms = np.sqrt(np.mean(gradient_[one] ** 2 / np.maximum(spread[one], config.epsilon**2)))
                    update[one] /= max(1.0, rms)
                if decays and config.optimizer == "lamb":
                    update[one] *= np.linalg.norm(weight[one]) / np.linalg.norm(update[one])
            flat[name] = weight - rate * update
    return flat


@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer="adamw", clip_norm=0.0),
        dict(optimizer="adamw", clip_norm=0.5),
        dict(optimizer="adamw", independent_decay=True, decay_embeddings=False),
        dict(optimizer="stable-adamw", clip_norm=0.0, independent_decay=True, decay_embeddings=False),
        dict(optimizer="adamw", bias_correction=False),
        dict(optimizer="lamb", clip_norm=0.5),
        dict(optimizer="sgd", clip_norm=0.5),
        dict(optimizer="lamb", bias_correction=False),
        dict(optimizer="stable-adamw", clip_norm=0.0, beta2=0.9),
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_updates_equal_the_formula(problem, changes):
    params, gradients, specs = problem
    config = OptimConfig(learning_rate=0.1, weight_decay=0.1, warmup=0.34, schedule="linear", **changes)
    rate = schedule(config, [(3, None)])
    transform = optimizer(config, rate, specs)
    expected = reference(config, params, gradients, [float(rate(step)) for step in range(3)])
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wanted = expected["/".join(str(key.key) for key in path)]
        np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=2e-6)


SIZES = {  # of one layer: a map to heads, one back, its bias, a norm's scale; in a stack of three
    "query": ("kernel", (130, 2, 66), ("embed", "heads", "head_dim")),
    "out": ("kernel", (2, 66, 130), ("heads", "head_dim", "embed")),
    "inner": ("bias", (12,), ("mlp",)),
    "norm": ("scale", (130,), ("embed",)),
}


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_stacked_layers_are_updated_as_single_ones(name):
    """From the same gradients, whatever an optimiser reduces over a tensor: to 1e-6, over several steps."""
    rng = np.random.default_rng(0)
    config = OptimConfig(optimizer=name, learning_rate=0.05, weight_decay=0.1, warmup=0, schedule="constant")

    def draw(scale):
        each = {  # layers of different sizes
            part: {kind: [rng.normal(size=shape) * scale * size for size in (1.0, 7.0, 0.1)]}
            for part, (kind, shape, _) in SIZES.items()
        }
        stacks = {
            part: {kind: jnp.asarray(np.stack(of), jnp.float32) for kind, of in v.items()} for part, v in each.items()
        }
        return stacks | {"word": {"embedding": jnp.asarray(rng.normal(size=(140, 130)), jnp.float32)}}

    def single(tree):
        layers = [{part: jax.tree.map(lambda leaf, n=n: leaf[n], tree[part]) for part in SIZES} for n in range(3)]
        return {**{str(n): layer for n, layer in enumerate(layers)}, "word": tree["word"]}

    word = {"word": {"embedding": P("vocab", "embed")}}
    layer = {part: {kind: P(*axes)} for part, (kind, _, axes) in SIZES.items()}
    stack = {part: {kind: P("layers", *axes)} for part, (kind, _, axes) in SIZES.items()}
    given, gradients = draw(0.3), [draw(scale) for scale in (1.0, 3.0, 0.1)]

    def trained(specs, params, gradients):
        transform = optimizer(config, schedule(config, [(3, None)]), specs)

        @jax.jit
        def step(params, state, gradient):
            updates, state = transform.update(gradient, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        state = jax.jit(transform.init)(params)
        for gradient in gradients:
            params, state = step(params, state, gradient)
        return params

    found = trained({**stack, **word}, given, gradients)
    expected = trained({**{str(n): layer for n in range(3)}, **word}, single(given), [single(g) for g in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), single(found), expected)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True))


def test_muon_makes_a_layers_matrix_orthogonal():
    """Also of a map to several heads; each entry moves about as far as by Adam. Norms, biases and words have Adam."""
    rng = np.random.default_rng(0)
    params = {"query": {"kernel": jnp.asarray(rng.normal(size=(2, 24, 4, 4)), jnp.float32)}}
    specs = {"query": {"kernel": P("layers", "embed", "heads", "head_dim")}}
    config = OptimConfig(optimizer="muon", learning_rate=1.0, warmup=0, weight_decay=0.0, clip_norm=0.0)
    transform = optimizer(config, lambda _: jnp.float32(1), specs)
    updates, _ = transform.update(params, transform.init(params), params)
    for layer in np.asarray(updates["query"]["kernel"]).reshape(2, 24, 16):
        sizes = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(24))
        assert sizes.min() > 0.5
        assert sizes.max() < 1.3


def test_adafactor_keeps_factors_of_each_layers_matrix():
    """Rows and columns instead of entries, for a map to heads too; a relative step, and an RMS of at most 1."""
    rng = np.random.default_rng(0)
    params = {"query": {"kernel": jnp.asarray(rng.normal(size=(2, 130, 2, 66)) * 0.5, jnp.float32)}}
    specs = {"query": {"kernel": P("layers", "embed", "heads", "head_dim")}}
    config = OptimConfig(optimizer="adafactor", learning_rate=0.1, warmup=0, weight_decay=0.0, clip_norm=0.0)
    transform = optimizer(config, lambda _: jnp.float32(0.1), specs)
    state = transform.init(params)
    assert sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 8) == [2 * 130, 2 * 132]
    gradient = jax.tree.map(lambda leaf: leaf * 1e-3, params)
    updates, _ = transform.update(gradient, state, params)
    squares = np.square(np.asarray(gradient["query"]["kernel"], np.float64)).reshape(2, 130, 132)
    for found, matrix, square in zip(
        np.asarray(updates["query"]["kernel"]).reshape(2, 130, 132),
        np.asarray(params["query"]["kernel"], np.float64).reshape(2, 130, 132),
        squares,
        strict=True,
    ):
        spread = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
        step = 1e-3 * matrix / np.sqrt(spread)
        step /= max(1.0, np.sqrt(np.mean(step**2)))
        np.testing.assert_allclose(found, -0.1 * np.sqrt(np.mean(matrix**2)) * step, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_bias_correction_is_exact_from_the_first_step(beta):
    for count in (1, 2, 30, 10_000):
        assert float(bias_correction(beta, jnp.int32(count))) == pytest.approx(1 - beta**count, rel=3e-7)


def test_bias_correction_goes_with_adam():
    with pytest.raises(RunError, match="--no-bias-correction goes with --optimizer adamw or lamb, not muon"):
        OptimConfig(optimizer="muon", bias_correction=False)


def test_warm_up_stable_decay():
    config = OptimConfig(learning_rate=1.0, warmup=10, schedule="wsd", cooldown=50)
    rate = schedule(config, [(60, None), (50, None)])
    assert float(rate(4)) == pytest.approx(0.5)
    assert [float(rate(step)) for step in (9, 30, 60)] == [1.0] * 3
    assert float(rate(60 + 8)) == pytest.approx(1 - np.sqrt(8 / 50))
    assert float(rate(109)) == pytest.approx(1 - np.sqrt(49 / 50), rel=1e-5)
    usual = schedule(OptimConfig(learning_rate=1.0, warmup=0, schedule="wsd"), [(100, None)])
    assert [float(usual(step)) for step in (0, 90)] == [1.0] * 2
    assert float(usual(95)) == pytest.approx(1 - np.sqrt(0.5))


def test_a_parameter_of_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="'gate'"):
        decay_mask({"layer": {"gate": jnp.ones(2)}})


def test_warm_up_then_decay():
    config = OptimConfig(learning_rate=1.0, warmup=10, schedule="linear")
    rate = schedule(config, [(110, None)])
    assert float(rate(0)) == pytest.approx(0.1)
    assert float(rate(9)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(0.5)
    assert float(rate(110)) == 0.0
    cosine = schedule(OptimConfig(learning_rate=1.0, warmup=10, schedule="cosine"), [(110, None)])
    assert float(cosine(35)) == pytest.approx(0.5 * (1 + np.cos(np.pi / 4)))
    constant = schedule(OptimConfig(learning_rate=1.0, warmup=10, schedule="constant"), [(110, None)])
    assert float(constant(109)) == 1.0
    share = schedule(OptimConfig(learning_rate=1.0, warmup=0.1, schedule="constant"), [(100, None)])
    assert float(share(4)) == pytest.approx(0.5)


def test_a_cool_down_ends_any_course_at_zero():
    config = OptimConfig(learning_rate=1.0, warmup=20, schedule="inverse_sqrt", cooldown=0.25)
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
