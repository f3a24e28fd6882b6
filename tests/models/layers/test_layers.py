"""What the families share: products with gradients of their own, activations, dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.layers.activations import ACTIVATIONS, gelu_exact
from bestiary.models.layers.attention import Attention
from bestiary.models.layers.dropout import Dropout
from bestiary.models.layers.feed_forward import FeedForward
from bestiary.models.layers.linear import Embed, Linear, add_bias, matmul, partitioned, turn_kernels
from bestiary.models.layers.norms import LayerNorm, RMSNorm
from bestiary.models.layers.stack import run_layers


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_matmul_in_float32(axis: int, rows: int) -> None:
    x, kernel = draw(2, rows, 8), draw(8, 5, seed=1)
    ours = jax.value_and_grad(lambda x, k: jnp.sin(matmul(x, k, axis, "float32", "float32")).sum(), (0, 1))
    theirs = jax.value_and_grad(lambda x, k: jnp.sin(x @ (k if axis == 0 else k.T)).sum(), (0, 1))
    arguments = (x, kernel if axis == 0 else kernel.T)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours(*arguments), theirs(*arguments)
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 5), (7, 8, 5), (514, 260, 128), (513, 260, 128)])
def test_matmul_in_bfloat16_accumulates_in_float32(axis: int, rows: int, inputs: int, outputs: int) -> None:
    """The products of rounded operands, exactly accumulated: from float64 they differ by float32's rounding alone."""
    x, gradient = draw(rows, inputs).astype(jnp.bfloat16), draw(rows, outputs, seed=2)
    kernel = draw(inputs, outputs, seed=1)

    @jax.jit
    def run(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        result, back = jax.vjp(lambda x, k: matmul(x, k, axis, "bfloat16", "float32"), x, kernel)
        return (result, *back(gradient))

    result, to_x, to_kernel = run(x, kernel if axis == 0 else kernel.T, gradient)
    assert (result.dtype, to_x.dtype, to_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wide_x, wide_kernel, wide_gradient = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, kernel, gradient))
    np.testing.assert_allclose(result, wide_x @ wide_kernel, rtol=1e-5, atol=1e-4)
    expected = wide_x.T @ wide_gradient
    np.testing.assert_allclose(to_kernel, expected if axis == 0 else expected.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.asarray(to_x, np.float64), wide_gradient @ wide_kernel.T, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 300])
def test_turned_kernels_have_the_same_products(rows: int) -> None:
    to_heads = Linear((4, 6), ("embed", "heads", "head_dim"), nn.initializers.normal(1.0))
    from_heads = Linear((5,), ("heads", "head_dim", "embed"), nn.initializers.normal(1.0), use_bias=False)
    hidden = jax.random.normal(jax.random.key(0), (rows, 1, 8))
    query = nn.unbox(to_heads.init(jax.random.key(1), hidden)["params"])
    vectors = to_heads.apply({"params": query}, hidden)
    out = nn.unbox(from_heads.init(jax.random.key(2), vectors)["params"])
    turned = turn_kernels({"query": query, "out": out})
    again = to_heads.apply({"params": turned["query"]}, hidden)
    np.testing.assert_allclose(again, vectors, rtol=1e-5, atol=1e-5)
    expected = from_heads.apply({"params": out}, vectors)
    found = from_heads.apply({"params": turned["out"]}, vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_a_bias_gradient_is_summed_in_float32() -> None:
    x, bias = jnp.zeros((3000, 4), jnp.bfloat16), jnp.zeros(4)
    gradient = jax.grad(lambda b: add_bias(x, b).astype(jnp.float32).sum())(bias)
    np.testing.assert_array_equal(gradient, 3000)  # bfloat16 would stop at 256


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_slope(dtype: jnp.dtype) -> None:
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    exact = x.astype(jnp.float32)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
    value, slope = jax.vmap(jax.value_and_grad(gelu_exact))(x)
    assert value.dtype == slope.dtype == dtype
    expected, expected_slope = jax.vmap(jax.value_and_grad(lambda x: x * jax.scipy.stats.norm.cdf(x)))(exact)
    np.testing.assert_allclose(value.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope.astype(jnp.float32), expected_slope, rtol=tolerance, atol=tolerance)


def test_an_unknown_axis_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown logical axes \\['width'\\]"):
        partitioned(jax.nn.initializers.zeros, "width")


def test_the_padding_vector_takes_no_gradient_from_being_looked_up() -> None:
    embed = Embed(5, 3, "vocab", jax.nn.initializers.normal(), padding_id=2)
    table = draw(5, 3)

    def total(table: jax.Array) -> jax.Array:
        return embed.apply({"params": {"embedding": table}}, jnp.array([[0, 2, 2, 4]])).sum()

    np.testing.assert_array_equal(jax.grad(total)(table)[:, 0], [1, 0, 0, 0, 1])


def test_an_id_outside_of_the_table_gives_nan() -> None:
    embed = Embed(5, 3, "vocab", jax.nn.initializers.normal())
    found = embed.apply({"params": {"embedding": draw(5, 3)}}, jnp.array([[4, 5]]))
    assert not jnp.isnan(found[0, 0]).any()
    assert jnp.isnan(found[0, 1]).all()


def test_dropout_follows_the_row_not_its_place() -> None:
    x = jnp.ones((4, 7, 5))
    drop = Dropout(0.5)
    rows = jnp.array([3, 9, 4, 2**31], jnp.uint32)

    def run(x: jax.Array, rows: jax.Array) -> jax.Array:
        return drop.apply({}, x, rows, deterministic=False, rngs={"dropout": jax.random.key(1)})

    whole = run(x, rows)
    np.testing.assert_array_equal(whole[1:3], run(x[1:3], rows[1:3]))
    assert (whole[0] != whole[1]).any()
    assert set(np.unique(whole)) == {0.0, 2.0}
    np.testing.assert_array_equal(drop.apply({}, x, rows, deterministic=True), x)


def test_only_a_layer_of_one_self_attention_is_computed_at_some_positions() -> None:
    """What a second self-attention reads depends on what the first one gives at every position."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, hidden: jax.Array, rows: jax.Array, *, deterministic: bool) -> jax.Array:
            for number in range(2):
                attention = Attention(8, 2, 0.0, nn.initializers.normal(), name=f"attention_{number}")
                hidden += attention(hidden, None, rows, deterministic=deterministic)
            return hidden

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, hidden: jax.Array, positions: jax.Array | None) -> jax.Array:
            mode = {"count": 2, "scan": True, "remat": False, "deterministic": True}
            return run_layers(Twice(), hidden, jnp.zeros(1), last_positions=positions, **mode)[0]

    hidden = draw(1, 3, 8)
    params = Stack().init(jax.random.key(0), hidden, None)
    with pytest.raises(NotImplementedError, match="expected one self-attention, found 2"):
        Stack().apply(params, hidden, jnp.array([[0]]))


def test_norms() -> None:
    x, scale = draw(3, 5) + 1, jnp.arange(1.0, 6.0)
    wide = np.float64(x)
    rms = RMSNorm(1e-3).apply({"params": {"scale": scale}}, x)
    expected = np.arange(1, 6) * wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(rms, expected, rtol=1e-5)
    plain = LayerNorm(1e-3, use_bias=False).apply({"params": {"scale": scale}}, x)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    expected = np.arange(1, 6) * centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu"])
def test_a_gated_feed_forward(activation: str, use_bias: bool) -> None:
    module = FeedForward(7, activation, nn.initializers.normal(), gated=True, use_bias=use_bias)
    x = draw(2, 3, 5)
    params = jax.tree.map(lambda leaf: draw(*leaf.shape), nn.unbox(module.init(jax.random.key(0), x))["params"])
    assert set(params) == {"inner", "gate", "outer"}
    assert all(("bias" in part) == use_bias for part in params.values())

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + (params[name]["bias"][None, None] if use_bias else 0.0)

    expected = linear("outer", ACTIVATIONS[activation](linear("gate", x)) * linear("inner", x))
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)
