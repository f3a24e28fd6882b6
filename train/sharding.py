"""How a step is spread over devices: one table of rules, and two ways of using it.

    mesh   jit over a mesh with axes data, fsdp and tensor; the compiler inserts the communication. Parameters are
           divided by RULES, batches by rows.
    pmap   every device holds a whole replica and a share of the rows; gradients are averaged with `jax.lax.pmean`.

Both give the losses of one device, since masking and dropout are drawn from each row's number in the whole batch.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..kernels import splitting
from .config import SpreadConfig
from .errors import RunError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# From the logical axes that models name their parameters by (LOGICAL_AXES in models/layers.py) to mesh axes.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "embed_out": None,
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "positions": None,
    "types": None,
    "labels": None,
}


@dataclass(frozen=True)
class Replicas:
    """What a step says where replicas differ. Under jit over a mesh there is one: the compiler does the rest."""

    axis: str | None = None  # name of the pmap axis

    def sum(self, tree: Any) -> Any:
        """Add up over the replicas."""
        return tree if self.axis is None else jax.lax.psum(tree, self.axis)

    def mean(self, tree: Any) -> Any:
        """Average over the replicas."""
        return tree if self.axis is None else jax.lax.pmean(tree, self.axis)

    def count(self) -> int:
        """Number of replicas."""
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    def gather(self, tree: Any) -> Any:
        """From arrays of this replica's rows to those of all rows."""
        return tree if self.axis is None else jax.lax.all_gather(tree, self.axis, tiled=True)

    def rows(self, local: int) -> jax.Array:
        """[local] uint32: numbers, in the whole batch, of the rows that this replica holds."""
        rows = jnp.arange(local, dtype=jnp.uint32)
        return rows if self.axis is None else rows + jax.lax.axis_index(self.axis).astype(jnp.uint32) * local


class Spread(Protocol):
    """One way of running a step on all devices. A *whole* state has every array once, as checkpoints hold it."""

    def share(self, rows: int) -> tuple[int, int]:
        """(index, count): this process reads the index-th of `count` equal shares of a batch of `rows` rows."""
        ...

    def divisor(self) -> int:
        """What the number of a batch's rows must be a multiple of."""
        ...

    def put(self, batch: Mapping[str, np.ndarray]) -> Any:
        """Bring this process's share of a batch, arrays [rows / count, ...], to its devices."""
        ...

    def initialise(self, make: Callable[[], Any], specs: Any) -> Any:
        """Run `make` on the devices; returns the whole state."""
        ...

    def abstract(self, make: Callable[[], Any], specs: Any) -> Any:
        """Shapes, dtypes and shardings of the whole state, without computing it."""
        ...

    def enter(self, whole: Any) -> Any:
        """From a whole state to the form that the step takes."""
        ...

    def leave(self, running: Any) -> Any:
        """From the form that the step takes to a whole state."""
        ...

    def train(
        self, step: Callable[[Any, Any, Replicas], tuple[Any, Any]], specs: Any
    ) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Compile (state, batch) -> (state, sums); the old state's memory is reused."""
        ...

    def evaluate(self, step: Callable[[Any, Any, Replicas], Any], specs: Any) -> Callable[[Any, Any], Any]:
        """Compile (params, batch) -> sums."""
        ...

    def fetch(self, sums: Any) -> Any:
        """Sums on the host."""
        ...


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Read `data=4,fsdp=2`; an axis of -1 takes the devices that are left, axes not named are 1.

    Raises:
        RunError: unknown axis, a size that is no number, or a product that is not the number of devices.
    """
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise RunError(f"--mesh {text}: expected AXIS=SIZE with an axis of {', '.join(MESH_AXES)}, found {part!r}.")
        sizes[name] = int(size)
    open_axes = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise RunError(f"--mesh {text}: only one axis can be -1.")
    if open_axes and devices % fixed == 0:
        sizes[open_axes[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise RunError(
            f"--mesh {text} needs {' x '.join(str(size) for size in sizes.values())} devices, but {devices} "
            f"{'is' if devices == 1 else 'are'} there. Let the sizes multiply to {devices}, or use -1 for one axis."
        )
    return sizes


def make_mesh(text: str) -> Mesh:
    """A mesh with MESH_AXES over all devices of all processes."""
    sizes = parse_mesh(text, jax.device_count())
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def logical_specs(boxed: Any) -> Any:
    """PartitionSpecs of logical names from an abstract tree of `nn.LogicallyPartitioned` parameters.

    Raises:
        ValueError: a parameter without names, or a name that RULES does not have: it would silently be replicated.
    """

    def check(path: tuple[Any, ...], leaf: Any) -> P:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else None
        unknown = [name for name in names or () if name is not None and name not in RULES]
        if names is None or unknown:
            what = f"axis {unknown[0]!r} is in no rule" if unknown else "no axis names"
            raise ValueError(f"Parameter {jax.tree_util.keystr(path)}: {what} (RULES in train/sharding.py).")
        return P(*names)

    return jax.tree_util.tree_map_with_path(check, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def mesh_sharding(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one array by RULES. A size that the mesh axis does not divide stays whole on every device."""
    axes: list[str | None] = []
    for name, size in zip(spec, shape, strict=False):
        axis = RULES[name] if name is not None else None
        axes.append(axis if axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None)
    return NamedSharding(mesh, P(*axes))


class OverMesh:
    """jit over a mesh. The whole state and the running state are the same arrays."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._batch = NamedSharding(mesh, P(BATCH_AXES))
        self._everywhere = NamedSharding(mesh, P())

    def divisor(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def share(self, rows: int) -> tuple[int, int]:
        parts = self.divisor()
        if rows % parts:
            raise RunError(f"A batch of {rows} rows cannot be divided over {parts} devices (mesh axes data x fsdp).")
        slices = [index[0] for index in self._batch.addressable_devices_indices_map((rows,)).values() if index]
        first = min(part.start or 0 for part in slices)
        last = max(rows if part.stop is None else part.stop for part in slices)
        return first // (last - first), rows // (last - first)

    def put(self, batch: Mapping[str, np.ndarray]) -> Any:
        return {name: jax.make_array_from_process_local_data(self._batch, value) for name, value in batch.items()}

    def _shardings(self, shapes: Any, specs: Any) -> Any:
        return jax.tree.map(lambda leaf, spec: mesh_sharding(self.mesh, spec, leaf.shape), shapes, specs)

    def initialise(self, make: Callable[[], Any], specs: Any) -> Any:
        shardings = self._shardings(jax.eval_shape(make), specs)
        return jax.jit(make, out_shardings=shardings)()

    def abstract(self, make: Callable[[], Any], specs: Any) -> Any:
        shapes = jax.eval_shape(make)
        shardings = self._shardings(shapes, specs)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def enter(self, whole: Any) -> Any:
        return whole

    def leave(self, running: Any) -> Any:
        return running

    def train(
        self, step: Callable[[Any, Any, Replicas], tuple[Any, Any]], specs: Any
    ) -> Callable[[Any, Any], tuple[Any, Any]]:
        def spread(state: Any, batch: Any) -> tuple[Any, Any]:
            with self._attention():
                state, sums = step(state, batch, Replicas())
            # The state comes out divided as it went in, so that steps never move parameters.
            shardings = self._shardings(state, specs)
            return jax.lax.with_sharding_constraint(state, shardings), sums

        return jax.jit(spread, donate_argnums=0)

    def evaluate(self, step: Callable[[Any, Any, Replicas], Any], specs: Any) -> Callable[[Any, Any], Any]:
        def spread(params: Any, batch: Any) -> Any:
            with self._attention():
                return step(params, batch, Replicas())

        return jax.jit(spread, out_shardings=self._everywhere)

    def _attention(self) -> AbstractContextManager[None]:
        """Attention's Pallas kernels are told how they are split; the compiler divides the rest by itself."""
        return splitting(self.mesh, batch=BATCH_AXES, heads="tensor")

    def fetch(self, sums: Any) -> Any:
        return jax.device_get(sums)


class OverPmap:
    """Replicas by `jax.pmap`. The running state has a leading axis of local devices."""

    axis = "replica"

    def __init__(self) -> None:
        self.mesh = Mesh(np.array(jax.devices()), (self.axis,))
        self._stacked = NamedSharding(self.mesh, P(self.axis))
        self._whole = NamedSharding(self.mesh, P())

    def divisor(self) -> int:
        return jax.device_count()

    def share(self, rows: int) -> tuple[int, int]:
        if rows % jax.device_count():
            raise RunError(
                f"A batch of {rows} rows cannot be divided over {jax.device_count()} devices (--parallel pmap)."
            )
        return jax.process_index(), jax.process_count()

    def put(self, batch: Mapping[str, np.ndarray]) -> Any:
        devices = jax.local_device_count()
        return {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}

    def initialise(self, make: Callable[[], Any], specs: Any) -> Any:
        return jax.jit(make, out_shardings=self._whole)()

    def abstract(self, make: Callable[[], Any], specs: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole), jax.eval_shape(make)
        )

    def enter(self, whole: Any) -> Any:
        # Copies, since the step gives its state's memory away while the whole state may still be in use.
        copy = jax.pmap(jnp.copy, axis_name=self.axis)

        def stack(array: jax.Array) -> jax.Array:
            parts = [shard.data[None] for shard in array.addressable_shards]
            shape = (jax.device_count(), *array.shape)
            return copy(jax.make_array_from_single_device_arrays(shape, self._stacked, parts))

        return jax.tree.map(stack, whole)

    def leave(self, running: Any) -> Any:
        def pick(array: jax.Array) -> jax.Array:
            parts = [shard.data[0] for shard in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(array.shape[1:], self._whole, parts)

        return jax.tree.map(pick, running)

    def train(
        self, step: Callable[[Any, Any, Replicas], tuple[Any, Any]], specs: Any
    ) -> Callable[[Any, Any], tuple[Any, Any]]:
        replicas = Replicas(self.axis)
        return jax.pmap(lambda state, batch: step(state, batch, replicas), axis_name=self.axis, donate_argnums=0)

    def evaluate(self, step: Callable[[Any, Any, Replicas], Any], specs: Any) -> Callable[[Any, Any], Any]:
        replicas = Replicas(self.axis)
        return jax.pmap(lambda params, batch: step(params, batch, replicas), axis_name=self.axis)

    def fetch(self, sums: Any) -> Any:
        return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data)[0], sums)


def start_spread(config: SpreadConfig) -> Spread:
    """Join the other processes, if there are any, and spread over all their devices.

    Raises:
        RunError: the mesh does not fit the devices, or pmap was asked to divide parameters.
    """
    start_processes(config.coordinator, config.processes, config.process)
    if config.parallel == "mesh":
        return OverMesh(make_mesh(config.mesh))
    sizes = parse_mesh(config.mesh, jax.device_count())
    if sizes["data"] != jax.device_count():
        raise RunError(
            f"--parallel pmap holds whole replicas: --mesh {config.mesh} must put all devices on the data axis."
        )
    return OverPmap()


def start_processes(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes: by flags, else from the environment of a TPU pod or of SLURM, else stay alone.

    Raises:
        RunError: some but not all of the three flags were given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if all(given):
        jax.distributed.initialize(coordinator, processes, process)
    elif any(given):
        raise RunError("Several processes need --coordinator, --processes and --process together.")
    elif (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1
        or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    ):
        jax.distributed.initialize()
