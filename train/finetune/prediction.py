"""Predict features with a fine-tuned model: shared by evaluation during training, `evaluate` and `predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ...data.batches import Features, prediction_batches
from ...data.errors import DataError
from ...data.json_files import read_object
from ...models import load
from ..config import ParallelConfig
from ..errors import RunError
from ..loop import Stop
from ..metrics import Meter, Sums
from ..progress import Progress, Work
from ..sharding import Parallelism, Replicas, start_parallelism
from .tasks.registry import make_task
from .tasks.task import Collected, Task, collect

LONGEST_ROW = 512  # maximum length of a packed row: longer ones cost more attention and save no padding


class Predicted(NamedTuple):
    """Predictions for all features."""

    collected: Collected  # on the host, in the order of the features
    means: dict[str, float]  # of the task's losses; meaningless without labels


def row_limit(config: Any) -> int:
    """Return the maximum length of a row for a model, in tokens."""
    return min(config.max_length or LONGEST_ROW, LONGEST_ROW)


class Predictor:
    """Run a model on features, in rows of few shapes, so that later calls reuse the compiled programs.

    Args:
        task: the task, which selects the outputs to collect.
        model: the model.
        pad_id: id of the padding token.
        parallelism: the devices.
        progress: where to show progress.
    """

    def __init__(self, task: Task, model: Any, pad_id: int, parallelism: Parallelism, progress: Progress):
        self._progress, self._unit = progress, task.unit
        self._pad_id, self._parallelism, self._longest = pad_id, parallelism, row_limit(model.config)

        def step(params: Any, batch: dict[str, jax.Array], replicas: Replicas) -> tuple[Collected, Sums]:
            outputs = task.forward(model, params, batch, deterministic=True)
            return replicas.gather(task.select(outputs, batch)), replicas.sum(task.loss(outputs, batch))

        self._step = parallelism.compile_evaluate(step)

    def __call__(self, params: Any, features: Features, stop: Stop | None = None) -> Predicted | None:
        """Predict features; return None if stopped before the end.

        Args:
            params: parameters on the devices.
            features: at least one feature.
            stop: checked after every batch.

        Raises:
            RunError: the model computes NaN.
        """
        meter, parts = Meter(), []
        work, done = Work(self._progress, "predicting", features.units, self._unit), 0
        divisor = self._parallelism.divisor
        index, count = self._parallelism.share(divisor)
        for placed in prediction_batches(features, pad_id=self._pad_id, positions=self._longest, divisor=divisor):
            share = len(placed.features) // count
            mine = {name: values[index * share : (index + 1) * share] for name, values in placed.batch.items()}
            collected, sums = jax.device_get(self._step(params, self._parallelism.shard_batch(mine)))
            meter.add(sums)
            parts.append((collected, placed))
            done += int((placed.features >= 0).sum()) // features.unit_size
            work.update(done)
            if stop is not None and stop.requested:
                return None
        collected, means = collect(parts, features), meter.means()
        for name, values in {**collected.segment, **collected.token, **means}.items():
            if np.isnan(values).any():
                raise RunError(f"the model's {name} are not numbers (NaN) for some {self._unit}: nothing is predicted.")
        return Predicted(collected, means)


class FinetunedRun(NamedTuple):
    """A finished run, ready to predict."""

    task: Task
    tokenizer: Any
    predictor: Predictor
    params: Any

    def predict(self, examples: Sequence[Any]) -> tuple[Features, Predicted]:
        """Encode and predict examples."""
        features = self.task.encode(self.tokenizer, examples)
        predicted = self.predictor(self.params, features)
        assert predicted is not None
        return features, predicted


def open_run(folder: Path, config: ParallelConfig, **changes: Any) -> FinetunedRun:
    """Open the model and the task of a `finished_run`; `changes` are those of `models.load`."""
    path = folder / "task.json"
    task = make_task(read_object(path), str(path))
    parallelism = start_parallelism(config)
    loaded = load(folder / "model", **changes)
    predictor = Predictor(task, loaded.model, loaded.tokenizer.pad_id, parallelism, Progress())
    return FinetunedRun(task, loaded.tokenizer, predictor, parallelism.place_model(loaded.model, loaded.params))


def read_examples(task: Task, path: Path, split: str, *, labelled: bool) -> list[Any]:
    """Read examples by `task.read`; raise an error if there are none."""
    examples = task.read(path, split, labelled=labelled)
    if not examples:
        raise DataError(f"{path}: no examples in it.")
    return examples
