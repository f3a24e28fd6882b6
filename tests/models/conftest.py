"""Parameters for small models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models.registry import init_params


@pytest.fixture(scope="session")
def random_params() -> Callable[[Any], Any]:
    """From a model to parameters with nothing at zero or one that could hide a mistake.

    NumPy draws them: compiling the program that draws a model's own takes as long as compiling the model.
    """

    def draw(model: Any) -> Any:
        normal = np.random.default_rng(0).normal
        shapes = nn.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
        return jax.tree.map(lambda leaf: np.float32(normal(scale=0.2, size=leaf.shape)), shapes)

    return draw
