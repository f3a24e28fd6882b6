"""The report of a classifier or tagger: precision, recall and F1 of each class, and the confusion matrix.

report/SPLIT.json    the numbers
report/SPLIT.txt     the same as tables
report/SPLIT.png     the confusion matrix
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.files import replacing, write_text
from ..data.json_files import write_json

MOST_NUMBERS = 25
"""Largest number of classes for which the picture shows the counts too."""


class Classified(NamedTuple):
    """Labels and predictions of n examples, words or images."""

    names: tuple[str, ...]  # of the classes
    wanted: np.ndarray  # [n] int, the classes in the data
    predicted: np.ndarray  # [n] int
    entities: Mapping[str, Mapping[str, float]] = {}  # type -> precision, recall, f1 and support of whole entities


def write_report(folder: Path, split: str, classified: Classified) -> Path:
    """Write the report of a split; return the path of the tables.

    Args:
        folder: folder of reports, which is created.
        split: name of the split.
        classified: the labels of the data and the predictions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix = confusion(classified)
    scores = class_scores(classified)
    rows = {"classes": scores} | ({"entities": dict(classified.entities)} if classified.entities else {})
    labels = list(classified.names)
    write_json(folder / f"{split}.json", {**rows, "confusion": {"labels": labels, "counts": matrix.tolist()}})
    occurs = [number for number in range(len(labels)) if matrix[number].any() or matrix[:, number].any()]
    names, counts = [labels[number] for number in occurs], matrix[np.ix_(occurs, occurs)]
    tables = [_score_table(name, {key: table[key] for key in table if key in names or name != "classes"})
              for name, table in rows.items()]  # fmt: skip
    text = "\n".join(
        [*tables, "confusion: a row is the label in the data, a column the prediction", *_grid(names, counts)]
    )
    write_text(folder / f"{split}.txt", text + "\n")
    with replacing(folder / f"{split}.png") as unfinished:
        draw_confusion(names, counts, split, unfinished)
    return folder / f"{split}.txt"


def confusion(classified: Classified) -> np.ndarray:
    """Return the counts [C, C] int64: rows are labels of the data, columns are predictions."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(classified.wanted, classified.predicted, labels=np.arange(len(classified.names)))


def class_scores(classified: Classified) -> dict[str, dict[str, float]]:
    """Return precision, recall, f1 and support (number of examples) of each class; a score of nothing is 0."""
    from sklearn.metrics import precision_recall_fscore_support

    undefined: Any = 0.0
    found = precision_recall_fscore_support(
        classified.wanted, classified.predicted, labels=np.arange(len(classified.names)), zero_division=undefined
    )
    columns = [np.asarray(column).tolist() for column in found]
    keys = ("precision", "recall", "f1", "support")
    return {name: dict(zip(keys, row, strict=True)) for name, *row in zip(classified.names, *columns, strict=True)}


def _score_table(title: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    width = max(map(len, (title, *scores)))
    head = f"{title:<{width}}  precision     recall         f1    support"
    rows = (
        f"{name:<{width}}  {row['precision']:>9.4f}  {row['recall']:>9.4f}  {row['f1']:>9.4f}  {row['support']:>9,}"
        for name, row in scores.items()
    )
    return "\n".join([head, *rows, ""])


def _grid(names: Sequence[str], counts: np.ndarray) -> list[str]:
    width = max(map(len, names))
    columns = [max(len(name), len(f"{column.max():,}")) for name, column in zip(names, counts.T, strict=True)]
    head = "  ".join([" " * width, *(f"{name:>{size}}" for name, size in zip(names, columns, strict=True))])
    rows = (
        "  ".join([f"{name:<{width}}", *(f"{count:>{size},}" for count, size in zip(row, columns, strict=True))])
        for name, row in zip(names, counts.tolist(), strict=True)
    )
    return [head, *rows]


def draw_confusion(names: Sequence[str], counts: np.ndarray, title: str, path: Path) -> None:
    """Draw a confusion matrix [C, C] as a picture; the colour is the fraction of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = min(2.5 + 0.45 * len(names), 16.0)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label in the data")
    axes.set_title(title)
    if len(names) <= MOST_NUMBERS:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=110, format="png")
