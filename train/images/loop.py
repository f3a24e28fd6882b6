"""The training loop of image classifiers, from files to a checkpoint folder.

A step takes the same number of images; its loss is their mean, and what is drawn at random depends on the numbers of
rows alone. A `Run` (train/run.py) is everything around the loop.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.images.augment import Augmentation
from ...data.images.reading import read_images
from ...data.images.sets import ImageSet, hold_out
from ...data.images.stream import Rows, TrainingBatches, evaluation_batches
from ...data.progress import counted
from ...data.random import RandomStream
from ...models.heads.with_head import encoder_inputs
from ...models.registry import init_params
from ..adapt.adapters import Adaptation, AdaptedModel, adaptation
from ..adapt.layer_rates import both, boxed_shapes, layer_rates, parameter_depths, without_frozen_gradients
from ..errors import RunError
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
from ..report import Classified, write_report
from ..run import Run, start_run
from ..sharding import Replicas
from .config import FREE, FinetuneConfig, ImagesConfig, TrainConfig, stored_settings
from .loss import class_sums, evaluate
from .model import Start, loaded_model, new_model
from .prediction import Classifier

EVALUATED = 250  # images per batch of an evaluation, about

# --- step -------------------------------------------------------------------------------------------------------------


def nothing_frozen(params: Any) -> Any:
    """Return the parameters as they are: all of them are trained."""
    return params


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    model: Any,
    learner: Learner,
    config: ImagesConfig,
    frozen: Callable[[Any], Any] = nothing_frozen,
) -> tuple[TrainState, Sums]:
    """Do one update: minimise the mean loss of the batch's images; `frozen` stops gradients to frozen layers."""
    dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    one = jnp.float32(1)
    images = replicas.sum(jnp.float32(len(batch["labels"])))

    def loss(params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        inputs = encoder_inputs(model.config, part)
        logits = model.apply(
            {"params": frozen(params)}, *inputs, rows=part["rows"], deterministic=False, rngs={"dropout": dropout}
        )
        sums = class_sums(logits, part, config.loss, config.label_smoothing)
        return sums["loss"][0] / images, sums

    state, sums, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss, accumulate=config.accumulate)
    return state, {**sums, "gradient_norm": (norm, one), "images": (images, one)}


# --- run --------------------------------------------------------------------------------------------------------------


def main(config: TrainConfig | FinetuneConfig) -> int:
    """Run `bestiary images train` or `finetune`; return the exit status."""
    with start_run(config, FREE) as run:
        return _train(run, config)


def read_splits(config: ImagesConfig, run: Run) -> tuple[ImageSet, dict[str, ImageSet]]:
    """Read the data: (training images, split -> images to evaluate on, the one that selects first).

    Raises:
        RunError: a split has no images.
    """
    found = dict(
        read_images(config.data, config.eval_data, path_column=config.path_column, label_column=config.label_column)
    )
    train = found.pop("train")
    evaluation = {split: found[split] for split in ("dev", "test") if split in found}
    divided = "" if evaluation else f" with --held-out {config.held_out}"
    if not evaluation:
        train, evaluation["dev"] = hold_out(train, config.held_out, config.seed)
    if config.train_examples and config.train_examples < len(train.labels):
        order = RandomStream(config.seed, len(train.labels)).permutation(len(train.labels))
        train = train.only(np.sort(order[: config.train_examples]))
    for split, images in {"train": train, **evaluation}.items():
        if not len(images.labels):
            raise RunError(f"{split}: no images{divided}.")
        seen = np.bincount(images.labels, minlength=len(train.classes))
        run.progress.line(f"{split}: {counted(len(images.labels), 'image')} of {int((seen > 0).sum())} classes")
        absent = [train.classes[number] for number in np.flatnonzero(seen == 0)]
        if absent:
            run.progress.line(f"{split}: no images of {', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}")
    return train, evaluation


class Evaluation:
    """Evaluation on one split; `latest` is the last evaluated state and its logits."""

    def __init__(self, classifier: Classifier, start: Start, images: ImageSet, batch: int, loss: str):
        self._classifier, self._start, self.images, self._batch = classifier, start, images, batch
        self._loss = loss
        self.latest: tuple[TrainState, np.ndarray] | None = None

    def logits(self, params: Any, stop: Stop | None = None) -> Any:
        """Compute the logits of the split; None if stopped."""
        batches = evaluation_batches(self.images, self._start.processor, self._batch)
        return self._classifier(params, batches, len(self.images.labels), stop)

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        logits = self.logits(ema_or_params(state), stop)
        if logits is None:
            return None
        self.latest = state, logits
        return evaluate(logits, self.images.labels, self._loss)


def _train(run: Run, c: TrainConfig | FinetuneConfig) -> int:
    train, evaluation = read_splits(c, run)
    start = new_model(c, train) if isinstance(c, TrainConfig) else loaded_model(c, train, run.progress)
    per_epoch = max(1, round(len(train.labels) / c.batch_size))
    steps = c.steps or max(1, round(c.epochs * len(train.labels) / c.batch_size))
    plan, frozen = None, nothing_frozen
    plain = model = start.model
    if isinstance(c, FinetuneConfig):
        assert start.params is not None
        plan = adaptation(c.adapt, plain, start.params)
        if plan is not None:
            model = AdaptedModel(plain, plan)
            start = start._replace(params=plan.extend(start.params, jax.random.key(c.seed)))
        frozen = partial(without_frozen_gradients, depths=parameter_depths(model), frozen=c.freeze_layers)
    learner = _learner(c, model, plan, steps)
    _describe(run, c, start, learner, steps)
    index, count = run.parallelism.share(c.batch_size)
    rows = Rows(train, start.processor, Augmentation(**stored_settings(c)), c.seed)
    divisor = run.parallelism.divisor
    classifier = Classifier(model, run.parallelism, run.progress)
    tests = {
        split: Evaluation(
            classifier, start, images, -(-min(EVALUATED, len(images.labels)) // divisor) * divisor, c.loss
        )
        for split, images in evaluation.items()
    }
    first = next(iter(tests.values()))
    export_best = c.select == "best" or (c.select is None and c.patience > 0)
    initial = None if start.params is None else InitialWeights(lambda: start.params, f"the weights of {c.model}")
    training = Training(
        learner=learner,
        step=partial(train_step, model=model, learner=learner, config=c, frozen=frozen),
        steps=steps,
        batches=TrainingBatches(rows, c.batch_size, index=index, count=count, threads=c.threads),
        evaluate=first,
        evaluate_every=c.loop.evaluate_every or max(1, round(c.evaluate_epochs * per_epoch)),
        shown=("loss", "accuracy"),
        counted={"images": "images/s"},
        initial=initial,
        best=Best("accuracy", c.patience, run.keep_best) if export_best else None,
    )
    fitted = run.fit(training)
    if fitted.stopped is not None:
        return fitted.exit_status
    chosen = ema_or_params(fitted.state)
    if export_best:
        chosen = jax.tree.map(place, chosen, run.best_params())
    metrics: dict[str, Mapping[str, float]] = {}
    for split, test in tests.items():
        known = test.latest is not None and test.latest[0] is fitted.state and not export_best
        logits = test.latest[1] if known and test.latest is not None else test.logits(chosen)
        metrics[split] = evaluate(logits, test.images.labels, c.loss)
        if run.main:
            write_report(c.out / "report", split, Classified(train.classes, test.images.labels, logits.argmax(axis=-1)))
    params = on_host(chosen)
    if plan is not None and run.main:
        plan.save(c.out / "adapter", plain, params, str(c.model))
        params = plan.merged(params)
    results = run.results(
        "images",
        fitted,
        {
            "model": str(c.model),
            "metrics": metrics,
            "best": None if fitted.best is None else {"step": fitted.best[0], "accuracy": fitted.best[1]},
            "parameters": count_parameters(params),
            "training_images": len(train.labels),
            "images": fitted.totals["images"],
            "images_per_second": fitted.rate("images"),
        },
    )
    lines = [
        f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        for split, values in metrics.items()
    ]
    run.finish(plain, params, start.processor, results, lines)
    return fitted.exit_status


def _learner(c: TrainConfig | FinetuneConfig, model: Any, plan: Adaptation | None, steps: int) -> Learner:
    """Return the learner of a new model, or of a checkpoint's with the rates of its layers."""
    rate = schedule(c.optim, [(steps, None)])
    if isinstance(c, TrainConfig):
        return make_learner(partial(init_params, model), optim=c.optim, rate=rate, seed=c.seed)
    boxed = boxed_shapes(model)
    trains, scales = layer_rates(c, parameter_depths(model))
    return make_learner(
        lambda _: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed),
        optim=c.optim,
        rate=rate,
        seed=c.seed,
        trains=both(trains, None if plan is None else plan.trains),
        scales=scales,
    )


def _describe(run: Run, c: ImagesConfig, start: Start, learner: Learner, steps: int) -> None:
    """Describe the run."""
    config, params = start.model.config, learner.shapes().params
    pixels, side = config.image_size, config.image_size // config.patch_size
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(learner.trains), strict=True)
    trained = count_parameters([leaf for leaf, here in leaves if here])
    run.progress.line(
        f"model: {count_parameters(params):,} parameters, {trained:,} of them trained, for images of "
        f"{pixels} x {pixels} x {config.channels} in {side} x {side} patches of {config.patch_size}, in "
        f"{describe_dtype(config.dtype)}, on {run.devices}"
    )
    run.progress.line(f"{counted(steps, 'step')} of {counted(c.batch_size, 'image')}")
