"""Fine-tune a pretrained encoder on any task: the loop, from examples to a checkpoint folder and official metrics.

Examples share packed rows, and a step always takes the same number of them (data/examples.py); its loss is the mean
over their predictions, so rows, devices and accumulation change nothing but the speed. What a task is, train/task.py.

A run starts from, in this order: (1) its own newest whole checkpoint, (2) the checkpoint named by --resume-from, (3)
the weights of --model, whose head is drawn anew where it is not the task's.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from jax.experimental import multihost_utils
from safetensors.numpy import load_file, save_file

from ...data.batches import Features, Shapes, TrainingBatches, batches_in_epoch, plan_shapes
from ...data.packing import RandomStream
from ...data.tokenizers.tokenizer import Tokenizer
from ...models import save
from ...models.checkpoints.config import read_labels
from ...models.checkpoints.folder import Loaded, load_with_report, read_config
from ...models.checkpoints.tables import flatten
from ..errors import RunError
from ..learner import (
    Learner,
    Names,
    Start,
    compute_dtype,
    count_parameters,
    describe_dtype,
    exit_status,
    gradient_step,
    kept_params,
    learn,
    make_learner,
    on_host,
)
from ..loop import Best, Fitted, LoopConfig, Stop, TrainState
from ..metrics import Sums
from ..optim import OptimConfig, schedule
from ..progress import Progress, duration
from ..run_folder import RunFolder, write_json
from ..sharding import Replicas, SpreadConfig, start_spread
from .adapt import AdaptConfig, AdaptedModel, adaptation
from .prediction import Predicted, Predictor, place, row_limit
from .tasks.task import Task, TaskData, settings

# --- config -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What all tasks are fine-tuned with."""

    model: Path
    """Checkpoint folder to start from (config.json, model.safetensors, tokenizer files); with another head than the
    task's, its encoder is taken."""
    epochs: float = 3.0
    """Times that the training examples are gone through."""
    steps: int = 0
    """Updates, instead of --epochs."""
    batch_size: int = 32
    """Examples of an update."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; the numbers stay the same."""
    max_length: int = 128
    """Tokens of an example, at most; what is longer is cut."""
    train_examples: int = 0
    """Train on so many examples, drawn by the seed; 0: all."""
    seed: int = 0
    """Of the new head, the order of the examples and dropout."""
    dropout: float | None = None
    """Share of hidden values and of attention probabilities that is dropped. None: what the checkpoint says."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; parameters are float32 always. auto: bfloat16 on an accelerator, float32 on a CPU."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    scan_layers: bool | None = None
    """Compile one layer and loop over it; off writes all layers out: same numbers and faster steps, longer compilation.
    None: models of up to 8 layers are written out."""
    attention: str | None = None
    """Backend of the attention kernel; None takes the fastest that supports the call."""
    freeze_layers: int = 0
    """The embeddings and so many of the lowest layers stay as they are."""
    layer_decay: float = 1.0
    """Each layer's learning rate is that of the layer above it times this; pooler and head have the full rate."""
    adapt: Annotated[AdaptConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(learning_rate=5e-5, warmup=0.1, weight_decay=0.0, epsilon=1e-8)
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    evaluate_epochs: float = 1.0
    """Epochs between evaluations, where --evaluate-every is 0."""
    patience: int = 0
    """End after so many evaluations in turn that are no better than the best; 0: never before the last step."""
    take: Literal["last", "best"] | None = None
    """Which weights the run leaves behind: the last, or those of the best evaluation. None: best with --patience."""

    out: Path
    """Run folder. A run that was stopped goes on when the same command is given again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, that a new run goes on from, with optimiser and data position."""
    spread: Annotated[SpreadConfig, tyro.conf.arg(name="")] = field(default_factory=SpreadConfig)

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "accumulate": 1, "max_length": 4, "steps": 0, "train_examples": 0, "patience": 0}
        for name, value in {**least, "freeze_layers": 0}.items():
            if getattr(self, name) < value:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {value}.")
        if not (self.steps or self.epochs > 0):
            raise RunError(f"--epochs is {self.epochs}; it must be above 0.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise RunError(f"--dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not 0 < self.layer_decay <= 1:
            raise RunError(f"--layer-decay is {self.layer_decay}; it must be above 0 and at most 1.")
        if not self.evaluate_epochs > 0:
            raise RunError(f"--evaluate-epochs is {self.evaluate_epochs}; it must be above 0.")


# Settings that change neither the numbers of a run nor what it leaves behind: they may differ when it is started again.
FREE_HERE = (
    "out",
    "remat",
    "scan_layers",
    "loop.keep",
    "loop.checkpoint_every",
    *(f"spread.{f.name}" for f in dataclasses.fields(SpreadConfig)),
)
FREE = frozenset(f"run.{name}" for name in FREE_HERE)


# --- model and optimiser ----------------------------------------------------------------------------------------------


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


# --- step -------------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    task: Task,
    model: Any,
    learner: Learner,
    layers: Mapping[Names, tuple[int, int]],
    frozen: int,
    accumulate: int,
    unit_size: int,
) -> tuple[TrainState, Sums]:
    """One update: the mean loss over the batch's predictions."""
    batch = {**batch, "rows": replicas.rows(batch["input_ids"].shape[0])}
    dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    one = jnp.float32(1)
    counts = {
        "tokens": ((batch["segment_ids"] > 0).sum().astype(jnp.float32), one),
        "examples": (batch["segment_weights"].sum() / unit_size, one),
    }
    counts = {name: (replicas.sum(total), one) for name, (total, _) in counts.items()}
    weight = jnp.maximum(replicas.sum(task.weight(batch)), 1.0)

    def loss(params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        params = without_frozen_gradients(params, layers, frozen)
        sums = task.loss(task.forward(model, params, part, deterministic=False, rngs={"dropout": dropout}), part)
        return sums["loss"][0] / weight, sums

    state, sums, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss, accumulate=accumulate)
    return state, {**sums, "gradient_norm": (norm, one), **counts}


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedData:
    """Examples and their features."""

    train: Features
    evaluation: Mapping[str, tuple[Sequence[Any], Features]]
    prediction: Mapping[str, tuple[Sequence[Any], Features]]


def hold_out(examples: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(what is left, a share drawn by the seed), each in the order of the file and neither of them empty.

    Raises:
        RunError: there are fewer than two examples.
    """
    if len(examples) < 2:
        raise RunError(f"{len(examples)} example: too few to hold one out. Give a file of its own to evaluate on.")
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    chosen = set(RandomStream(seed, len(examples)).permutation(len(examples))[:count].tolist())
    return (
        [example for number, example in enumerate(examples) if number not in chosen],
        [example for number, example in enumerate(examples) if number in chosen],
    )


def encode_data(
    config: FinetuneConfig, task: Task, data: TaskData, tokenizer: Tokenizer, progress: Progress
) -> EncodedData:
    """Encode all splits, and say what they came to."""
    train = data.train
    if config.train_examples and config.train_examples < len(train):
        train = hold_out(train, config.train_examples / len(train), config.seed)[1]

    def encode(name: str, examples: Sequence[Any]) -> Features:
        features = task.encode(tokenizer, examples)
        cut = f", {features.truncated:,} tokens cut off" if features.truncated else ""
        note = f", {features.note}" if features.note else ""
        progress.line(
            f"{name}: {len(examples):,} examples, {len(features.input_ids):,} tokens in {features.count:,} pieces of "
            f"up to {int(features.lengths.max()):,}{cut}{note}"
        )
        return features

    for note in data.notes:
        progress.line(note)
    features = encode("train", train)
    task.check(features, train)
    return EncodedData(
        features,
        {name: (examples, encode(name, examples)) for name, examples in data.evaluation.items()},
        {name: (examples, encode(name, examples)) for name, examples in data.prediction.items()},
    )


# --- run --------------------------------------------------------------------------------------------------------------


class Evaluation:
    """The metrics of the first evaluation split, and its mean loss.

    `latest` is the last state that was evaluated, and what it predicted: the end of a run need not predict it again.
    """

    def __init__(
        self, task: Task, optim: OptimConfig, predictor: Predictor, examples: Sequence[Any], features: Features
    ):
        self._task, self._optim, self._predictor = task, optim, predictor
        self._examples, self._features = examples, features
        self.latest: tuple[TrainState, Predicted] | None = None

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        predicted = self._predictor(kept_params(state, self._optim), self._features, stop)
        if predicted is None:
            return None
        self.latest = state, predicted
        return {**predicted.means, **self._task.metrics(predicted.kept, self._features, self._examples)}


def finetune(config: Any, run_config: FinetuneConfig, task: Task, read: Callable[[], TaskData]) -> int:
    """Fine-tune; returns the exit status.

    Args:
        config: the command's whole configuration, with `run_config` as its field `run`.
        run_config: what the tasks share.
        task: the task.
        read: reads the examples.
    """
    with Stop() as stop:
        return _finetune(config, run_config, task, read, stop)


def _finetune(config: Any, c: FinetuneConfig, task: Task, read: Callable[[], TaskData], stop: Stop) -> int:
    started = time.perf_counter()
    spread = start_spread(c.spread)
    main_process = jax.process_index() == 0
    progress = Progress(shown=main_process)
    run = RunFolder(c.out, config, FREE)
    data = read()
    loaded = load_model(c, task, progress)
    if loaded.tokenizer is None:
        raise RunError(f"{c.model}: no tokenizer files in this folder (tokenizer.json or vocab.txt).")
    plan = adaptation(c.adapt, loaded.model, loaded.params)
    plain = loaded.model
    if plan is not None:
        extended = plan.extend(loaded.params, jax.random.key(c.seed))
        loaded = loaded._replace(model=AdaptedModel(plain, plan), params=extended)
    encoded = encode_data(c, task, data, loaded.tokenizer, progress)
    features = encoded.train
    per_epoch = batches_in_epoch(features.units, c.batch_size)
    steps = c.steps or max(1, round(c.epochs * per_epoch))
    learner = make_optimiser(c, task, loaded, steps, None if plan is None else plan.trains)
    divisor = spread.divisor() * c.accumulate
    shapes = plan_shapes(
        features.unit_lengths,
        features.unit_size,
        batch=c.batch_size,
        seed=c.seed,
        epochs=-(-steps // per_epoch),
        positions=row_limit(loaded.config),
        divisor=divisor,
        multiple=8 if jax.default_backend() == "cpu" else 128,  # of the attention kernels' blocks
    )
    describe(c, loaded, shapes, features, learner, progress)
    index, count = spread.share(divisor)
    batches = TrainingBatches(
        features,
        batch=c.batch_size,
        shapes=shapes,
        seed=c.seed,
        pad_id=loaded.tokenizer.pad_id,
        index=index,
        count=count,
    )
    predictor = Predictor(task, loaded.model, loaded.tokenizer.pad_id, spread, learner.specs.params)
    first, evaluated = next(iter(encoded.evaluation.items()))
    evaluate = Evaluation(task, c.optim, predictor, *evaluated)
    kept_best = c.out / "best.safetensors"
    take_best = c.take == "best" or (c.take is None and c.patience > 0)

    def keep(_: int, state: TrainState) -> None:
        params = on_host(spread.leave(kept_params(state, c.optim)))
        if main_process:
            write_params(kept_best, params)
        if jax.process_count() > 1:  # all of them read it at the end
            multihost_utils.sync_global_devices("best_kept")

    every = c.loop.evaluate_every or max(1, round(c.evaluate_epochs * per_epoch))
    fitted = learn(
        run=run,
        loop=dataclasses.replace(c.loop, evaluate_every=every),
        learner=learner,
        spread=spread,
        step=partial(
            train_step,
            task=task,
            model=loaded.model,
            learner=learner,
            layers=layer_counts(boxed_shapes(loaded.model)),
            frozen=c.freeze_layers,
            accumulate=c.accumulate,
            unit_size=features.unit_size,
        ),
        steps=steps,
        batches=batches,
        evaluate=evaluate,
        start=Start(c.resume_from, lambda: loaded.params, f"the weights of {c.model}"),
        show=("loss",),
        counts={"tokens": "real tokens/s", "examples": "examples/s"},
        progress=progress,
        stop=stop,
        best=Best(task.best, True, c.patience, keep) if take_best else None,
    )
    if fitted.stopped is not None:
        return exit_status(fitted)
    whole = kept_params(fitted.state, c.optim)
    if take_best:
        whole = jax.tree.map(place, whole, read_params(kept_best))
    running = spread.enter(whole)
    params = on_host(whole)
    known: dict[str, Predicted] = {}
    if evaluate.latest is not None and evaluate.latest[0] is fitted.state and not take_best:
        known[first] = evaluate.latest[1]
    metrics: dict[str, dict[str, float]] = {}
    for split, (examples, some) in {**encoded.evaluation, **encoded.prediction}.items():
        predicted = known.get(split) or predictor(running, some)
        assert predicted is not None
        if split in encoded.evaluation:
            metrics[split] = {**predicted.means, **task.metrics(predicted.kept, some, examples)}
            task = task.settled(metrics[split]) if len(metrics) == 1 else task
        if main_process:
            task.write_predictions(c.out / "predictions", split, predicted.kept, some, examples)
    if main_process:
        if plan is not None:
            plan.save(c.out / "adapter", plain, params, str(c.model))
            params = plan.merged(params)
        save(c.out / "model", plain, params, loaded.tokenizer)
        write_json(c.out / "task.json", settings(task))
        run.finish(results(c, task, fitted, metrics, count_parameters(params), features))
        for split, values in metrics.items():
            progress.line(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        progress.line(f"done in {duration(time.perf_counter() - started)}; the model is in {c.out / 'model'}")
    run.close()
    return 0


def describe(
    config: FinetuneConfig, loaded: Loaded, shapes: Shapes, features: Features, learner: Learner, progress: Progress
) -> None:
    """Say what is about to be done."""
    params = learner.shapes().params
    training = [
        leaf for leaf, here in zip(jax.tree.leaves(params), jax.tree.leaves(learner.trains), strict=True) if here
    ]
    examples = min(config.batch_size, features.units)
    area = features.unit_lengths.mean() * examples
    rows = " or ".join(map(str, shapes.rows))
    devices = jax.devices()
    progress.line(
        f"a step: {examples} examples in {rows} rows of {shapes.length} tokens, about "
        f"{area / (shapes.rows[-1] * shapes.length):.0%} full"
    )
    progress.line(
        f"model: {count_parameters(params):,} parameters, {count_parameters(training):,} of them train, computed in "
        f"{describe_dtype(loaded.config.dtype)}, on {len(devices)} x {devices[0].device_kind} "
        f"(--parallel {config.spread.parallel} --mesh {config.spread.mesh})"
    )


def write_params(path: Path, params: Any) -> None:
    """Keep a tree of parameters, atomically."""
    partial = path.with_name(f"{path.name}.partial")
    save_file({"/".join(names): np.ascontiguousarray(leaf) for names, leaf in flatten(params)}, partial)
    partial.replace(path)


def read_params(path: Path) -> Any:
    """The tree that `write_params` kept."""
    tree: dict[str, Any] = {}
    for name, leaf in load_file(path).items():
        *above, last = name.split("/")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return tree


def results(
    config: FinetuneConfig,
    task: Task,
    fitted: Fitted,
    metrics: Mapping[str, Mapping[str, float]],
    parameters: int,
    features: Features,
) -> dict[str, Any]:
    """The content of results.json."""
    return {
        "task": task.name,
        "model": str(config.model),
        "seed": config.seed,
        "metrics": metrics,
        "steps": fitted.step,
        "best": None if fitted.best is None else {"step": fitted.best[0], task.best: fitted.best[1]},
        "parameters": parameters,
        "training_examples": int(features.units),
        "truncated_tokens": features.truncated,
        "examples": fitted.totals["examples"],
        "real_tokens": fitted.totals["tokens"],
        "seconds_in_steps": fitted.seconds,
        "examples_per_second": fitted.rate("examples"),
        "real_tokens_per_second": fitted.rate("tokens"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("bestiary", "jax", "flax", "optax")},
    }
