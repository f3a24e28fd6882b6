"""The model that is fine-tuned: a checkpoint with the task's head, and the learning rates of its parts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ...models.checkpoints.config import read_labels
from ...models.checkpoints.folder import Loaded, load_with_report, read_config
from ..errors import RunError
from ..learner import Learner, Names, compute_dtype, make_learner
from ..optim import schedule
from ..progress import Progress
from .config import FinetuneConfig
from .tasks.task import Task


def load_model(config: FinetuneConfig, task: Task, progress: Progress) -> Loaded:
    """The checkpoint with the task's head.

    Raises:
        CheckpointError: another family, or tensors that do not fit. RunError: no tokenizer in the folder.
    """
    changes = task.model_changes()
    drop = {} if config.dropout is None else {"dropout": config.dropout, "attention_dropout": config.dropout}
    run = dict(
        dtype=compute_dtype(config.dtype),
        remat=config.remat,
        attention_implementation=config.attention,
    )
    loaded, report = load_with_report(config.model, head=task.head, seed=config.seed, **run, **drop, **changes)
    scan = loaded.config.layers > WRITTEN_OUT if config.scan_layers is None else config.scan_layers
    shaped = dataclasses.replace(loaded.config, scan_layers=scan)
    loaded = loaded._replace(config=shaped, model=loaded.model.clone(config=shaped))
    if task.max_length > loaded.config.positions:
        raise RunError(f"--max-length is {task.max_length}, beyond the model's {loaded.config.positions} positions.")
    new = list(report.initialised)
    names = changes.get("label_names")
    held = read_labels(read_config(config.model))[1]
    if names is not None and names != held and not any(name.startswith(HEADS) for name in new):
        loaded = loaded._replace(params={**loaded.params, **new_head(loaded.model, config.seed)})
        new.append(f"the head, whose classes are {', '.join(held or ['not named'])}")
    if new:
        progress.line(f"drawn anew, not from {config.model}: {', '.join(new)}")
    return loaded


WRITTEN_OUT = 8  # layers, up to which a compiler sees all of them
HEADS = ("classifier",)  # what the stored names of a head's parameters begin with


def new_head(model: Any, seed: int) -> dict[str, Any]:
    """Everything but a model's encoder, drawn anew."""

    def draw(key: jax.Array) -> dict[str, Any]:
        params = nn.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32)))["params"]
        return {name: part for name, part in params.items() if name != "encoder"}

    return jax.device_get(jax.jit(draw)(jax.random.key(seed)))


def make_optimiser(
    config: FinetuneConfig, task: Task, loaded: Loaded, steps: int, chosen: Callable[[Names], bool] | None = None
) -> Learner:
    """The optimiser, with the layers' and the task's learning rates; nothing is computed yet.

    Args:
        config, task: of the run.
        loaded: the model.
        steps: of the run.
        chosen: names along the way to a parameter -> whether it may train; None: all may.
    """
    boxed = boxed_shapes(loaded.model)
    trains, scales = layer_rates(config, layer_counts(boxed))
    return make_learner(
        # The weights come from the checkpoint: drawing others first would only take time to compile.
        lambda _: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed),
        optim=config.optim,
        rate=schedule(config.optim, [(steps, None)]),
        seed=config.seed,
        trains=_both(trains, chosen),
        scales=task_rates(task, scales),
    )


def _both(
    first: Callable[[Names], bool] | None, second: Callable[[Names], bool] | None
) -> Callable[[Names], bool] | None:
    if first is None or second is None:
        return first or second
    return lambda names: first(names) and second(names)


def task_rates(task: Task, scales: Callable[[Names], Any] | None) -> Callable[[Names], Any] | None:
    """What learning rates are multiplied by, with the task's own factors."""
    if not task.rates:
        return scales
    return lambda names: jnp.float32(task.rates.get(names[0], 1.0)) * (1.0 if scales is None else scales(names))


def boxed_shapes(model: Any) -> Any:
    """Shapes of a model's parameters in their boxes of logical axis names."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]


def layer_counts(boxed: Any) -> dict[Names, tuple[int, int]]:
    """Names along the way to each parameter that is stacked for all layers -> (number of layers, its axes)."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)):
        if leaf.names[:1] == ("layers",):
            found[tuple(str(part.key) for part in path)] = (leaf.value.shape[0], leaf.value.ndim)
    return found


def layer_rates(
    config: FinetuneConfig, layers: dict[Names, tuple[int, int]]
) -> tuple[Callable[[Names], bool] | None, Callable[[Names], Any] | None]:
    """Which parameters train at all, and what their learning rates are multiplied by.

    Layer i of N (from 0) has --layer-decay to the power N - i, the embeddings N + 1, everything else 0. Layers that are
    stacked in one array and of which only some are frozen stay in the optimiser, with a rate of zero.

    Raises:
        RunError: more layers are to be frozen than there are.
    """
    if not config.freeze_layers and config.layer_decay == 1.0:
        return None, None
    count = max((number for number, _ in layers.values()), default=0)
    if config.freeze_layers > count:
        raise RunError(f"--freeze-layers {config.freeze_layers}: the model has {count} layers.")

    def trains(names: Names) -> bool:
        if not config.freeze_layers:
            return True
        return "embeddings" not in names and not (names in layers and config.freeze_layers == layers[names][0])

    def scales(names: Names) -> Any:
        if names in layers:
            number, axes = layers[names]
            depth = np.arange(number)
            factors = np.where(depth < config.freeze_layers, 0.0, config.layer_decay ** (number - depth))
            return jnp.asarray(factors.reshape(-1, *[1] * (axes - 1)), jnp.float32)
        return jnp.float32(config.layer_decay ** (count + 1) if "embeddings" in names else 1.0)

    return trains, scales


def without_frozen_gradients(params: Any, layers: Mapping[Names, tuple[int, int]], frozen: int) -> Any:
    """The same parameters, of whose lowest `frozen` layers no gradient is taken: none enters the gradient's norm."""
    if not frozen:
        return params

    def cut(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if tuple(str(part.key) for part in path) not in layers:
            return leaf
        return jnp.concatenate([jax.lax.stop_gradient(leaf[:frozen]), leaf[frozen:]])

    return jax.tree_util.tree_map_with_path(cut, params)
