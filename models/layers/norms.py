"""Layer normalisation and RMS normalisation, with float32 statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from .linear import partitioned


class LayerNorm(nn.Module):
    """scale·(x - mean)/sqrt(variance + epsilon) + bias over the last axis (Ba et al. 2016), in float32, as `dtype`."""

    epsilon: float
    dtype: str = "float32"
    use_bias: bool = True
    scale_init: Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        width = inputs.shape[-1]
        scale = self.param("scale", partitioned(self.scale_init, "embed"), (width,), jnp.float32)
        lead = tuple(range(inputs.ndim - 1))
        x = inputs.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + self.epsilon) * jnp.expand_dims(scale, lead)
        if self.use_bias:
            bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "embed"), (width,), jnp.float32)
            scaled = scaled + jnp.expand_dims(bias, lead)
        return scaled.astype(self.dtype)


class RMSNorm(nn.Module):
    """scale·x/sqrt(mean(x²) + epsilon) over the last axis (Zhang and Sennrich 2019), in float32, as `dtype`."""

    epsilon: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        width = inputs.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), "embed"), (width,), jnp.float32)
        x = inputs.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normed * jnp.expand_dims(scale, tuple(range(inputs.ndim - 1)))).astype(self.dtype)
