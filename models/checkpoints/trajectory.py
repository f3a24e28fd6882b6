"""Train on a fixture's one batch, and compare the losses with the reference's, for `bestiary parity`.

`trajectory.json` in a fixture folder holds the settings of the reference's optimiser and the losses of its steps on the
one batch, each computed before its update, without dropout. Their error shows whether gradients, clipping, weight decay
and the moments are the reference's, and not only the first gradient.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from ...data.json_files import read_object, value_of
from .tables import CheckpointError, Params

MakeOptimiser = Callable[[Mapping[str, Any], str], optax.GradientTransformation]
"""From the settings in trajectory.json, and where they are for messages, to the update."""


def trajectory_errors(
    path: Path, loss: Callable[[Params], Array], params: Params, gradient: Params, make_optimiser: MakeOptimiser
) -> np.ndarray:
    """Return the relative error of the loss of each step of a trajectory.json, [steps].

    Args:
        path: the trajectory.json.
        loss: parameters -> loss on the fixture's batch.
        params: the checkpoint's parameters.
        gradient: the gradient of the loss. Where it is zero throughout, as for a buffer of the reference or a pooler
            that the loss does not read, a parameter is not trained.
        make_optimiser: makes the optimiser of the settings.

    Raises:
        CheckpointError: there are no losses, or not one for each step.
        ValueError: the settings are not known.
    """
    stored = read_object(path)
    expected = np.array(value_of(stored, "losses", list[float], str(path)))
    settings = {name: value for name, value in stored.items() if name != "losses"}
    steps = value_of(settings, "steps", int, str(path))
    if not len(expected) or len(expected) != steps:
        raise CheckpointError(f"{path}: expected the losses of {steps} steps, found {len(expected)}")
    transform = make_optimiser(settings, str(path))

    fixed = jax.tree.map(lambda leaf, slope: None if np.any(slope) else leaf, params, gradient)
    trained: Params = jax.tree.map(lambda leaf, slope: leaf if np.any(slope) else None, params, gradient)

    def whole(trained: Params) -> Params:
        return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda leaf: leaf is None)

    @jax.jit
    def step(trained: Params, state: Any) -> tuple[Any, Any, Array]:
        value, gradient = jax.value_and_grad(lambda some: loss(whole(some)))(trained)
        updates, state = transform.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, found = transform.init(trained), []
    for _ in range(steps):
        trained, state, value = step(trained, state)
        found.append(value)
    return np.abs(np.array(jax.device_get(found)) - expected) / np.abs(expected)
