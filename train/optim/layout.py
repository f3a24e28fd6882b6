"""Which axes of a parameter are layers, and which are the matrix of a linear map.

Layers that are stacked for a scan share one array, and a map from hidden states to heads has more than two axes. What
an optimiser reduces over a tensor, or does to a matrix, it must do for each layer's matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

TOGETHER = ("heads", "head_dim")  # logical axes that are one side of a matrix


@dataclass(frozen=True)
class Layout:
    """The axes of a parameter.

    Attributes:
        stacked: whether the first axis is layers.
        matrix: (axes of the inputs, axes of the outputs) of a linear map, or (rows, columns) of an embedding table;
            None for what is no matrix.
        hidden: whether it is a linear map between hidden states, neither from or to words nor to labels.
    """

    stacked: bool
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    hidden: bool = False

    def axes(self, array: jax.Array) -> tuple[int, ...]:
        """Return the axes of one layer's tensor."""
        return tuple(range(int(self.stacked), array.ndim))


def layouts(specs: Any) -> Any:
    """Return a tree of `Layout` from one of the logical PartitionSpecs of the parameters."""

    def one(path: tuple[Any, ...], spec: Any) -> Layout:
        stacked = spec[:1] == ("layers",)
        groups: list[tuple[int, ...]] = []
        for axis in range(int(stacked), len(spec)):
            if spec[axis] == TOGETHER[1] and axis and spec[axis - 1] == TOGETHER[0]:
                groups[-1] += (axis,)
            else:
                groups.append((axis,))
        if len(groups) != 2:
            return Layout(stacked)
        kernel = str(getattr(path[-1], "key", path[-1])) == "kernel"
        return Layout(stacked, (groups[0], groups[1]), kernel and not {"vocab", "labels"} & set(spec))

    return jax.tree_util.tree_map_with_path(one, specs)


def for_each_matrix(transform: optax.GradientTransformation, shapes: Any) -> optax.GradientTransformation:
    """Apply a transformation of single tensors to each layer's tensor, a matrix with two axes where it is one.

    Args:
        transform: transformation whose update of a tensor depends on no other tensor.
        shapes: tree of `Layout` like the parameters.
    """

    def flat(array: jax.Array, layout: Layout) -> jax.Array:
        if layout.matrix is None:
            return array
        sides = (math.prod(array.shape[axis] for axis in side) for side in layout.matrix)
        return array.reshape(*array.shape[: int(layout.stacked)], *sides)

    def mapped(function: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
        return jax.vmap(function) if layout.stacked else function

    def init(params: Any) -> Any:
        return jax.tree.map(lambda leaf, layout: mapped(transform.init, layout)(flat(leaf, layout)), params, shapes)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        found = []
        for leaf, own, param, layout in zip(
            leaves, tree.flatten_up_to(state), tree.flatten_up_to(params), tree.flatten_up_to(shapes), strict=True
        ):
            changed, kept = mapped(transform.update, layout)(flat(leaf, layout), own, flat(param, layout))
            found.append((changed.reshape(leaf.shape), kept))
        return tree.unflatten([changed for changed, _ in found]), tree.unflatten([kept for _, kept in found])

    return optax.GradientTransformation(init, update)


def mean_square(array: jax.Array, layout: Layout) -> jax.Array:
    """Return the mean of the squares of each layer's tensor, shaped to broadcast with the array."""
    return jnp.mean(jnp.square(array), layout.axes(array), keepdims=True)
