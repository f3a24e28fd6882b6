"""Parallelism of a step over devices: one table of rules, and two ways of using it.

    mesh   jit over a mesh with axes data, fsdp, tensor and sequence; the compiler inserts the communication. Parameters
           are sharded by RULES, batches by rows and, along sequence, by positions.
    pmap   every device has a replica of the state and a part of the rows; gradients are averaged with `jax.lax.pmean`.

Both give the same losses as one device, since masking and dropout depend on each row's number in the whole batch, or,
in fine-tuning, on each example's.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..kernels import splitting
from ..models.once import jit_once
from ..models.registry import init_params
from .config import ParallelConfig
from .errors import RunError
from .machine.watchdog import Joining

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")
LEAST_POSITIONS = 8
"""Least number of positions of a row on each device along the sequence axis; shorter arrays stay whole."""
ROWS = "rows"
"""Logical axis of a batch's rows, in what a state keeps of each of them; sharded like batches."""

# From the logical axes of the models' parameters (LOGICAL_AXES in models/layers/linear.py) to mesh axes.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "embed_out": None,
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "pixels": None,
    "positions": None,
    "types": None,
    "labels": None,
}


@dataclass(frozen=True)
class Replicas:
    """The replicas of a step. Under jit over a mesh there is only one: the compiler does the rest."""

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
        """Gather arrays of all rows from those of this replica's rows."""
        return tree if self.axis is None else jax.lax.all_gather(tree, self.axis, tiled=True)

    def own(self, tree: Any, local: int) -> Any:
        """Return this replica's rows, `local` of them, of arrays of all rows."""
        if self.axis is None:
            return tree
        first = jax.lax.axis_index(self.axis) * local
        return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, local), tree)

    def rows(self, local: int) -> jax.Array:
        """Return the numbers of this replica's rows in the whole batch, [local] uint32."""
        rows = jnp.arange(local, dtype=jnp.uint32)
        return rows if self.axis is None else rows + jax.lax.axis_index(self.axis).astype(jnp.uint32) * local


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Read `data=4,fsdp=2`; an axis of -1 takes the remaining devices, axes not named are 1.

    Raises:
        RunError: an axis is unknown, a size is not a number, or their product is not the number of devices.
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
            f"{'was' if devices == 1 else 'were'} found. The sizes must multiply "
            f"to {devices}; -1 for one axis takes what remains."
        )
    return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with MESH_AXES.

    Devices of several slices, or nodes, are connected by a slower network, which carries the data axis alone: its parts
    in a slice come first.

    Args:
        text: sizes of the axes, see `parse_mesh`.
        devices: devices of the mesh; None: all devices of all processes.

    Raises:
        RunError: the sizes do not fit the devices, or the data axis is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices)
    if sizes["data"] % slices:
        raise RunError(
            f"--mesh {text}: the {slices} slices are connected along the data axis, whose size must be a multiple of "
            f"{slices}; it is {sizes['data']}."
        )
    within = (sizes["data"] // slices, *(sizes[axis] for axis in MESH_AXES[1:]))
    across = (slices, *(1 for _ in MESH_AXES[1:]))
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), MESH_AXES, axis_types=kinds)


def logical_specs(boxed: Any) -> Any:
    """Return PartitionSpecs of logical names from an abstract tree of `nn.LogicallyPartitioned` parameters.

    Raises:
        ValueError: a parameter has no names, or a name that is not in RULES: it would silently be replicated.
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
    """Return the sharding of an array by RULES. An axis that the mesh axis does not divide is replicated."""
    axes: list[str | tuple[str, ...] | None] = []
    for name, size in zip(spec, shape, strict=False):
        axis = None if name is None else BATCH_AXES if name == ROWS else RULES[name]
        parts = math.prod(mesh.shape[part] for part in ((axis,) if isinstance(axis, str) else axis or ()))
        axes.append(axis if parts > 1 and size % parts == 0 else None)
    return NamedSharding(mesh, P(*axes))


@dataclass(frozen=True)
class TrainStep:
    """A compiled training step, (state, batch) -> (state, sums)."""

    run: Callable[..., tuple[Any, Any]]  # the same with `fixed`
    traced: Callable[..., Any]  # what `jax.jit` traces of it, whose program counts the operations
    fixed: tuple[Any, ...]  # what the step reads and nothing changes
    lower: Callable[..., Any] | None = None  # lowers `run`, if compiling that compiles it for the calls too

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        return self.run(state, batch, *self.fixed)

    def trace(self, state: Any, batch: Any) -> Any:
        """Trace the step, which the call that follows then need not do."""
        return self.traced(state, batch, *self.fixed)

    def compile(self, state: Any, batch: Any) -> bool:
        """Compile the step, which the call that follows then need not do; False if only that call can, as with pmap."""
        if self.lower is None:  # pmap lowers what it is given as if there were no other processes
            return False
        self.lower(state, batch, *self.fixed).compile()
        return True


class Parallelism:
    """Parallelism by jit over a mesh: sharding of the state, and compilation of steps."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._batch = NamedSharding(mesh, P(BATCH_AXES))
        self._everywhere = NamedSharding(mesh, P())

    @property
    def divisor(self) -> int:
        """Number of which the rows of a batch must be a multiple."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def share(self, rows: int) -> tuple[int, int]:
        """Return (index, count): this process reads the index-th of `count` equal parts of a batch of `rows` rows.

        Raises:
            RunError: the devices do not divide the batch.
        """
        if rows % self.divisor:
            raise RunError(
                f"A batch of {rows} rows cannot be divided over {self.divisor} devices (mesh axes data x fsdp)."
            )
        slices = [index[0] for index in self._batch.addressable_devices_indices_map((rows,)).values() if index]
        first = min(part.start or 0 for part in slices)
        last = max(rows if part.stop is None else part.stop for part in slices)
        return first // (last - first), rows // (last - first)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of the arrays [rows, ...] of a batch."""
        return self._batch

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> Any:
        """Put this process's part of a batch, arrays [rows / count, ...], on its devices."""
        return {name: jax.make_array_from_process_local_data(self._batch, value) for name, value in batch.items()}

    def _by_position(self, batch: Any) -> Any:
        """Divide arrays [rows, positions, ...] along the mesh's sequence axis; what follows from them is divided too.

        Attention needs all keys of a row, which the compiler gathers.
        """
        parts = self.mesh.shape["sequence"]

        def divided(array: jax.Array) -> jax.Array:
            if array.ndim < 2 or array.shape[1] % parts or array.shape[1] < LEAST_POSITIONS * parts:
                return array
            sharding = NamedSharding(self.mesh, P(BATCH_AXES, "sequence"))
            return jax.lax.with_sharding_constraint(array, sharding)

        return batch if parts == 1 else jax.tree.map(divided, batch)

    def _shardings(self, shapes: Any, specs: Any) -> Any:
        return jax.tree.map(lambda leaf, spec: mesh_sharding(self.mesh, spec, leaf.shape), shapes, specs)

    def initialise(self, make: Callable[[], Any], specs: Any) -> Any:
        """Run `make` on the devices; return the state, sharded by its logical `specs`."""
        return jit_once(make, out_shardings=self._shardings(jax.eval_shape(make), specs))()

    def abstract(self, make: Callable[[], Any], specs: Any) -> Any:
        """Return the shapes, dtypes and shardings of `initialise`'s result, without computing it."""
        shapes = jax.eval_shape(make)
        shardings = self._shardings(shapes, specs)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def place(self, params: Any, specs: Any) -> Any:
        """Put a tree of arrays of the host on the devices, sharded by its logical `specs`."""

        def one(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(one, params, self._shardings(params, specs))

    def place_model(self, model: Any, params: Any) -> Any:
        """Put a model's parameters on the devices, sharded as if it were trained."""
        return self.place(params, logical_specs(jax.eval_shape(partial(init_params, model), jax.random.key(0))))

    def compile_train(self, step: Callable[..., tuple[Any, Any]], specs: Any, *fixed: Any) -> TrainStep:
        """Compile (state, batch) -> (state, sums); the old state's memory is reused.

        Args:
            step: (state, batch, replicas, *fixed) -> (state, sums).
            specs: logical specs of the state.
            fixed: trees of arrays on the devices that the step reads and nothing changes: a teacher's parameters.
        """

        def sharded(state: Any, batch: Any, *fixed: Any) -> tuple[Any, Any]:
            with self._attention():
                state, sums = step(state, self._by_position(batch), Replicas(), *fixed)
            # The output state is sharded like the input, so that steps never move parameters.
            return jax.lax.with_sharding_constraint(state, self._shardings(state, specs)), sums

        run = jax.jit(sharded, donate_argnums=0)
        return TrainStep(run, run.trace, fixed, run.lower)

    def compile_evaluate(self, step: Callable[..., Any], *fixed: Any) -> Callable[[Any, Any], Any]:
        """Compile (params, batch) -> sums, or anything else that is the same on all devices in the end.

        Args:
            step: (params, batch, replicas, *fixed) -> sums.
            fixed: see `compile_train`.
        """

        def sharded(params: Any, batch: Any, *fixed: Any) -> Any:
            with self._attention():
                return step(params, self._by_position(batch), Replicas(), *fixed)

        run = jax.jit(sharded, out_shardings=self._everywhere)
        return (lambda params, batch: run(params, batch, *fixed)) if fixed else run

    def _attention(self) -> AbstractContextManager[None]:
        """Say how attention's Pallas kernels are sharded, and rows between layers; the compiler shards all else."""
        return splitting(self.mesh, batch=BATCH_AXES, heads="tensor")


class PmapParallelism(Parallelism):
    """Parallelism by `jax.pmap`: every device has the whole state, and steps add up over the replicas explicitly."""

    axis = "replica"

    def __init__(self) -> None:
        devices = np.array(jax.devices()).reshape(-1, *(1 for _ in MESH_AXES[1:]))
        super().__init__(Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)))

    def _shardings(self, shapes: Any, specs: Any) -> Any:
        del specs
        return jax.tree.map(lambda _: self._everywhere, shapes)

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> Any:
        devices = jax.local_device_count()
        return {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}

    # Axes of None: state and sums are the same in all replicas. pmap holds them on this process's devices alone;
    # between steps the state is one array on the devices of all processes, which is what checkpoints are written of.

    def compile_train(self, step: Callable[..., tuple[Any, Any]], specs: Any, *fixed: Any) -> TrainStep:
        run = jax.pmap(
            self._replica(step),
            axis_name=self.axis,
            in_axes=(None, 0, *(None for _ in fixed)),
            out_axes=None,
            donate_argnums=0,
        )

        def whole(state: Any, batch: Any, *fixed: Any) -> tuple[Any, Any]:
            """The step over the rows of all replicas, on one device: it is only traced, to count its operations."""

            def rows(array: jax.Array) -> jax.Array:
                return jnp.concatenate([array.reshape(-1, *array.shape[2:])] * jax.process_count())

            return step(state, jax.tree.map(rows, batch), Replicas(), *fixed)

        trace = jax.jit(whole).trace
        if jax.process_count() == 1:
            return TrainStep(run, trace, fixed)
        here = [self._placed(tree, jax.local_devices()) for tree in fixed]

        def over_processes(state: Any, batch: Any, *_: Any) -> tuple[Any, Any]:
            state, sums = run(self._placed(state, jax.local_devices()), batch, *here)
            return self._placed(state, jax.devices()), sums

        return TrainStep(over_processes, trace, fixed)

    def compile_evaluate(self, step: Callable[..., Any], *fixed: Any) -> Callable[[Any, Any], Any]:
        axes = (None, 0, *(None for _ in fixed))
        run = jax.pmap(self._replica(step), axis_name=self.axis, in_axes=axes, out_axes=None)
        if jax.process_count() == 1:
            return lambda params, batch: run(params, batch, *fixed)
        here = [self._placed(tree, jax.local_devices()) for tree in fixed]
        return lambda params, batch: run(self._placed(params, jax.local_devices()), batch, *here)

    def _placed(self, tree: Any, devices: Sequence[Any]) -> Any:
        """Turn replicated arrays into arrays on these devices, without copying."""
        sharding = NamedSharding(Mesh(np.array(devices), (self.axis,)), P())
        return jax.tree.map(
            lambda array: jax.make_array_from_single_device_arrays(
                array.shape, sharding, [shard.data for shard in array.addressable_shards]
            ),
            tree,
        )

    def _replica(self, step: Callable[..., Any]) -> Callable[..., Any]:
        replicas = Replicas(self.axis)
        return lambda state, batch, *fixed: step(state, batch, replicas, *fixed)


def start_parallelism(config: ParallelConfig) -> Parallelism:
    """Join the other processes, if any, and use all their devices.

    Raises:
        RunError: the mesh does not fit the devices, or shards parameters with pmap.
    """
    start_processes(config.coordinator, config.processes, config.process, config.join_timeout)
    if config.parallel == "mesh":
        return Parallelism(make_mesh(config.mesh))
    sizes = parse_mesh(config.mesh, jax.device_count())
    if sizes["data"] != jax.device_count():
        raise RunError(
            f"--parallel pmap uses whole replicas: --mesh {config.mesh} must put all devices on the data axis."
        )
    return PmapParallelism()


def start_processes(
    coordinator: str | None, processes: int | None, process: int | None, join_timeout: int = 300
) -> None:
    """Join the other processes: by flags, else by the environment of a TPU pod or of SLURM, else stay alone.

    If not all of them have joined after `join_timeout` seconds, the process ends with exit status 1.

    Raises:
        RunError: some but not all of the three flags were given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    joining = Joining(process, processes, coordinator, join_timeout)
    if all(given):
        with joining:
            jax.distributed.initialize(coordinator, processes, process, initialization_timeout=join_timeout + 30)
    elif any(given):
        raise RunError("Several processes need --coordinator, --processes and --process together.")
    elif (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1
        or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    ):
        with joining:
            jax.distributed.initialize(initialization_timeout=join_timeout + 30)


def in_any_process(flag: bool) -> bool:
    """Tell whether a flag is set in any process. All processes must call it."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Run the block in process 0 first and then in the others, which find its results.

    Args:
        name: name of the barrier, the same in all processes.
    """
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_index() == 0 and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
