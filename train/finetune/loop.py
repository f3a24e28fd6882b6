"""The fine-tuning loop of all tasks, from examples to a checkpoint folder and official metrics.

Examples share packed rows, and a step always takes the same number of them (data/batches.py); its loss is the mean over
their predictions, and dropout is drawn by example, so that rows, devices and accumulation affect only the speed. The
interface of a task is in tasks/task.py; a `Run` (train/run.py) is everything around the loop. Training starts from the
weights of --model, with a newly initialised head unless the checkpoint has the task's head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...data.batches import Features, Shapes, TrainingBatches, batches_in_epoch, plan_shapes
from ...data.json_files import write_json
from ...data.progress import counted
from ...data.tokenizers.tokenizer import Tokenizer
from ...kernels.platform import platform
from ...models.checkpoints.folder import Loaded
from ...models.checkpoints.teacher import Teacher
from ..adapt.adapters import AdaptedModel, adaptation
from ..adapt.layer_rates import Depths, parameter_depths, without_frozen_gradients
from ..errors import RunError
from ..learner import (
    Learner,
    TrainState,
    count_parameters,
    describe_dtype,
    ema_or_params,
    gradient_step,
    on_host,
    place,
)
from ..loop import Best, Fitted, InitialWeights, Stop, Training
from ..metrics import Sums
from ..progress import Progress
from ..report import write_report
from ..run import Run, start_run
from ..sharding import Replicas
from .auxiliary import forward_with_states, next_token_loss
from .config import FREE, FinetuneConfig, TaggingConfig, TeacherConfig, upgrade
from .model import check_model, load_model, make_optimiser
from .new_tagger import new_tagger
from .prediction import Predicted, Predictor, row_limit
from .tasks.tagging import TaggingTask
from .tasks.task import Task, TaskData, hold_out, settings
from .teacher import imitation, task_teacher

# --- step -------------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *teacher_params: Any,
    task: Task,
    model: Any,
    learner: Learner,
    depths: Depths,
    frozen: int,
    accumulate: int,
    unit_size: int,
    auxiliary: float = 0.0,
    teacher: Teacher | None = None,
    distil: TeacherConfig | None = None,
) -> tuple[TrainState, Sums]:
    """Do one update: minimise the mean loss of the batch's predictions.

    It is the mean of the task's loss and of the divergence from a teacher's predictions, weighted by `distil`, if there
    is a teacher; `auxiliary` times the loss of next tokens is added.
    """
    dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    one = jnp.float32(1)
    counts = {
        "tokens": ((batch["segment_ids"] > 0).sum().astype(jnp.float32), one),
        task.unit: (batch["segment_weights"].sum() / unit_size, one),
    }
    counts = {name: (replicas.sum(total), one) for name, (total, _) in counts.items()}
    weight = jnp.maximum(replicas.sum(task.weight(batch)), 1.0)
    examples = jnp.maximum(replicas.sum(batch["segment_weights"].sum()), 1.0)

    def loss(params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        params = without_frozen_gradients(params, depths, frozen)
        mode = {"deterministic": False, "rngs": {"dropout": dropout}}
        states: Any = None
        if auxiliary:
            outputs, states = forward_with_states(task, model, params, part, **mode)
        else:
            outputs = task.forward(model, params, part, **mode)
        sums = task.loss(outputs, part)
        total = sums["loss"][0]
        if teacher is not None and distil is not None:
            taught = task.forward(teacher.model, teacher_params[0], part, deterministic=True)
            apart = imitation(task, outputs, taught, part, distil.temperature)
            sums["teacher_loss"] = (apart, sums["loss"][1])
            total = (1 - distil.teacher_weight) * total + distil.teacher_weight * apart
        if not auxiliary:
            return total / weight, sums
        words = next_token_loss(model, params, states, part)
        sums["auxiliary_loss"] = (words, part["segment_weights"].sum())
        return total / weight + auxiliary * words / examples, sums

    state, sums, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss, accumulate=accumulate)
    return state, {**sums, "gradient_norm": (norm, one), **counts}


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedData:
    """Examples and their features."""

    train: Features
    evaluation: Mapping[str, tuple[Sequence[Any], Features]]
    prediction: Mapping[str, tuple[Sequence[Any], Features]]


def sampled_train(config: FinetuneConfig, train: Sequence[Any]) -> Sequence[Any]:
    """Return the examples to train on."""
    if config.train_examples and config.train_examples < len(train):
        return hold_out(train, config.train_examples / len(train), config.seed)[1]
    return train


def encode_data(
    config: FinetuneConfig, task: Task, data: TaskData, tokenizer: Tokenizer, progress: Progress
) -> EncodedData:
    """Encode all splits, and report their sizes."""
    train = sampled_train(config, data.train)

    def encode(name: str, examples: Sequence[Any]) -> Features:
        features = task.encode(tokenizer, examples)
        cut = f", {counted(features.truncated, 'token')} cut off" if features.truncated else ""
        note = f", {features.note}" if features.note else ""
        progress.line(
            f"{name}: {counted(len(examples), 'example')}, {len(features.input_ids):,} tokens in "
            f"{counted(features.count, 'feature')} of up to {int(features.lengths.max()):,}{cut}{note}"
        )
        return features

    def sampled(name: str, examples: Sequence[Any]) -> Sequence[Any]:
        few = config.eval_examples
        return (
            hold_out(examples, few / len(examples), seed=0)[1]
            if 0 < few < len(examples) and name != "test"
            else examples
        )

    for note in data.notes:
        progress.line(note)
    evaluation = {name: sampled(name, examples) for name, examples in data.evaluation.items()}
    features = encode("train", train)
    task.check(features, train)
    return EncodedData(
        features,
        {name: (examples, encode(name, examples)) for name, examples in evaluation.items()},
        {name: (examples, encode(name, examples)) for name, examples in data.prediction.items()},
    )


# --- run --------------------------------------------------------------------------------------------------------------


class Evaluation:
    """Evaluation: metrics and mean loss of the first evaluation split.

    `latest` is the last evaluated state and its predictions, so that the end of a run need not predict again.
    """

    def __init__(self, task: Task, predictor: Predictor, examples: Sequence[Any], features: Features):
        self._task, self._predictor = task, predictor
        self._examples, self._features = examples, features
        self.latest: tuple[TrainState, Predicted] | None = None

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        predicted = self._predictor(ema_or_params(state), self._features, stop)
        if predicted is None:
            return None
        self.latest = state, predicted
        return {**predicted.means, **self._task.metrics(predicted.collected, self._features, self._examples)}


def finetune(config: Any, run_config: FinetuneConfig, task: Task, read: Callable[[], TaskData]) -> int:
    """Fine-tune; return the exit status.

    Args:
        config: whole configuration of the command, with `run_config` as its field `run`.
        run_config: settings shared by all tasks.
        task: the task.
        read: reads the examples.
    """
    with start_run(run_config, FREE, command=config, upgrade=upgrade) as run:
        return _finetune(run, run_config, task, read)


def _finetune(run: Run, c: FinetuneConfig, task: Task, read: Callable[[], TaskData]) -> int:
    check_model(c, task)
    data = read()
    loaded, origin = starting(c, task, data, run.progress)
    if loaded.tokenizer is None:
        raise RunError(f"{c.model}: no tokenizer files in this folder (tokenizer.json or vocab.txt).")
    pad_id, plain = loaded.tokenizer.pad_id, loaded.model
    plan = adaptation(c.adapt, plain, loaded.params)
    if plan is not None:
        extended = plan.extend(loaded.params, jax.random.key(c.seed))
        loaded = loaded._replace(model=AdaptedModel(plain, plan), params=extended)
    teacher = task_teacher(c, task, loaded.tokenizer)
    if teacher is not None:
        run.progress.line(f"teacher: {count_parameters(teacher.params):,} parameters, from {teacher.folder}")
    encoded = encode_data(c, task, data, loaded.tokenizer, run.progress)
    features = encoded.train
    per_epoch = batches_in_epoch(features.units, c.batch_size)
    steps = c.steps or max(1, round(c.epochs * per_epoch))
    learner = make_optimiser(c, task, loaded, steps, None if plan is None else plan.trains)
    divisor = run.parallelism.divisor * c.accumulate
    shapes = plan_shapes(
        features.unit_lengths,
        features.unit_size,
        batch=c.batch_size,
        seed=c.seed,
        epochs=-(-steps // per_epoch),
        positions=min(row_limit(found.config) for found in (loaded, teacher) if found is not None),
        divisor=divisor,
        multiple=8 if platform() == "cpu" else 128,  # of the attention kernels' blocks
    )
    describe(run, c, task.unit, loaded, shapes, features, learner)
    index, count = run.parallelism.share(divisor)
    batches = TrainingBatches(
        features, batch=c.batch_size, shapes=shapes, seed=c.seed, pad_id=pad_id, index=index, count=count
    )
    step = partial(
        train_step,
        task=task,
        model=loaded.model,
        learner=learner,
        depths=parameter_depths(loaded.model),
        frozen=c.freeze_layers,
        accumulate=c.accumulate,
        unit_size=features.unit_size,
        auxiliary=c.auxiliary_lm,
        teacher=teacher,
        distil=c.distil,
    )
    predictor = Predictor(task, loaded.model, pad_id, run.parallelism, run.progress)
    first, evaluated = next(iter(encoded.evaluation.items()))
    evaluate = Evaluation(task, predictor, *evaluated)
    export_best = c.select == "best" or (c.select is None and c.patience > 0)
    training = Training(
        learner=learner,
        step=step,
        steps=steps,
        batches=batches,
        evaluate=evaluate,
        evaluate_every=c.loop.evaluate_every or max(1, round(c.evaluate_epochs * per_epoch)),
        shown=("loss",) if teacher is None else ("loss", "teacher_loss"),
        counted={"tokens": "real tokens/s", task.unit: f"{task.unit}/s"},
        initial=InitialWeights(lambda: loaded.params, origin),
        best=Best(task.best, c.patience, run.keep_best) if export_best else None,
        fixed=() if teacher is None else (run.parallelism.place_model(teacher.model, teacher.params),),
    )
    fitted = run.fit(training)
    if fitted.stopped is not None:
        return fitted.exit_status
    chosen = ema_or_params(fitted.state)
    if export_best:
        chosen = jax.tree.map(place, chosen, run.best_params())
    params = on_host(chosen)
    known: dict[str, Predicted] = {}
    if evaluate.latest is not None and evaluate.latest[0] is fitted.state and not export_best:
        known[first] = evaluate.latest[1]
    metrics: dict[str, dict[str, float]] = {}
    for split, (examples, some) in {**encoded.evaluation, **encoded.prediction}.items():
        predicted = known.get(split) or predictor(chosen, some)
        assert predicted is not None
        if split in encoded.evaluation:
            metrics[split] = {**predicted.means, **task.metrics(predicted.collected, some, examples)}
            task = task.settled(metrics[split]) if len(metrics) == 1 else task
            classified = task.classified(predicted.collected, some, examples)
            if run.main and classified is not None:
                write_report(c.out / "report", split, classified)
        if run.main:
            task.write_predictions(c.out / "predictions", split, predicted.collected, some, examples)
    if plan is not None and run.main:
        plan.save(c.out / "adapter", plain, params, str(c.model))
        params = plan.merged(params)
    if run.main:
        write_json(c.out / "task.json", settings(task))
    results = run.results(task.name, fitted, figures(c, task, fitted, metrics, count_parameters(params), features))
    lines = [
        f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        for split, values in metrics.items()
    ]
    if task.explained:
        lines.append("; ".join(f"{name}: {meaning}" for name, meaning in task.explained.items()))
    run.finish(plain, params, loaded.tokenizer, results, lines)
    return fitted.exit_status


def starting(config: FinetuneConfig, task: Task, data: TaskData, progress: Progress) -> tuple[Loaded, str]:
    """Return the model to train, and where its weights are from."""
    if not (isinstance(config, TaggingConfig) and config.new and isinstance(task, TaggingTask)):
        return load_model(config, task, progress), f"the weights of {config.model}"
    vectors = "" if config.vectors is None else f", with the vectors of {config.vectors}"
    return new_tagger(config, task, sampled_train(config, data.train)), f"new weights{vectors}"


def describe(
    run: Run, config: FinetuneConfig, unit: str, loaded: Loaded, shapes: Shapes, features: Features, learner: Learner
) -> None:
    """Describe the run."""
    params = learner.shapes().params
    training = [
        leaf for leaf, here in zip(jax.tree.leaves(params), jax.tree.leaves(learner.trains), strict=True) if here
    ]
    units = min(config.batch_size, features.units)
    area = features.unit_lengths.mean() * units
    rows = " or ".join(map(str, shapes.rows))
    run.progress.line(
        f"batch: {counted(units, unit.removesuffix('s'))} in {rows} rows of {shapes.length} tokens, about "
        f"{area / (shapes.rows[-1] * shapes.length):.0%} full"
    )
    run.progress.line(
        f"model: {count_parameters(params):,} parameters, {count_parameters(training):,} of them trained, in "
        f"{describe_dtype(loaded.config.dtype)}, on {run.devices}"
    )


def figures(
    config: FinetuneConfig,
    task: Task,
    fitted: Fitted,
    metrics: Mapping[str, Mapping[str, float]],
    parameters: int,
    features: Features,
) -> dict[str, Any]:
    """Return the part of results.json that is specific to fine-tuning."""
    return {
        "model": str(config.model),
        "metrics": metrics,
        "explained": dict(task.explained),
        "best": None if fitted.best is None else {"step": fitted.best[0], task.best: fitted.best[1]},
        "parameters": parameters,
        f"training_{task.unit}": int(features.units),
        "truncated_tokens": features.truncated,
        task.unit: fitted.totals[task.unit],
        "real_tokens": fitted.totals["tokens"],
        f"{task.unit}_per_second": fitted.rate(task.unit),
        "real_tokens_per_second": fitted.rate("tokens"),
    }
