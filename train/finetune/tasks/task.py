"""What a fine-tuning task is: how its data is read and encoded, its loss, what is kept, and the official metrics.

A task is a small frozen dataclass of settings that JSON can hold. A run writes them to `task.json`, and `evaluate` and
`predict` make the task again from it. Everything else (the loop, packing, checkpoints) is the same for all tasks:
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
from ....models.heads import encoder_inputs
from ...errors import RunError
from ...metrics import Sums

Arrays = dict[str, jax.Array]


class Kept(NamedTuple):
    """What a model says of features.

    On the device, of a batch: `segment` [B, X, ...] and `token` [B, L, ...]. On the host, of all features and in their
    order: `segment` [F, ...] and `token` [T, ...].
    """

    segment: Mapping[str, Any] = {}
    token: Mapping[str, Any] = {}


class Task(Protocol):
    """One task, with its settings. B rows, L tokens, X slots of features in a row; see `data.examples.assemble`."""

    @property
    def name(self) -> str:
        """As in `bestiary finetune NAME`, and in `registry.TASKS`."""
        ...

    @property
    def head(self) -> str:
        """The kind of model, for `models.load(head=)`."""
        ...

    @property
    def best(self) -> str:
        """The metric that picks the best checkpoint; larger is better."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of a feature, special ones included."""
        ...

    def model_changes(self) -> dict[str, Any]:
        """What `models.load` is to change of the config: num_labels, label_names, problem_type."""
        ...

    def read(self, path: Path, split: str, *, labelled: bool) -> list[Any]:
        """The examples of a file or folder.

        Raises:
            DataError: with the file and the line.
        """
        ...

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Any]) -> Features:
        """The features of examples, with their labels as fields; zeros where there are none."""
        ...

    def check(self, features: Features, examples: Sequence[Any]) -> None:
        """As in `PlainTask`."""
        ...

    def forward(self, model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Any:
        """What the model says of a batch; `kwargs` are deterministic= and rngs=."""
        ...

    def weight(self, batch: Arrays) -> jax.Array:
        """[] float32, the number of predictions that the loss is the mean over; known before the model runs."""
        ...

    def loss(self, outputs: Any, batch: Arrays) -> Sums:
        """Sums and weights; the one named "loss" is minimised."""
        ...

    def keep(self, outputs: Any, batch: Arrays) -> Kept:
        """What is brought to the host of every feature."""
        ...

    def metrics(self, kept: Kept, features: Features, examples: Sequence[Any]) -> dict[str, float]:
        """The official metrics of labelled examples."""
        ...

    def write_predictions(
        self, folder: Path, split: str, kept: Kept, features: Features, examples: Sequence[Any]
    ) -> None:
        """Write the benchmark's submission files."""
        ...

    def from_words(self, words: Mapping[str, Sequence[str]]) -> list[Any]:
        """Examples from what `bestiary predict` was given on the command line.

        Raises:
            RunError: something that the task needs is missing.
        """
        ...

    def show(self, kept: Kept, features: Features, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """What was predicted, an object an example."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """As in `PlainTask`."""
        ...

    def settled(self, metrics: Mapping[str, float]) -> Self:
        """As in `PlainTask`."""
        ...


class PlainTask:
    """What few tasks have of their own; the others inherit these."""

    def check(self, features: Features, examples: Sequence[Any]) -> None:
        """Raise DataError for examples that cannot be trained on, where only their features tell."""

    @property
    def rates(self) -> Mapping[str, float]:
        """Name of a part of the model, as "classifier" -> what its learning rate is multiplied by."""
        return {}

    def settled(self, metrics: Mapping[str, float]) -> Self:
        """The task to keep, with what the metrics of the first evaluation split settle."""
        return self


class TaskData(NamedTuple):
    """Examples of a run."""

    train: Sequence[Any]
    evaluation: Mapping[str, Sequence[Any]]  # name -> labelled examples; the first decides which checkpoint is best
    prediction: Mapping[str, Sequence[Any]] = {}  # name -> examples without labels, predicted at the end
    notes: Sequence[str] = ()  # what is to be said of the data


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


def apply_segments(model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Any:
    """The model on packed rows, with one output a segment: `[B, X, ...]`."""
    return apply_tokens(model, params, batch, cls_positions=batch["cls_positions"], **kwargs)


def apply_tokens(model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Any:
    """The model on packed rows, with one output a token: `[B, L, ...]`."""
    return model.apply(
        {"params": params},
        *encoder_inputs(model.config, batch),
        rows=batch["rows"],
        **kwargs,
    )


def settings(task: Task) -> dict[str, Any]:
    """A task as the content of task.json."""
    assert dataclasses.is_dataclass(task)
    return dataclasses.asdict(task)  # type: ignore[arg-type]


def gather_kept(parts: Sequence[tuple[Kept, Any]], features: Features) -> Kept:
    """What was kept of all batches, in the order of the features.

    Args:
        parts: of each batch, what was kept, on the host, and its `data.examples.Placed`.
        features: all that were predicted, each in one of the batches.
    """
    segment: dict[str, np.ndarray] = {}
    token: dict[str, np.ndarray] = {}
    for kept, placed in parts:
        row, slot = np.nonzero(placed.features >= 0)
        numbers = placed.features[row, slot]
        for name, values in kept.segment.items():
            shape = (features.count, *values.shape[2:])
            segment.setdefault(name, np.zeros(shape, values.dtype))[numbers] = values[row, slot]
        lengths = features.lengths[numbers]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        column = np.repeat(placed.batch["cls_positions"][row, slot], lengths) + within
        target = np.repeat(features.starts[numbers], lengths) + within
        for name, values in kept.token.items():
            shape = (int(features.starts[-1]), *values.shape[2:])
            token.setdefault(name, np.zeros(shape, values.dtype))[target] = values[np.repeat(row, lengths), column]
    return Kept(segment, token)
