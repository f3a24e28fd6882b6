"""Task heads on an encoder's hidden states."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from .layers import ACTIVATIONS, Embed, LayerNorm, Linear, add_bias, partitioned


class MaskedLanguageModelHead(nn.Module):
    """Dense, activation, norm, then the products with the word embeddings, and a bias (Devlin et al. 2018, 3.1).

    The dense layer and the norm before the tied decoder are of the released code, not of the paper.
    """

    activation: str
    norm_epsilon: float
    kernel_init: Initializer
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Array, words: Embed) -> Array:
        """hidden [..., E] -> logits [..., V] in the compute dtype, accumulated in float32."""
        hidden = Linear(
            hidden.shape[-1:], ("embed", "embed_out"), kernel_init=self.kernel_init, dtype=self.dtype, name="transform"
        )(hidden)
        hidden = LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(ACTIVATIONS[self.activation](hidden))
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "vocab"), (words.count,), jnp.float32)
        return add_bias(words.attend(hidden), bias).astype(self.dtype)
