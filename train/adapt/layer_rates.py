"""Which layers of a model are trained, and the factors of their learning rates."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ...models.registry import family_of_model, init_params
from ..learner import Names
from .adapters import AdaptedModel


class LayerSettings(Protocol):
    """Settings of a run that trains some layers more slowly, or not."""

    @property
    def freeze_layers(self) -> int: ...
    @property
    def layer_decay(self) -> float: ...


def boxed_shapes(model: Any) -> Any:
    """Return the shapes of a model's parameters, boxed with their logical axis names."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


class Depths(NamedTuple):
    """Depths of a model's parameters."""

    of: Mapping[Names, np.ndarray]
    """path of a parameter -> its depth: 0 below the layers, i in layer i (from 1), `layers` + 1 above them; for layers
    stacked in one array, one depth per layer, shaped [n, 1, 1, ...] to broadcast with it"""
    layers: int


def parameter_depths(model: Any) -> Depths:
    """Return the depths of a model's parameters, including adapters."""
    plain = model.plain if isinstance(model, AdaptedModel) else model
    modules = family_of_model(plain)[0].depths(plain)
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed_shapes(model)))
    found = {tuple(str(part.key) for part in path): leaf.ndim for path, leaf in leaves}
    depths = {names: modules[names[:-1]] for names in found}
    shaped = {n: d.reshape(-1, *[1] * (found[n] - 1)) if d.ndim else d for n, d in depths.items()}
    return Depths(shaped, plain.config.layers)


def both(
    first: Callable[[Names], bool] | None, second: Callable[[Names], bool] | None
) -> Callable[[Names], bool] | None:
    """Return whether a parameter is trained by both of two choices, each None for all of them."""
    if first is None or second is None:
        return first or second
    return lambda names: first(names) and second(names)


def layer_rates(
    config: LayerSettings, depths: Depths, *, electra: bool = False
) -> tuple[Callable[[Names], bool] | None, Callable[[Names], Any] | None]:
    """Determine which parameters are trained, and the factors of their learning rates.

    The factor of a parameter at depth d of N layers is --layer-decay to the power N + 1 - d; parameters that layers
    share have the factor of the last of them. If only some layers of a stacked array are frozen, they stay in the
    optimiser, with a rate of zero.

    Args:
        config: settings of the run.
        depths: depths of the model's parameters.
        electra: the power is N + 2 - d for d <= N (`_get_layer_lrs` in the released code of Clark et al. 2020).
    """
    frozen = config.freeze_layers
    if not frozen and config.layer_decay == 1.0:
        return None, None

    def trains(names: Names) -> bool:
        return not frozen or bool((depths.of[names] > frozen).any())

    def scales(names: Names) -> Any:
        depth = depths.of[names]
        kept = ~((depth > 0) & (depth <= frozen))
        below = depths.layers + 1 - depth
        below = below + (electra & (below > 0))
        return jnp.asarray(np.where(kept, config.layer_decay**below, 0.0), jnp.float32)

    return trains, scales


def without_frozen_gradients(params: Any, depths: Depths, frozen: int) -> Any:
    """Stop gradients to the lowest `frozen` layers, so that they do not contribute to the gradient norm."""
    if not frozen:
        return params

    def cut(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        depth = depths.of[tuple(str(part.key) for part in path)]
        lowest = int((depth <= frozen).sum()) if depth.ndim else 0
        return jnp.concatenate([jax.lax.stop_gradient(leaf[:lowest]), leaf[lowest:]]) if lowest else leaf

    return jax.tree_util.tree_map_with_path(cut, params)
