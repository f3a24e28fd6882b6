"""What every train loop shares between its configuration and `fit`: a new state, one update, and where a run starts.

A run starts from, in this order: (1) its own newest whole checkpoint, (2) a checkpoint named to resume from,
(3) weights named to initialise from, (4) scratch.
"""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from .checkpoint import Checkpoints, check_space, restore_from
from .config import LoopConfig, OptimConfig
from .cpu import lacks_bfloat16
from .errors import RunError
from .loop import Batches, Best, Fitted, Stop, TrainState, fit
from .metrics import Sums
from .optim import optimizer
from .progress import Progress
from .run_folder import RunFolder
from .sharding import Replicas, Spread, logical_specs

Names = tuple[str, ...]  # along the way to a parameter


class Learner(NamedTuple):
    """How a tree of parameters is trained. Parameters that do not train have neither gradients nor optimiser state."""

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
        raise RunError("Nothing trains: every parameter is frozen.")
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


def kept_params(state: TrainState, optim: OptimConfig) -> Any:
    """The parameters to evaluate and to leave behind: with --ema the running mean, of what trains."""
    if not optim.ema:
        return state.params
    return _join(optax.tree.get(state.opt_state, "running_mean"), state.params)


class Start(NamedTuple):
    """What a run that has no checkpoint of its own starts from."""

    resume_from: Path | None = None  # a run folder, or one step of its checkpoints
    weights: Callable[[], Any] | None = None  # -> parameters on the host; None: those that the learner makes
    described: str = ""  # where the weights come from, for the log


def learn(
    *,
    run: RunFolder,
    loop: LoopConfig,
    learner: Learner,
    spread: Spread,
    step: Callable[[TrainState, Any, Replicas], tuple[TrainState, Sums]],
    steps: int,
    batches: Batches,
    evaluate: Callable[[TrainState, Stop], dict[str, float] | None],
    start: Start,
    show: tuple[str, ...],
    counts: dict[str, str],
    progress: Progress,
    stop: Stop,
    best: Best | None = None,
) -> Fitted:
    """Train from wherever the run stands to `steps`; the arguments that are not explained here are those of `fit`.

    Returns:
        what `fit` returned, with the whole state. When it was stopped, this has been said.
    """
    abstract = spread.abstract(learner.make, learner.specs)
    run.begin()
    if jax.process_index() == 0:
        check_space(run.folder, (loop.keep + 1) * count_bytes(abstract))
    checkpoints = Checkpoints(run.checkpoints, keep=loop.keep, report=progress.line)
    whole, done, beside = _starting_state(start, steps, learner, spread, abstract, checkpoints, progress)
    run.rewind(done)
    if beside is not None:
        batches.set_state(beside["batches"])
    fitted = fit(
        config=loop,
        steps=steps,
        run=run,
        checkpoints=checkpoints,
        spread=spread,
        train=spread.train(step, learner.specs),
        state=spread.enter(whole),
        batches=batches,
        start=done,
        beside=beside,
        evaluate=evaluate,
        learning_rate=learner.rate,
        show=show,
        counts=counts,
        progress=progress,
        stop=stop,
        best=best,
    )
    checkpoints.close()
    if fitted.stopped is not None:
        run.close()
        progress.line(f"stopped and saved at step {fitted.step}; the same command goes on from here")
    return fitted._replace(state=spread.leave(fitted.state))


def exit_status(fitted: Fitted) -> int:
    """Of a command whose run ended: 0, also after SIGTERM; 130 after an interrupt."""
    return 0 if fitted.stopped in (None, signal.SIGTERM) else 128 + fitted.stopped


def _starting_state(
    start: Start,
    steps: int,
    learner: Learner,
    spread: Spread,
    abstract: Any,
    checkpoints: Checkpoints,
    progress: Progress,
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """The whole state to start from, its step, and what was saved beside it (None for a new start)."""
    restored = checkpoints.restore(abstract)
    if restored is None and start.resume_from is not None:
        restored = restore_from(start.resume_from, abstract, progress.line)
        if restored.step >= steps:
            raise RunError(
                f"{start.resume_from} is at step {restored.step}, and this run has {steps}: nothing is left to do. "
                "Raise --steps."
            )
    if restored is not None:
        progress.line(f"going on from step {restored.step}")
        return restored.state, restored.step, restored.progress
    state = spread.initialise(learner.make, learner.specs)
    if start.weights is not None:

        def place(leaf: jax.Array, host: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.asarray(host)[index])

        params = jax.tree.map(place, state.params, start.weights())
        opt_state = state.opt_state
        if optax.tree.get(opt_state, "running_mean") is not None:  # it starts where the parameters start
            copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(_split(params, learner.trains)[0])
            opt_state = optax.tree.set(opt_state, running_mean=copied)
        state = state.replace(params=params, opt_state=opt_state)
        progress.line(f"starting from {start.described}")
    return state, 0, None


def compute_dtype(asked: str) -> str:
    """What --dtype stands for: auto is bfloat16 on an accelerator, float32 on a CPU."""
    if asked != "auto":
        return asked
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def describe_dtype(dtype: str) -> str:
    """What is computed in, with a warning where that is the slower choice."""
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
