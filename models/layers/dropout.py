"""Dropout by the numbers of a batch's rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels.hash import hash_dropout, row_seeds


def dropout_seed(module: nn.Module) -> Array:
    """Draw a seed [2] uint32 from the module's "dropout" stream; it differs in each module and layer."""
    return jax.random.bits(module.make_rng("dropout"), (2,), jnp.uint32)


class Dropout(nn.Module):
    """Set a fraction `rate` of the entries to zero and divide the others by 1 - rate (Srivastava et al. 2014).

    What is dropped in a row depends only on the "dropout" stream and the row's number, and so not on how a batch is
    split over devices, hosts or accumulation steps.
    """

    rate: float

    @nn.compact
    def __call__(self, inputs: Array, rows: Array, *, deterministic: bool) -> Array:
        """Drop entries of inputs [B, ...]; rows [B] uint32 are the row numbers."""
        if deterministic or self.rate == 0.0:
            return inputs
        return hash_dropout(inputs, self.rate, row_seeds(dropout_seed(self), rows))
