"""`layers.Attention` in every form that a family needs, against the formula written out in float64."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.bias import AlibiBias, DenseBias, RelativeBias, dense_bias
from bestiary.models.layers.attention import Attention
from bestiary.models.layers.positions import RelativePositions, rotate

B, L, E, H, D = 2, 7, 8, 2, 6
ROWS = jnp.zeros(B, jnp.uint32)
HIDDEN = jax.random.normal(jax.random.key(1), (B, L, E))


def make(**settings: Any) -> Attention:
    return Attention(E, H, 0.0, nn.initializers.normal(0.5), head_size=D, **settings)


def drawn(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    """Parameters with biases that are not zero."""
    shapes = nn.unbox(jax.eval_shape(partial(module.init, **named), jax.random.key(0), *arguments))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(scale=0.5, size=leaf.shape), jnp.float32), shapes)


def by_hand(
    params: Any,
    seen: np.ndarray,
    scale: float = D**-0.5,
    bias: np.ndarray | float = 0.0,
    turn: Any = lambda vectors: vectors,
) -> np.ndarray:
    """seen: bool [1 or B, L, L]; bias: [H, L, L]; turn: [B, L, H, D] float64 to the same."""
    tree = jax.tree.map(np.float64, params)
    hidden = np.asarray(HIDDEN, np.float64)

    def project(name: str) -> np.ndarray:
        return np.einsum("ble,ehd->blhd", hidden, tree[name]["kernel"]) + tree[name].get("bias", 0.0)

    scores = scale * np.einsum("blhd,bshd->bhls", turn(project("query")), turn(project("key"))) + bias
    weights = np.where(seen[:, None], np.exp(scores), 0.0)
    weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    attended = np.einsum("bhls,bshd->blhd", weights, project("value"))
    return np.einsum("blhd,hde->ble", attended, tree["out"]["kernel"]) + tree["out"].get("bias", 0.0)


def apply(module: Attention, params: Any, segment_ids: Any = None, **named: Any) -> jax.Array:
    return module.apply({"params": params}, HIDDEN, segment_ids, ROWS, deterministic=True, **named)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (1, 1), (2, 0), (2, 2), (L, L), (None, 1)])
def test_a_window_counts_the_tokens_beside_the_querys_own(window: Any, causal: bool) -> None:
    module = make(window=window, causal=causal)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    segments = np.array([[1] * 4 + [2] * 3, [1] * 5 + [0] * 2])
    distance = np.arange(L)[None, :] - np.arange(L)[:, None]
    left, right = (L if side is None else side for side in window)
    seen = (-left <= distance) & (distance <= (0 if causal else right))
    seen = seen[None] & (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, :, None]
    found = apply(module, params, jnp.asarray(segments))
    np.testing.assert_allclose(found, by_hand(params, seen), atol=2e-6)


def turned(vectors: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Channels i and i + D/2 as a complex number, times exp(√-1 · position · theta^(-2i/D))."""
    half = D // 2
    numbers = vectors[..., :half] + 1j * vectors[..., half:]
    numbers = numbers * np.exp(1j * positions[:, :, None, None] * theta ** (-2 * np.arange(half) / D))
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
def test_rotary_positions_are_complex_rotations(theta: float) -> None:
    module = make(rotary=theta)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    positions = np.arange(L)[None]
    expected = by_hand(params, np.ones((1, L, L), bool), turn=lambda x: turned(x, positions, theta))
    np.testing.assert_allclose(apply(module, params), expected, atol=2e-6)
    np.testing.assert_allclose(apply(module, params, position_ids=jnp.asarray(positions)), expected, atol=2e-6)
    # Of a rotation only differences of positions count: so packed rows need not start again at 0, but may.
    np.testing.assert_allclose(apply(module, params, position_ids=jnp.arange(L)[None] + 100), expected, atol=2e-5)


def test_rotation_is_computed_in_float32() -> None:
    vectors = jax.random.normal(jax.random.key(0), (1, 1, H, D)).astype(jnp.bfloat16)
    found = rotate(vectors, jnp.array([[3001]]), 10_000.0)
    expected = turned(np.asarray(vectors, np.float64), np.array([[3001]]), 10_000.0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("settings", [{"rotary": 10_000.0}, {"window": (2, 1)}, {"rotary": 10_000.0, "window": (1, 1)}])
def test_packed_examples_are_as_each_alone(settings: Any) -> None:
    module = make(**settings)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    packed = apply(module, params, jnp.array([[1] * 4 + [2] * 3] * B), position_ids=jnp.array([[0, 1, 2, 3, 0, 1, 2]]))
    for part in (slice(0, 4), slice(4, 7)):
        alone = jax.jit(partial(module.apply, deterministic=True))({"params": params}, HIDDEN[:, part], None, ROWS)
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)


@pytest.mark.parametrize("settings", [{"use_bias": False}, {"use_bias": False, "out_bias": False, "scale": 1.0}])
def test_projections_without_biases_and_unscaled_scores(settings: Any) -> None:
    """GPT-Neo's (a bias on the output alone) and T5's (none), whose scores are not scaled."""
    module = make(**settings)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    assert [name for name, part in params.items() if "bias" in part] == (["out"] if "scale" not in settings else [])
    expected = by_hand(params, np.ones((1, L, L), bool), settings.get("scale", D**-0.5))
    np.testing.assert_allclose(apply(module, params), expected, atol=1e-5)


def test_a_relative_bias_and_its_gradient() -> None:
    """The table's gradient through the module is that of the same bias written out."""
    positions = RelativePositions(H, True, nn.initializers.normal(1.0), buckets=8, max_distance=6)
    table = nn.unbox(positions.init(jax.random.key(3)))["params"]["table"]
    module = make(scale=1.0)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)

    def total(table: jax.Array, dense: bool) -> jax.Array:
        bias: Any = positions.apply({"params": {"table": table}})
        assert isinstance(bias, RelativeBias)
        return jnp.sin(apply(module, params, bias=DenseBias(dense_bias(bias, L, L)) if dense else bias)).sum()

    value, gradient = jax.value_and_grad(total)(table, False)
    expected, wanted = jax.value_and_grad(total)(table, True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
    assert np.abs(gradient).max() > 1e-3
    written = np.asarray(dense_bias(RelativeBias(table, True, 6), L, L), np.float64)[0]
    found = apply(module, params, bias=RelativeBias(table, True, 6))
    np.testing.assert_allclose(found, by_hand(params, np.ones((1, L, L), bool), 1.0, written), atol=2e-5)


def test_alibi_is_a_penalty_on_distance() -> None:
    module = make(causal=True)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    slopes = np.array([0.5, 0.25], np.float32)
    distance = np.abs(np.arange(L)[None, :] - np.arange(L)[:, None])
    expected = by_hand(params, np.tril(np.ones((1, L, L), bool)), bias=-slopes[:, None, None] * distance)
    np.testing.assert_allclose(apply(module, params, bias=AlibiBias(jnp.asarray(slopes))), expected, atol=2e-6)


@pytest.mark.parametrize("rotary", [None, 10_000.0])
def test_chosen_queries_are_as_among_all(rotary: float | None) -> None:
    module = make(rotary=rotary)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    segments = jnp.array([[1] * 4 + [2] * 3, [1] * 5 + [0] * 2])
    chosen = jnp.array([[0, 4], [0, 3]])
    taken = jnp.take_along_axis(HIDDEN, chosen[..., None], axis=1)
    found = module.apply(
        {"params": params}, taken, segments, ROWS, memory=HIDDEN, query_positions=chosen, deterministic=True
    )
    expected = jnp.take_along_axis(apply(module, params, segments), chosen[..., None], axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("settings", [{"causal": True}, {"window": (1, 1)}])
def test_chosen_queries_have_no_place_in_the_row(settings: Any) -> None:
    module = make(**settings)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    with pytest.raises(NotImplementedError, match="query_positions with causal, window or bias"):
        apply(module, params, memory=HIDDEN, query_positions=jnp.zeros((B, L), jnp.int32))


def test_rotary_attention_to_another_sequence_is_refused() -> None:
    module = make(rotary=10_000.0)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    with pytest.raises(NotImplementedError, match="rotary attention to another sequence"):
        apply(module, params, memory=HIDDEN)


@pytest.mark.parametrize("rotary", [None, 10_000.0])
def test_steps_give_what_the_whole_row_gives(rotary: float | None) -> None:
    """One beam a row, token by token, with a bias, a scale, a window, a head size and no biases of projections."""
    module = make(causal=True, rotary=rotary, scale=0.7, use_bias=False, window=(3, 0))
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    bias = RelativeBias(jax.random.normal(jax.random.key(4), (8, H)), False, 6)
    expected = apply(module, params, bias=bias)
    written = dense_bias(bias, L, L)
    keys, values = jnp.zeros((B, H, D, L)), jnp.zeros((B, H, L, D))
    write, step = (jax.jit(partial(module.apply, {"params": params}, method=name)) for name in ("write", "step"))
    for at in range(L):
        token, place = HIDDEN[:, at : at + 1], jnp.full((B, 1), at)
        keys, values = write(token, keys, values, place, place)
        mask = jnp.broadcast_to((jnp.arange(L) <= at) & (jnp.arange(L) >= at - 3), (B, 1, L))
        given = (token, keys, values, mask, place, written[:, :, at : at + 1])
        found, _ = step(*given)
        np.testing.assert_allclose(found[:, 0], expected[:, at], atol=2e-6)


def test_a_rotary_step_needs_positions() -> None:
    module = make(rotary=10_000.0)
    params = drawn(module, HIDDEN, None, ROWS, deterministic=True)
    empty = jnp.zeros((B, H, D, L)), jnp.zeros((B, H, L, D))
    with pytest.raises(ValueError, match="position_ids: expected int"):
        module.apply({"params": params}, HIDDEN[:, :1], *empty, jnp.zeros((B, 1), jnp.int32), method="write")
