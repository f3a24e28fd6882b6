"""Partitioning over a mesh: of attention along batch and heads, and of rows between layers.

The compiler partitions plain jax.numpy by itself, but not a Pallas kernel: it must be told which axes of the mesh hold
rows and which hold heads, so that no device needs another's part. An array of an explicit mesh carries this
information; for an automatic mesh, use `splitting`:

    with splitting(mesh, batch=("data", "fsdp"), heads="tensor"):
        state = step(state, batch)

It applies to functions traced within the context, where `along_rows` also keeps rows divided between layers.
(`custom_partitioning`, which would need no declaration, does not exist on TPUs.)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from .call import Call


@dataclasses.dataclass(frozen=True)
class Split:
    """A mesh, and the names of its axes over which rows and heads are partitioned; either may be empty."""

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Return the number of parts along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


_declared: contextvars.ContextVar[Split | None] = contextvars.ContextVar("attention_split", default=None)


@contextlib.contextmanager
def splitting(mesh: Mesh, *, batch: str | tuple[str, ...] = (), heads: str | tuple[str, ...] = ()) -> Iterator[None]:
    """Declare how rows and heads are partitioned over a mesh with automatic axes, for functions traced within.

    Args:
      mesh: the mesh of the arrays.
      batch: name or names of the mesh axes that partition the rows.
      heads: name or names of the mesh axes that partition the heads of queries, keys and values.

    Raises:
      ValueError: the mesh does not have one of the axes.
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


def along_rows(array: jax.Array) -> jax.Array:
    """Keep an array [rows, ...] divided along the declared axes of rows, and its gradient too; all else is left open.

    Where parameters are divided along the same axes, the compiler may otherwise divide a layer's arrays as it divides
    the parameters, and then exchange all rows for every product.
    """
    split = _declared.get()
    if split is None or _is_manual(split) or split.parts(split.batch) == 1:
        return array
    if array.shape[0] % split.parts(split.batch):
        return array
    spec = PartitionSpec(split.batch, *(PartitionSpec.UNCONSTRAINED for _ in array.shape[1:]))
    return jax.lax.with_sharding_constraint(array, NamedSharding(split.mesh, spec))


def _is_manual(split: Split) -> bool:
    """Tell whether this is traced within `shard_map` over one of the axes, where a device sees only its part."""
    return bool(set(split.batch + split.heads) & set(jax.sharding.get_abstract_mesh().manual_axes))


def split_of(call: Call) -> Split | None:
    """Return a call's partitioning; None on one device and within `shard_map`, where a device sees only its part."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    declared = _declared.get()
    if declared is not None:
        return None if _is_manual(declared) else declared
    sharding = jax.typeof(call.query).sharding
    if manual or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    batch, _, heads, _ = (() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in sharding.spec)
    return Split(sharding.mesh, batch, heads)


def misfit(call: Call, split: Split) -> str | None:
    """Return why a call cannot be partitioned this way, or None."""
    for what, number, axes in (
        ("rows", call.query.shape[0], split.batch),
        ("query heads", call.query.shape[2], split.heads),
        ("key heads", call.key.shape[2], split.heads),
    ):
        if number % split.parts(axes):
            return f"{number} {what} cannot be split evenly over {split.parts(axes)} devices (axes {', '.join(axes)})"
    return None


def undeclared(call: Call) -> str | None:
    """Return why a call cannot be partitioned, if its mesh is automatic and no partitioning was declared; else None."""
    mesh = jax.typeof(call.query).sharding.mesh
    automatic = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Auto]
    if split_of(call) is None and not jax.sharding.get_abstract_mesh().manual_axes and mesh.size > 1 and automatic:
        return (
            f"the mesh's axes {', '.join(automatic)} are automatic: say which of them split rows and heads, "
            "`with splitting(mesh, batch=..., heads=...)`"
        )
    return None
