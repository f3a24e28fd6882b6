"""Activation functions, by their names in released config.json files."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def gelu_exact(x: Array) -> Array:
    """Compute x·Φ(x) by the error function (Hendrycks and Gimpel 2016), in float32."""
    return _gelu_with_slope(x)[0]


def _gelu_with_slope(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    below = 0.5 * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))  # Φ(x)
    slope = below + wide * jnp.exp(-0.5 * wide * wide) * math.sqrt(0.5 / math.pi)
    return (wide * below).astype(x.dtype), slope.astype(x.dtype)


@gelu_exact.defjvp
def _gelu_exact_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The backward pass keeps only the slope; automatic differentiation would keep several tensors [B, L, F].
    value, slope = _gelu_with_slope(*primals)
    return value, tangents[0] * slope


@jax.custom_jvp
def gelu_tanh(x: Array) -> Array:
    """Compute GELU by the tanh approximation (Hendrycks and Gimpel 2016, 2), as in GPT-2, in float32."""
    return _gelu_tanh_with_slope(x)[0]


def _gelu_tanh_with_slope(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    square = wide * wide
    tanh = jnp.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * (square * wide)))
    below = 0.5 * (1.0 + tanh)
    steepness = math.sqrt(2 / math.pi) * (1.0 + 3 * 0.044715 * square)
    slope = below + 0.5 * wide * (1.0 - tanh * tanh) * steepness
    return (wide * below).astype(x.dtype), slope.astype(x.dtype)


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, slope = _gelu_tanh_with_slope(*primals)  # of which, as above, the backward pass keeps the slope alone
    return value, tangents[0] * slope


def gelu_sigmoid(x: Array) -> Array:
    """Compute GELU by the sigmoid approximation, x·σ(1.702·x) (Hendrycks and Gimpel 2016, 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


# By their names in released config.json files.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu_exact,
    "gelu_python": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "quick_gelu": gelu_sigmoid,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
