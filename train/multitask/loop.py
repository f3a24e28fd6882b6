"""The training loop of several tasks, from a file of tasks to a checkpoint folder.

A step takes a batch of one task; its loss is the mean of the batch's examples, and what is drawn at random depends on
the numbers of rows alone. A `Run` (train/run.py) is everything around the loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.images.augment import Augmentation
from ...data.multitask.examples import Examples, TaskRows, evaluation_batches
from ...data.multitask.mixture import Mixture, of_task
from ...data.progress import counted
from ...models.multimodal.unit import Unit, UnitTask
from ...models.registry import init_params
from ..adapt.layer_rates import boxed_shapes
from ..errors import RunError
from ..images.loss import class_sums, evaluate
from ..learner import (
    Learner,
    TrainState,
    count_parameters,
    describe_dtype,
    ema_or_params,
    gradient_step,
    make_learner,
    on_host,
    place,
)
from ..loop import Best, InitialWeights, Stop, Training
from ..metrics import Sums
from ..optim.schedule import schedule
from ..progress import Progress, Work
from ..report import Classified, write_report
from ..run import Run, start_run
from ..sharding import Parallelism, Replicas
from .config import FREE, TrainConfig
from .model import Inputs, Start, make_start
from .task_file import TaskFile, TaskPart, read_task_file
from .tasks import encode, read_task

EVALUATED = 250  # examples per batch of an evaluation, about


@dataclass(frozen=True, kw_only=True)
class Command:
    """All that determines a run: the command line, and the content of the file."""

    run: TrainConfig
    file: dict[str, Any]


# --- step -------------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    model: Unit,
    learner: Learner,
    accumulate: int,
) -> tuple[TrainState, Sums]:
    """Do one update: minimise the mean loss of a batch of one task."""
    dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    name, arrays = of_task(batch)
    task = model.config.task(name)
    one = jnp.float32(1)
    count = replicas.sum(jnp.float32(len(arrays["labels"])))

    def loss(params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        _, part = of_task(part)
        logits = forward(model, params, task, part, rows=part["rows"], deterministic=False, rngs={"dropout": dropout})
        sums = class_sums(logits, part, task.loss, 0.0)
        named = {f"{name}/{key}": pair for key, pair in sums.items()}
        return sums["loss"][0] / count, {"loss": sums["loss"], **named}

    state, sums, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss, accumulate=accumulate)
    return state, {**sums, "gradient_norm": (norm, one), "examples": (count, one)}


def forward(model: Unit, params: Any, task: UnitTask, batch: Mapping[str, Any], **mode: Any) -> jax.Array:
    """Compute the logits [B, classes] of a batch of a task; see `Examples.batch`."""
    inputs = (batch.get(name) for name in ("pixel_values", "input_ids", "segment_ids", "token_type_ids"))
    logits: Any = model.apply({"params": params}, *inputs, task=task.name, has_image=batch.get("has_image"), **mode)
    return logits


# --- evaluation -------------------------------------------------------------------------------------------------------


class Answerer:
    """Compute the logits of examples.

    Args:
        model: the model.
        inputs: preprocessing and tokenizer.
        parallelism: the devices.
        progress: where to show progress.
    """

    def __init__(self, model: Unit, inputs: Inputs, parallelism: Parallelism, progress: Progress):
        self._inputs, self._parallelism, self._progress = inputs, parallelism, progress

        def step(params: Any, batch: Any, replicas: Replicas) -> jax.Array:
            name, arrays = of_task(batch)
            return replicas.gather(forward(model, params, model.config.task(name), arrays))

        self._step = parallelism.compile_evaluate(step)

    def __call__(
        self, params: Any, task: str, examples: Examples, stop: Stop | None = None, size: int = EVALUATED
    ) -> np.ndarray | None:
        """Compute the logits of all examples, [n, classes] float32; None if stopped.

        Raises:
            RunError: the model computes NaN.
        """
        divisor = self._parallelism.divisor
        size = -(-min(size, examples.count) // divisor) * divisor
        index, count = self._parallelism.share(size)
        mine = slice(index * size // count, (index + 1) * size // count)
        work, done, found = Work(self._progress, f"predicting {task}", examples.count, "examples"), 0, None
        for numbers, batch in evaluation_batches(examples, self._inputs.processor, size):
            named = {f"{task}/{key}": values[mine] for key, values in batch.items() if key != "labels"}
            logits = np.asarray(jax.device_get(self._step(params, self._parallelism.shard_batch(named))), np.float32)
            found = np.zeros((examples.count, logits.shape[-1]), np.float32) if found is None else found
            found[numbers] = logits[: len(numbers)]
            done += len(numbers)
            work.update(done)
            if stop is not None and stop.requested:
                return None
        if found is None or np.isnan(found).any():
            raise RunError(f"the model's logits of {task} are not numbers (NaN): nothing is predicted.")
        return found


class Evaluation:
    """Evaluation of every task on the first of its splits; `latest` is the last evaluated state and its logits."""

    def __init__(self, answerer: Answerer, splits: Mapping[str, Mapping[str, Examples]], losses: Mapping[str, str]):
        self._answerer, self._losses = answerer, losses
        self._first = {name: next(iter(own.items())) for name, own in splits.items()}
        self.latest: tuple[TrainState, dict[tuple[str, str], np.ndarray]] | None = None

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        params, found, values = ema_or_params(state), {}, {}
        for name, (split, examples) in self._first.items():
            logits = self._answerer(params, name, examples, stop)
            if logits is None:
                return None
            found[name, split] = logits
            metrics = evaluate(logits, examples.labels, self._losses[name])
            values |= {f"{name}/{key}": metrics[key] for key in ("loss", "accuracy")}
        self.latest = state, found
        return {"accuracy": float(np.mean([values[f"{name}/accuracy"] for name in self._first])), **values}


# --- run --------------------------------------------------------------------------------------------------------------


def main(config: TrainConfig) -> int:
    """Run `bestiary multitask train`; return the exit status."""
    file = read_task_file(config.config)
    with start_run(config, FREE, command=Command(run=config, file=file.to_json())) as run:
        return _train(run, config, file)


def _train(run: Run, c: TrainConfig, file: TaskFile) -> int:
    data = {name: read_task(name, part) for name, part in file.tasks.items()}
    texts = [text for one in data.values() for text in one.training_texts()]
    start = make_start(c, file, [one.task for one in data.values()], texts)
    model, inputs = start.model, start.inputs
    examples = {name: encode(one, inputs.tokenizer, inputs.longest, c.seed, run.progress) for name, one in data.items()}
    rate = schedule(c.optim, [(c.steps, None)])
    initialise = partial(_zeros if start.loaded else init_params, model)
    learner = make_learner(initialise, optim=c.optim, rate=rate, seed=c.seed)
    _describe(run, c, start, learner)
    index, count = run.parallelism.share(c.batch_size)
    rows = {
        name: TaskRows(
            examples[name]["train"],
            inputs.processor,
            augmentation(part),
            batch=c.batch_size,
            seed=c.seed,
            task=number,
        )
        for number, (name, part) in enumerate(file.tasks.items())
    }
    shares = {name: part.share for name, part in file.tasks.items()}
    splits = {name: {key: own for key, own in found.items() if key != "train"} for name, found in examples.items()}
    answerer = Answerer(model, inputs, run.parallelism, run.progress)
    evaluation = Evaluation(answerer, splits, {task.name: task.loss for task in model.config.tasks})
    initial = InitialWeights(lambda: start.params(c.seed), "the checkpoints' encoders") if start.loaded else None
    training = Training(
        learner=learner,
        step=partial(train_step, model=model, learner=learner, accumulate=c.accumulate),
        steps=c.steps,
        batches=Mixture(rows, shares, c.batch_size, seed=c.seed, index=index, count=count, threads=c.threads),
        evaluate=evaluation,
        shown=("loss", *(f"{name}/accuracy" for name in file.tasks)),
        counted={"examples": "examples/s"},
        initial=initial,
        best=Best("accuracy", 0, run.keep_best) if c.select == "best" else None,
    )
    fitted = run.fit(training)
    if fitted.stopped is not None:
        return fitted.exit_status
    chosen = ema_or_params(fitted.state)
    if c.select == "best":
        chosen = jax.tree.map(place, chosen, run.best_params())
    known: dict[tuple[str, str], np.ndarray] = {}
    if evaluation.latest is not None and evaluation.latest[0] is fitted.state and c.select == "last":
        known = evaluation.latest[1]
    metrics: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, own in splits.items():
        for split, some in own.items():
            logits = known.get((name, split))
            logits = answerer(chosen, name, some) if logits is None else logits
            assert logits is not None
            metrics.setdefault(name, {})[split] = evaluate(logits, some.labels, model.config.task(name).loss)
            if run.main:
                classified = Classified(some.classes, some.labels, logits.argmax(axis=-1))
                write_report(c.out / "report", f"{name}-{split}", classified)
    params = on_host(chosen)
    results = run.results(
        "multitask",
        fitted,
        {
            "metrics": metrics,
            "best": None if fitted.best is None else {"step": fitted.best[0], "accuracy": fitted.best[1]},
            "parameters": count_parameters(params),
            "training_examples": {name: found["train"].count for name, found in examples.items()},
            "examples": fitted.totals["examples"],
            "examples_per_second": fitted.rate("examples"),
        },
    )
    lines = [
        f"{name}, {split}: " + "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        for name, own in metrics.items()
        for split, values in own.items()
    ]
    run.finish(model, params, inputs, results, lines)
    return fitted.exit_status


def _zeros(model: Unit, _: jax.Array) -> Any:
    """Return parameters that loaded ones replace: drawing others first would only take time to compile."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed_shapes(model))


def augmentation(part: TaskPart) -> Augmentation:
    """Return what is done to a task's training images at random."""
    return Augmentation(crop=part.crop, shift=part.shift, flip=part.flip)


def _describe(run: Run, c: TrainConfig, start: Start, learner: Learner) -> None:
    """Describe the run."""
    config, params = start.model.config, learner.shapes().params
    sides = {
        side: f"{side}s: {encoder.member.family.title}, {encoder.member.config.layers} layers of "
        f"{encoder.member.config.width}"
        for side, encoder in start.encoders.items()
    }
    vocabulary = f"; {config.vocab_size:,} tokens" if config.vocab_size else ""
    run.progress.line(
        f"model: {count_parameters(params):,} parameters ({'; '.join(sides.values())}{vocabulary}; decoder: "
        f"{config.layers} layers of {config.width}), in {describe_dtype(config.dtype)}, on {run.devices}"
    )
    run.progress.line(f"{counted(c.steps, 'step')} of {counted(c.batch_size, 'example')} of one task")
