"""Interface of a fine-tuning task: reading and encoding data, loss, outputs to collect, and official metrics.

A task is a small frozen dataclass of JSON-compatible settings. A run writes them to `task.json`, from which `evaluate`
and `predict` build the task again. Everything else (the loop, packing, checkpoints) is the same for all tasks:
train/finetune/loop.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np

from ....data.batches import Features
from ....data.random import RandomStream
from ....data.tokenizers.tokenizer import Tokenizer
from ....models.heads.with_head import encoder_inputs
from ....models.layers.segments import ByExample
from ...errors import RunError
from ...metrics import Sums
from ...report import Classified

Arrays = dict[str, jax.Array]


class Collected(NamedTuple):
    """Outputs of a model for features, collected from its batches.

    On the device, of a batch: `segment` [B, X, ...] and `token` [B, L, ...]. On the host, of all features and in their
    order: `segment` [F, ...] and `token` [T, ...].
    """

    segment: Mapping[str, Any] = {}
    token: Mapping[str, Any] = {}


class Imitated(NamedTuple):
    """Predictions by which a student imitates its teacher."""

    logits: Any  # [..., C]
    weights: Any  # [...] float32
    values: bool = False  # whether they are values rather than logits of classes


class Task(Protocol):
    """One task, with its settings. B rows, L tokens, X slots of features in a row; see `data.batches.assemble`."""

    @property
    def name(self) -> str:
        """Name, as in `bestiary finetune NAME` and in `registry.TASKS`."""
        ...

    @property
    def head(self) -> str:
        """Kind of head, for `models.load(head=)`."""
        ...

    @property
    def best(self) -> str:
        """Metric that selects the best checkpoint; larger is better."""
        ...

    @property
    def max_length(self) -> int:
        """Maximum length of a feature, in tokens, special tokens included."""
        ...

    def model_changes(self) -> dict[str, Any]:
        """Changes of the config to pass to `models.load`: num_labels, label_names, problem_type."""
        ...

    def read(self, path: Path, split: str, *, labelled: bool) -> list[Any]:
        """Read the examples of a file or folder.

        Raises:
            DataError: the data is invalid; with file and line.
        """
        ...

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Any]) -> Features:
        """Encode examples to features, with their labels as fields; zeros if there are none."""
        ...

    def check(self, features: Features, examples: Sequence[Any]) -> None:
        """See `PlainTask`."""
        ...

    def forward(self, model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Any:
        """Run the model on a batch; `kwargs` are deterministic= and rngs=."""
        ...

    def weight(self, batch: Arrays) -> jax.Array:
        """Return the number of predictions that the loss averages over, [] float32; known before the model runs."""
        ...

    def loss(self, outputs: Any, batch: Arrays) -> Sums:
        """Return losses as sums and weights; the one named "loss" is minimised."""
        ...

    def select(self, outputs: Any, batch: Arrays) -> Collected:
        """Select the outputs to bring to the host for every feature."""
        ...

    def metrics(self, collected: Collected, features: Features, examples: Sequence[Any]) -> dict[str, float]:
        """Compute the official metrics of labelled examples."""
        ...

    @property
    def explained(self) -> Mapping[str, str]:
        """See `PlainTask`."""
        ...

    @property
    def inimitable(self) -> str | None:
        """See `PlainTask`."""
        ...

    def imitated(self, outputs: Any, batch: Arrays) -> Sequence[Imitated]:
        """Return what a student learns from the outputs of its teacher, in groups that share `weight` of the batch."""
        ...

    def classified(self, collected: Collected, features: Features, examples: Sequence[Any]) -> Classified | None:
        """See `PlainTask`."""
        ...

    def write_predictions(
        self, folder: Path, split: str, collected: Collected, features: Features, examples: Sequence[Any]
    ) -> None:
        """Write the benchmark's submission files."""
        ...

    def from_words(self, words: Mapping[str, Sequence[str]]) -> list[Any]:
        """Make examples from the texts given to `bestiary predict` on the command line.

        Raises:
            RunError: an option that the task needs is missing.
        """
        ...

    def show(self, collected: Collected, features: Features, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the predictions, one object per example."""
        ...

    @property
    def unit(self) -> str:
        """See `PlainTask`."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """See `PlainTask`."""
        ...

    def settled(self, metrics: Mapping[str, float]) -> Self:
        """See `PlainTask`."""
        ...


class PlainTask:
    """Defaults of the methods that only a few tasks override."""

    @property
    def unit(self) -> str:
        """What a batch counts (see `data.batches`), in the plural."""
        return "examples"

    def check(self, features: Features, examples: Sequence[Any]) -> None:
        """Raise DataError for examples that cannot be trained on, if this shows only in their features."""

    @property
    def explained(self) -> Mapping[str, str]:
        """What metrics mean whose names do not say it; for results.json."""
        return {}

    @property
    def inimitable(self) -> str | None:
        """Why no teacher can be imitated in this task; None if one can."""
        return None

    def classified(self, collected: Collected, features: Features, examples: Sequence[Any]) -> Classified | None:
        """Return the labels and predictions of labelled examples, for a report; None if the task has no classes."""
        return None

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning-rate factors by part of the model, such as "classifier"."""
        return {}

    def settled(self, metrics: Mapping[str, float]) -> Self:
        """Return the task to save, with settings that follow from the metrics of the first evaluation split."""
        return self


class TaskData(NamedTuple):
    """Examples of a run."""

    train: Sequence[Any]
    evaluation: Mapping[str, Sequence[Any]]  # name -> labelled examples; the first decides which checkpoint is best
    prediction: Mapping[str, Sequence[Any]] = {}  # name -> examples without labels, predicted at the end
    notes: Sequence[str] = ()  # remarks on the data, for the user


def hold_out(examples: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split examples into (remaining, held out), a random fraction, both in file order and non-empty.

    Raises:
        RunError: there are fewer than two examples.
    """
    if len(examples) < 2:
        raise RunError(f"{len(examples)} example: too few to hold one out. Give a separate file to evaluate on.")
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    chosen = set(RandomStream(seed, len(examples)).permutation(len(examples))[:count].tolist())
    return (
        [example for number, example in enumerate(examples) if number not in chosen],
        [example for number, example in enumerate(examples) if number in chosen],
    )


def apply_segments(model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Any:
    """Run the model on packed rows, with one output per segment: `[B, X, ...]`."""
    return apply_tokens(model, params, batch, cls_positions=batch["cls_positions"], **kwargs)


def apply_tokens(model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Any:
    """Run the model on packed rows, with one output per token: `[B, L, ...]`.

    Dropout is drawn by example and position within it, so that neither packing nor anything that divides a batch into
    rows and parts changes what is dropped.
    """
    return model.apply(
        {"params": params},
        *encoder_inputs(model.config, batch),
        rows=ByExample(batch["feature_ids"], batch["position_ids"]),
        **kwargs,
    )


def settings(task: Task) -> dict[str, Any]:
    """Return the content of task.json for a task."""
    assert dataclasses.is_dataclass(task)
    return dataclasses.asdict(task)  # type: ignore[arg-type]


def collect(parts: Sequence[tuple[Collected, Any]], features: Features) -> Collected:
    """Return the collected outputs of all batches, in the order of the features.

    Args:
        parts: for each batch, the collected outputs, on the host, and its `data.batches.Placed`.
        features: all predicted features, each in one of the batches.
    """
    segment: dict[str, np.ndarray] = {}
    token: dict[str, np.ndarray] = {}
    for collected, placed in parts:
        row, slot = np.nonzero(placed.features >= 0)
        numbers = placed.features[row, slot]
        for name, values in collected.segment.items():
            shape = (features.count, *values.shape[2:])
            segment.setdefault(name, np.zeros(shape, values.dtype))[numbers] = values[row, slot]
        lengths = features.lengths[numbers]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        column = np.repeat(placed.batch["cls_positions"][row, slot], lengths) + within
        target = np.repeat(features.starts[numbers], lengths) + within
        for name, values in collected.token.items():
            shape = (int(features.starts[-1]), *values.shape[2:])
            token.setdefault(name, np.zeros(shape, values.dtype))[target] = values[np.repeat(row, lengths), column]
    return Collected(segment, token)
