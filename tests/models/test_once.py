"""Programs that run once are compiled in less time, and compute the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models.once import jit_once


@pytest.mark.usefixtures("optimised")
def test_draws_are_the_same_to_the_last_bit() -> None:
    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        initializers = nn.initializers.normal(0.02), nn.initializers.truncated_normal(0.02)
        return tuple(one(jax.random.fold_in(key, i), (40, 24), jnp.float32) for i, one in enumerate(initializers))

    key = jax.random.key(7)
    for quick, usual in zip(jit_once(draw)(key), jax.jit(draw)(key), strict=True):
        np.testing.assert_array_equal(quick, usual)
