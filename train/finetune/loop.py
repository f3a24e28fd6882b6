"""Fine-tune a pretrained encoder on any task: the loop, from examples to a checkpoint folder and official metrics.

Examples share packed rows, and a step always takes the same number of them (data/examples.py); its loss is the mean
over their predictions, so rows, devices and accumulation change nothing but the speed. What a task is, train/task.py.

A run starts from, in this order: (1) its own newest whole checkpoint, (2) the checkpoint named by --resume-from, (3)
the weights of --model, whose head is drawn anew where it is not the task's.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from ...data.batches import Features, Shapes, TrainingBatches, batches_in_epoch, plan_shapes
from ...data.tokenizers.tokenizer import Tokenizer
from ...models import save
from ...models.checkpoints.folder import Loaded
from ..config import OptimConfig
from ..errors import RunError
from ..learner import (
    Learner,
    Start,
    count_parameters,
    describe_dtype,
    exit_status,
    gradient_step,
    kept_params,
    learn,
    on_host,
)
from ..loop import Best, Fitted, Stop, TrainState
from ..metrics import Sums
from ..progress import Progress, duration
from ..run_folder import RunFolder, write_json
from ..sharding import Replicas, start_spread
from ..weights import read_params, write_params
from .adapt import AdaptedModel, adaptation
from .config import FREE, FinetuneConfig
from .model import Depths, load_model, make_optimiser, parameter_depths, without_frozen_gradients
from .prediction import Predicted, Predictor, place, row_limit
from .tasks.task import Task, TaskData, hold_out, settings

# --- step -------------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    task: Task,
    model: Any,
    learner: Learner,
    depths: Depths,
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
        params = without_frozen_gradients(params, depths, frozen)
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
            depths=parameter_depths(loaded.model),
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
