"""Dropout by the numbers of a batch's rows, or by their examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels.hash import hash_dropout, row_seeds
from .segments import ByExample, Rows


def dropout_seed(module: nn.Module) -> Array:
    """Draw a seed [2] uint32 from the module's "dropout" stream; it differs in each module and layer."""
    return jax.random.bits(module.make_rng("dropout"), (2,), jnp.uint32)


def drop(inputs: Array, rate: float, seed: Array, rows: Rows) -> Array:
    """Apply dropout to inputs [B, ...], or [B, L, ...] by examples.

    Args:
        inputs: hidden states.
        rate: dropout rate.
        seed: [2] uint32, from `dropout_seed`.
        rows: [B] uint32, row numbers, or `ByExample` of these tokens: its arrays are [B, L], or [B] for inputs [B, E].
    """
    if isinstance(rows, ByExample):
        return hash_dropout(inputs, rate, row_seeds(seed, rows.examples), rows.positions)
    return hash_dropout(inputs, rate, row_seeds(seed, rows))


class Dropout(nn.Module):
    """Set a fraction `rate` of the entries to zero and divide the others by 1 - rate (Srivastava et al. 2014).

    What is dropped in a row depends only on the "dropout" stream and the row's number, and so not on how a batch is
    split over devices, hosts or accumulation steps; by examples, not on the rows they are packed in either.

    Attributes:
        rate: dropout rate.
        shared_length: drop the same channels at all positions of a row, inputs [B, L, E], as T5's own training does
            (mesh TensorFlow's `noise_shape`).
    """

    rate: float
    shared_length: bool = False

    @nn.compact
    def __call__(self, inputs: Array, rows: Rows, *, deterministic: bool) -> Array:
        """Drop entries of inputs [B, ...]; `rows` as for `drop`."""
        if deterministic or self.rate == 0.0:
            return inputs
        seed = dropout_seed(self)
        if not self.shared_length:
            return drop(inputs, self.rate, seed, rows)
        if isinstance(rows, ByExample):
            raise NotImplementedError("Dropout: by example and shared along the length at the same time")
        return inputs * drop(jnp.ones_like(inputs[:, :1]), self.rate, seed, rows)
