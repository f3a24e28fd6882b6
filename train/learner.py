"""What every job shares of training proper: a new state, and one update of it."""

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

from .cpu import lacks_bfloat16
from .errors import RunError
from .optim import OptimConfig, optimizer
from .sharding import Replicas, logical_specs

Names = tuple[str, ...]  # along the way to a parameter


@flax.struct.dataclass
class TrainState:
    """Everything on the devices that the next step depends on.

    step: [] int32, updates done. params and opt_state: trees of float32. key: [2] uint32, the run's PRNG key data; a
    step draws from it folded with `step`, masking from it folded with each row's numbers.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


class Learner(NamedTuple):
    """How to train a tree of parameters. Frozen parameters have neither gradients nor optimiser state."""

    transform: optax.GradientTransformation
    rate: optax.Schedule
    specs: TrainState  # logical PartitionSpecs
    make: Callable[[], TrainState]  # a new state
    trains: Any  # tree of bool like the parameters

    def shapes(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.make)


def make_learner(
    initialise: Callable[[jax.Array], Any],
    *,
    optim: OptimConfig,
    rate: optax.Schedule,
    seed: int,
    trains: Callable[[Names], bool] | None = None,
    scales: Callable[[Names], Any] | None = None,
) -> Learner:
    """The optimiser and the initial state of a model; nothing is computed yet.

    Args:
        initialise: key -> parameters in their boxes of logical axis names, as `Module.init` gives them.
        optim: the optimiser.
        rate: step -> learning rate.
        seed: of the initial parameters and of everything that training draws.
        trains: names along the way to a parameter -> whether it trains; None: all do.
        scales: names along the way to a parameter -> what its learning rate is multiplied by, a number or an array that
            spreads over the parameter (layers that are stacked for a scan share one); None: nothing.

    Raises:
        RunError: nothing trains.
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
    stacked = jax.tree.map(lambda spec: spec[:1] == ("layers",), trained_specs)
    factors = None if scales is None else _along(trained_specs, scales)
    transform = optimizer(optim, rate, stacked, factors)

    def make() -> TrainState:
        params = nn.unbox(parameters())
        draws = jax.random.key_data(jax.random.fold_in(key, 1))
        return TrainState(jnp.int32(0), params, transform.init(_split(params, mask)[0]), draws)

    nowhere: Any = P()
    moments = optax.tree_map_params(
        transform,
        lambda _, spec: spec,
        jax.eval_shape(make).opt_state,
        trained_specs,
        transform_non_params=lambda _: nowhere,
    )
    return Learner(transform, rate, TrainState(nowhere, specs, moments, nowhere), make, mask)


def _along(tree: Any, function: Callable[[Names], Any]) -> Any:
    """A tree of what `function` says of the names along the way to each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(tuple(str(getattr(part, "key", part)) for part in path)), tree
    )


def _split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """The leaves where the mask holds, and the others; None stands for those that are missing."""
    chosen = jax.tree.map(lambda leaf, here: leaf if here else None, tree, mask)
    return chosen, jax.tree.map(lambda leaf, here: None if here else leaf, tree, mask)


def _join(left: Any, right: Any) -> Any:
    """Put together what `_split` took apart."""
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
    """One update.

    Args:
        state: before it.
        batch: arrays [rows, ...] of this replica.
        replicas: the others.
        learner: what trains, and how.
        loss: (parameters, part of the batch) -> (loss, sums to be added up). The loss is divided by the weight of the
            whole batch of all replicas, which is known before any gradient, so that the parts' gradients add up to it.
        accumulate: parts that the batch is computed in.

    Returns:
        (state after it, sums over the whole batch, norm of the gradient)
    """
    trained, frozen = _split(state.params, learner.trains)

    def scaled(trained: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        value, sums = loss(_join(trained, frozen), part)
        return value * replicas.count(), sums

    gradient = jax.grad(scaled, has_aux=True)
    if accumulate == 1:
        gradients, sums = gradient(trained, batch)
    else:
        # Part a takes rows a, a + accumulate, ...: with rows divided over devices, each keeps the rows it has.
        parts = {
            name: jnp.moveaxis(array.reshape(-1, accumulate, *array.shape[1:]), 1, 0) for name, array in batch.items()
        }
        shapes = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(trained, part)), None

        (gradients, sums), _ = jax.lax.scan(add, zeros, parts)

    gradients = replicas.mean(gradients)
    updates, opt_state = learner.transform.update(gradients, state.opt_state, trained)
    params = _join(optax.apply_updates(trained, updates), frozen)
    return (
        TrainState(state.step + 1, params, opt_state, state.key),
        replicas.sum(sums),
        optax.tree.norm(gradients),
    )


def ema_or_params(state: TrainState) -> Any:
    """The parameters to evaluate and to export: with --ema the running mean, of what trains."""
    mean = optax.tree.get(state.opt_state, "running_mean")
    return state.params if mean is None else _join(mean, state.params)


def with_params(state: TrainState, learner: Learner, params: Any) -> TrainState:
    """A new state that starts from other parameters.

    Args:
        state: as `learner.make` gives it.
        learner: what trains.
        params: on the host; they are placed on the devices as those of `state` are.
    """

    def place(leaf: jax.Array, host: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.asarray(host)[index])

    placed = jax.tree.map(place, state.params, params)
    opt_state = state.opt_state
    if optax.tree.get(opt_state, "running_mean") is not None:  # it starts where the parameters start
        copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(_split(placed, learner.trains)[0])
        opt_state = optax.tree.set(opt_state, running_mean=copied)
    return TrainState(state.step, placed, opt_state, state.key)


def compute_dtype(asked: str) -> str:
    """Resolve --dtype: auto is bfloat16 on an accelerator, float32 on a CPU."""
    if asked != "auto":
        return asked
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def describe_dtype(dtype: str) -> str:
    """Describe the compute dtype, with a warning if it is the slower choice."""
    slow = dtype == "bfloat16" and jax.default_backend() == "cpu" and lacks_bfloat16()
    return f"{dtype} (slower than float32 here: this CPU has no instructions for it)" if slow else dtype


def count_parameters(params: Any) -> int:
    """Number of parameters of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def on_host(tree: Any) -> Any:
    """The whole tree as NumPy arrays, on every process."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)
