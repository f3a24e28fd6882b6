"""The training state and its update, shared by all jobs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from ..kernels.platform import platform
from .config import OptimConfig
from .errors import RunError
from .machine.cpu import lacks_bfloat16
from .optim.optimizer import optimizer
from .sharding import ROWS, Replicas, logical_specs

Names = tuple[str, ...]  # path of a parameter


@flax.struct.dataclass
class TrainState:
    """Everything on the devices that the next step depends on.

    Attributes:
        step: [] int32, number of updates done.
        params: tree of float32.
        opt_state: tree of float32.
        key: [2] uint32, PRNG key data of the run; a step folds `step` into it, masking each row's numbers.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


@flax.struct.dataclass
class MemoryState(TrainState):
    """A training state with what a model remembers of each row of the last batch: name -> array [rows, ...]."""

    memory: dict[str, jax.Array]


class WithMemory(NamedTuple):
    """Sums of a part of a batch, and the memory after it, arrays [rows, ...] of its rows."""

    sums: Any
    memory: dict[str, jax.Array] | None


class Learner(NamedTuple):
    """Trainer of a tree of parameters. Frozen parameters have neither gradients nor optimiser state."""

    transform: optax.GradientTransformation
    rate: optax.Schedule
    specs: TrainState  # logical PartitionSpecs
    make: Callable[[], TrainState]  # makes a new state
    trains: Any  # tree of bool like the parameters

    def shapes(self) -> TrainState:
        """Return the shapes and dtypes of the state."""
        return jax.eval_shape(self.make)


def make_learner(
    initialise: Callable[[jax.Array], Any],
    *,
    optim: OptimConfig,
    rate: optax.Schedule,
    seed: int,
    trains: Callable[[Names], bool] | None = None,
    scales: Callable[[Names], Any] | None = None,
    memory: Callable[[], dict[str, jax.Array]] = dict,
) -> Learner:
    """Make a learner, with the optimiser and the initial state of a model; nothing is computed yet.

    Args:
        initialise: key -> parameters boxed with logical axis names, as returned by `Module.init`.
        optim: settings of the optimiser.
        rate: step -> learning rate.
        seed: random seed of the initial parameters and of training.
        trains: path of a parameter -> whether it is trained; None: all are.
        scales: path of a parameter -> factor of its learning rate, a number or an array that broadcasts to the
            parameter (layers stacked for a scan share one parameter); None: no factors.
        memory: makes the memory that training begins with, arrays [rows, ...]; empty if there is none.

    Raises:
        RunError: no parameter is trained.
    """
    key = jax.random.key(seed)

    def parameters() -> Any:
        return initialise(jax.random.fold_in(key, 0))

    boxed = jax.eval_shape(parameters)
    specs = logical_specs(boxed)
    mask = _along(specs, trains or (lambda _: True))
    if not any(jax.tree.leaves(mask)):
        raise RunError("Nothing to train: every parameter is frozen.")
    trained_specs = _split(specs, mask)[0]
    factors = None if scales is None else _along(trained_specs, scales)
    transform = optimizer(optim, rate, trained_specs, factors)

    def make() -> TrainState:
        params = nn.unbox(parameters())
        draws = jax.random.key_data(jax.random.fold_in(key, 1))
        start = jnp.int32(0), params, transform.init(_split(params, mask)[0]), draws
        kept = memory()
        return MemoryState(*start, kept) if kept else TrainState(*start)

    nowhere: Any = P()
    shapes = jax.eval_shape(make)
    parts = nowhere, specs, _moment_specs(shapes, trained_specs), nowhere
    if isinstance(shapes, MemoryState):
        state = MemoryState(*parts, jax.tree.map(lambda _: P(ROWS), shapes.memory))
    else:
        state = TrainState(*parts)
    return Learner(transform, rate, state, make, mask)


def _moment_specs(state: TrainState, specs: Any) -> Any:
    """Return the logical PartitionSpecs of an optimiser's state.

    An array has the spec of a parameter if its path contains the parameter's and it has the parameter's shape. All
    others, such as counts and factored moments, are replicated.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    known = {_names(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}

    def one(path: tuple[Any, ...], leaf: Any) -> P:
        names = _names(path)
        parts = (names[start:stop] for stop in range(len(names), 0, -1) for start in range(stop))
        return next((known[part] for part in parts if part in known and shapes[part] == leaf.shape), P())

    return jax.tree_util.tree_map_with_path(one, state.opt_state)


def _names(path: tuple[Any, ...]) -> Names:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def _along(tree: Any, function: Callable[[Names], Any]) -> Any:
    """Return a tree of `function` applied to the path of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(_names(path)), tree)


def _split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Split a tree into the leaves where the mask is true and the others; missing leaves are None."""
    chosen = jax.tree.map(lambda leaf, here: leaf if here else None, tree, mask)
    return chosen, jax.tree.map(lambda leaf, here: None if here else leaf, tree, mask)


def _join(left: Any, right: Any) -> Any:
    """Join the two results of `_split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, left, right, is_leaf=lambda leaf: leaf is None)


def gradient_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    learner: Learner,
    loss: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, Any]],
    accumulate: int = 1,
) -> tuple[TrainState, Any, jax.Array]:
    """Do one update.

    Args:
        state: state before the update.
        batch: arrays [rows, ...] of this replica.
        replicas: the replicas of the step.
        learner: the learner.
        loss: (parameters, part of the batch) -> (loss, sums to add up, or `WithMemory`). The loss is divided by the
            weight of the whole batch over all replicas, which is known before any gradient, so that the gradients of
            the parts add up.
        accumulate: number of gradient-accumulation micro-batches.

    Returns:
        (state after the update, sums over the whole batch, norm of the gradient)
    """
    trained, frozen = _split(state.params, learner.trains)

    def scaled(trained: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        value, found = loss(_join(trained, frozen), part)
        return value * replicas.count(), found if isinstance(found, WithMemory) else WithMemory(found, None)

    gradient = jax.grad(scaled, has_aux=True)
    if accumulate == 1:
        gradients, (sums, memory) = gradient(trained, batch)
    else:
        # Micro-batch a has rows a, a + accumulate, ...: with rows sharded over devices, each keeps the rows it has.
        parts = {
            name: jnp.moveaxis(array.reshape(-1, accumulate, *array.shape[1:]), 1, 0) for name, array in batch.items()
        }
        shapes, found = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, found.sums))

        def add(carry: Any, part: dict[str, jax.Array]) -> tuple[Any, Any]:
            slopes, found = gradient(trained, part)
            return jax.tree.map(jnp.add, carry, (slopes, found.sums)), found.memory

        (gradients, sums), memories = jax.lax.scan(add, zeros, parts)
        memory = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), memories)

    gradients = replicas.mean(gradients)
    updates, opt_state = learner.transform.update(gradients, state.opt_state, trained)
    params = _join(optax.apply_updates(trained, updates), frozen)
    after: dict[str, Any] = {} if memory is None else {"memory": replicas.gather(memory)}
    return (
        state.replace(step=state.step + 1, params=params, opt_state=opt_state, **after),  # type: ignore[attr-defined]
        replicas.sum(sums),
        optax.tree.norm(gradients),
    )


def ema_or_params(state: TrainState) -> Any:
    """Return the parameters to evaluate and export: with --ema, the moving average of the trained ones."""
    mean = optax.tree.get(state.opt_state, "running_mean")
    return state.params if mean is None else _join(mean, state.params)


def place(like: Any, host: np.ndarray) -> jax.Array:
    """Put an array of the host on the devices, sharded like `like`."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(host)[index])


def with_params(state: TrainState, learner: Learner, params: Any) -> TrainState:
    """Return a new state with other initial parameters.

    Args:
        state: a state by `learner.make`.
        learner: the learner.
        params: parameters on the host; they are sharded over the devices like those of `state`.
    """

    placed = jax.tree.map(place, state.params, params)
    opt_state = state.opt_state
    if optax.tree.get(opt_state, "running_mean") is not None:  # it starts at the initial parameters
        copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(_split(placed, learner.trains)[0])
        opt_state = optax.tree.set(opt_state, running_mean=copied)
    return state.replace(params=placed, opt_state=opt_state)  # type: ignore[attr-defined]


def compute_dtype(asked: str) -> str:
    """Resolve --dtype: auto is bfloat16 on an accelerator, float32 on a CPU."""
    if asked != "auto":
        return asked
    return "float32" if platform() == "cpu" else "bfloat16"


UNROLLED = 8  # maximum number of layers to unroll by default


def scans(asked: bool | None, layers: int) -> bool:
    """Resolve --scan-layers: None scans models of more than 8 layers."""
    return layers > UNROLLED if asked is None else asked


def describe_dtype(dtype: str) -> str:
    """Describe the compute dtype, with a warning if it is the slower choice."""
    slow = dtype == "bfloat16" and platform() == "cpu" and lacks_bfloat16()
    return f"{dtype} (slower than float32 here: this CPU has no instructions for it)" if slow else dtype


def count_parameters(params: Any) -> int:
    """Count the parameters of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_bytes(tree: Any) -> int:
    """Count the bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def on_host(tree: Any) -> Any:
    """Return the whole tree as NumPy arrays, on every process."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)
