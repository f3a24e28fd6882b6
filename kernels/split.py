"""Over which axes of a mesh attention is split: batch and heads, so that no device needs another's share.

The compiler splits plain jax.numpy by itself, but not a Pallas kernel: somebody must say which axes of the mesh hold
rows and which hold heads. An array of an explicit mesh says so itself; for an automatic mesh, `splitting` does:

    with splitting(mesh, batch=("data", "fsdp"), heads="tensor"):
        state = step(state, batch)

It applies to what is traced within. (On TPUs `custom_partitioning`, which would need no such word, does not exist.)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from .call import Call


@dataclasses.dataclass(frozen=True)
class Split:
    """A mesh, and the names of its axes that rows and heads are split over; either may be none."""

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Over how many devices these axes split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


_declared: contextvars.ContextVar[Split | None] = contextvars.ContextVar("attention_split", default=None)


@contextlib.contextmanager
def splitting(mesh: Mesh, *, batch: str | tuple[str, ...] = (), heads: str | tuple[str, ...] = ()) -> Iterator[None]:
    """Says that attention's arrays are split over a mesh with automatic axes, for what is traced within.

    Args:
      mesh: the mesh of the arrays.
      batch: its axes that rows are split over.
      heads: its axes that heads are split over: those of queries, keys and values alike.

    Raises:
      ValueError: an axis that the mesh does not have.
    """
    batch, heads = ((axes,) if isinstance(axes, str) else tuple(axes) for axes in (batch, heads))
    for name, axes in (("batch", batch), ("heads", heads)):
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(f"{name}: expected axes of the mesh {mesh.axis_names}, found {axis!r}")
    token = _declared.set(Split(mesh, batch, heads))
    try:
        yield
    finally:
        _declared.reset(token)


def split_of(call: Call) -> Split | None:
    """How a call is split; None on one device, and within a `shard_map`, where each device sees its own share only."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    declared = _declared.get()
    if declared is not None:
        return None if set(declared.batch + declared.heads) & set(manual) else declared
    sharding = jax.typeof(call.query).sharding
    if manual or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    batch, _, heads, _ = (() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in sharding.spec)
    return Split(sharding.mesh, batch, heads)


def misfit(call: Call, split: Split) -> str | None:
    """Why a call cannot be split so, or None."""
    for what, number, axes in (
        ("rows", call.query.shape[0], split.batch),
        ("query heads", call.query.shape[2], split.heads),
        ("key heads", call.key.shape[2], split.heads),
    ):
        if number % split.parts(axes):
            return f"{number} {what} cannot be split evenly over {split.parts(axes)} devices (axes {', '.join(axes)})"
    return None


def undeclared(call: Call) -> str | None:
    """Why a call over an automatic mesh cannot be split, if nobody said how; None where there is nothing to say."""
    mesh = jax.typeof(call.query).sharding.mesh
    automatic = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Auto]
    if split_of(call) is None and not jax.sharding.get_abstract_mesh().manual_axes and mesh.size > 1 and automatic:
        return (
            f"the mesh's axes {', '.join(automatic)} are automatic: say which of them split rows and heads, "
            "`with splitting(mesh, batch=..., heads=...)`"
        )
    return None
