"""GLUE (Wang et al. 2018): the nine tasks and the diagnostic set, from the official TSV files or tensorflow-datasets.

The files have no quoting: a quote is an ordinary character. CoLA's training and development files have no header. Some
rows of QQP's files are truncated; they are skipped and counted, as in tensorflow-datasets. Classes are numbered as in
tensorflow-datasets; submissions use the class names of the TSV files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..corpus.tfds import TFDS_PREFIX, decoded, glue_config, is_tfds, open_tfds, prepared_folder
from ..errors import DataError
from ..json_files import read_object, value_of
from .tables import Row, TextExample, class_of, field_of, number_of, read_table, tab_records, text_of


@dataclass(frozen=True)
class GlueTask:
    """Storage, metrics and submission format of a GLUE task."""

    name: str
    """name in `bestiary finetune NAME` and in tensorflow-datasets"""
    folder: str
    """folder of the official download"""
    first: str
    """column of the text, or of the first text"""
    second: str | None
    """column of the second text"""
    label: str
    """column of the label"""
    labels: tuple[str, ...] | None
    """class names in the TSV files, in the order of their numbers; None for regression"""
    label_names: tuple[str, ...] | None
    """readable class names"""
    metrics: tuple[str, ...]
    """official metrics; the task's score is their mean"""
    submission: str
    """stem of the submission file for the GLUE server"""
    evaluation: tuple[str, ...] = ("dev",)
    """splits with labels besides `train`"""
    test: tuple[str, ...] = ("test",)
    """splits without labels"""
    header: tuple[str, ...] | None = None
    """columns of the training and development files if these have no header"""
    cut_rows: bool = False
    """whether the official files contain truncated rows"""
    columns: tuple[tuple[str, str], ...] = ()
    """(column above, alternative name) in some files"""
    tfds_columns: tuple[tuple[str, str], ...] = ()
    """(column above, alternative name) in tensorflow-datasets"""
    range: tuple[float, float] | None = None
    """lowest and highest value, for regression"""


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
TWO_DEVS: dict[str, Any] = dict(
    evaluation=("dev_matched", "dev_mismatched"),
    test=("test_matched", "test_mismatched"),
)

GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            "CoLA",
            "sentence",
            None,
            "label",
            BINARY,
            ("unacceptable", "acceptable"),
            ("matthews",),
            "CoLA",
            header=("source", "label", "star", "sentence"),
        ),
        GlueTask("sst2", "SST-2", "sentence", None, "label", BINARY, ("negative", "positive"), ("accuracy",), "SST-2"),
        GlueTask(
            "mrpc",
            "MRPC",
            "#1 String",
            "#2 String",
            "Quality",
            BINARY,
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            "MRPC",
            tfds_columns=(("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label")),
        ),
        GlueTask(
            "stsb",
            "STS-B",
            "sentence1",
            "sentence2",
            "score",
            None,
            None,
            ("pearson", "spearman"),
            "STS-B",
            tfds_columns=(("score", "label"),),
            range=(0.0, 5.0),
        ),
        GlueTask(
            "qqp",
            "QQP",
            "question1",
            "question2",
            "is_duplicate",
            BINARY,
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            "QQP",
            cut_rows=True,
            tfds_columns=(("is_duplicate", "label"),),
        ),
        GlueTask(
            "mnli",
            "MNLI",
            "sentence1",
            "sentence2",
            "gold_label",
            INFERENCE,
            INFERENCE,
            ("accuracy",),
            "MNLI",
            **TWO_DEVS,
            tfds_columns=(("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label")),
        ),
        GlueTask("qnli", "QNLI", "question", "sentence", "label", ENTAILMENT, ENTAILMENT, ("accuracy",), "QNLI"),
        GlueTask("rte", "RTE", "sentence1", "sentence2", "label", ENTAILMENT, ENTAILMENT, ("accuracy",), "RTE"),
        GlueTask(
            "wnli",
            "WNLI",
            "sentence1",
            "sentence2",
            "label",
            BINARY,
            ("not_entailment", "entailment"),
            ("accuracy",),
            "WNLI",
        ),
        GlueTask(
            "ax",
            "AX",
            "sentence1",
            "sentence2",
            "Label",
            INFERENCE,
            INFERENCE,
            ("matthews",),
            "AX",
            evaluation=(),
            columns=(("sentence1", "Premise"), ("sentence2", "Hypothesis")),
            tfds_columns=(("sentence1", "premise"), ("sentence2", "hypothesis"), ("Label", "label")),
        ),
    )
}
FINETUNED = tuple(name for name in GLUE if name != "ax")
"""Tasks with training data; AX has none and evaluates an MNLI model."""
if TYPE_CHECKING:
    GlueName = str
else:
    GlueName = Literal[FINETUNED]

TFDS_SPLITS = {"dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}
_AT_ONCE = 256  # examples
FILES = {"ax": ("AX.tsv", "diagnostic.tsv", "diagnostic-full.tsv")}
FOLDERS = {"ax": ("AX", "diagnostic", "MNLI")}


@dataclass
class GlueSplit:
    """A split as it was read."""

    examples: list[TextExample]
    cut_rows: int = 0
    """number of truncated rows that were skipped"""


def glue_source(task: GlueTask, path: str | Path) -> Path:
    """Return the folder of a task: `path` itself, or the task's folder in it.

    Raises:
        DataError: there is no such folder.
    """
    if str(path).startswith(TFDS_PREFIX):
        return Path(path)
    path = Path(path)
    if path.is_file() or (path.is_dir() and is_tfds(path)):
        return path
    for folder in (path, *(path / name for name in FOLDERS.get(task.name, (task.folder,)))):
        if folder.is_dir() and any(
            _split_file(task, folder, split) for split in ("train", *task.evaluation, *task.test)
        ):
            return folder
    expected = ", ".join(FILES.get(task.name) or (f"{split}.tsv" for split in ("train", *task.evaluation, *task.test)))
    if not path.exists():
        raise DataError(f"{path}: no such folder. Expected GLUE's {task.folder} folder, or its parent folder.")
    raise DataError(f"{path}: expected {task.folder}'s files ({expected}), or a folder {task.folder} with them.")


def has_split(task: GlueTask, path: str | Path, split: str) -> bool:
    """Tell whether a split exists."""
    path = glue_source(task, path)
    if str(path).startswith(TFDS_PREFIX) or is_tfds(path):
        described = _tfds_folder(path) / "dataset_info.json"
        splits = value_of(read_object(described), "splits", list[dict], str(described))
        return TFDS_SPLITS.get(split, split) in [there.get("name") for there in splits]
    return path.is_file() or _split_file(task, path, split) is not None


def has_labels(task: GlueTask, path: str | Path, split: str) -> bool:
    """Tell whether the first example of a split has a label; the full file of the diagnostic set has labels."""
    path = glue_source(task, path)
    if str(path).startswith(TFDS_PREFIX) or is_tfds(path):
        row = next(_tfds_rows(task, path, split), None)
    else:
        file = path if path.is_file() else _split_file(task, path, split)
        row = None if file is None else next(read_table(file), None)
    label = None if row is None else row.fields.get(task.label)
    return label is not None and label != -1


def _split_file(task: GlueTask, folder: Path, split: str) -> Path | None:
    names = FILES.get(task.name, (f"{split}.tsv",))
    found = (folder / f"{name}{ending}" for name in names for ending in ("", ".gz", ".zst"))
    return next((file for file in found if file.is_file()), None)


def read_glue(task: GlueTask, path: str | Path, split: str, *, labelled: bool) -> GlueSplit:
    """Read the examples of a split.

    Args:
        task: the task.
        path: the task's folder, the folder of all tasks, one file, a prepared tensorflow-datasets folder, or tfds:NAME.
        split: "train", or one of the task's `evaluation` or `test`.
        labelled: whether to read labels; a test split has none.

    Raises:
        DataError: a row is invalid (with file and line), or the split is empty.
    """
    path = glue_source(task, path)
    found = GlueSplit([])
    if str(path).startswith(TFDS_PREFIX) or is_tfds(path):
        rows = _tfds_rows(task, path, split)
    else:
        file = path if path.is_file() else _split_file(task, path, split)
        if file is None:
            raise DataError(f"{path}: no {split}.tsv, the {split} split of {task.folder}.")
        path = file
        header = task.header if task.header is not None and not _names_columns(file) else None

        def cut() -> None:
            found.cut_rows += 1

        rows = read_table(file, header=header, on_short=cut if task.cut_rows else None)
    keys: set[str] = set()
    for number, row in enumerate(rows):
        example, named = _example(task, row, number, labelled)
        if named and example.key in keys:
            raise DataError(f"{row.where}: another row before has the id {example.key!r} too.")
        keys.add(example.key)
        found.examples.append(example)
    if not found.examples:
        raise DataError(f"{path}: the file is empty.")
    return found


def _names_columns(file: Path) -> bool:
    """Tell whether a CoLA file has a header: the test file does."""
    first = next((fields for _, fields in tab_records(file) if fields), [])
    return first[:1] == ["index"]


def _tfds_folder(path: str | Path) -> Path:
    named = str(path).startswith(TFDS_PREFIX)
    return prepared_folder(str(path).removeprefix(TFDS_PREFIX)) if named else Path(path)


def _tfds_rows(task: GlueTask, path: str | Path, split: str) -> Iterator[Row]:
    """Yield a split's examples, with the columns of the TSV files."""
    config = glue_config(_tfds_folder(path))
    if config is not None and not str(config).startswith(task.name):
        raise DataError(f"{path}: GLUE's data set {config}, expected {task.name}.")
    names = {other: column for column, other in task.tfds_columns}
    for number, example in open_tfds(_tfds_folder(path), TFDS_SPLITS.get(split, split), str(path)).windows(_AT_ONCE):
        where = f"{path}, example {number} of split {split!r}"
        yield Row({names.get(name, name): decoded(value, where) for name, value in example.items()}, where)


def _example(task: GlueTask, row: Row, number: int, labelled: bool) -> tuple[TextExample, bool]:
    """Return (the example, whether its key is in the data)."""
    label: int | float | None = None
    if labelled:
        value = field_of(row, task.label)
        if task.labels is None:
            label = number_of(value, row.where)
            if task.range is not None and not task.range[0] <= label <= task.range[1]:
                low, high = task.range
                raise DataError(
                    f"{row.where}: the {task.label} is {value!r}, expected a number from {low:g} to {high:g}."
                )
        elif isinstance(value, int | np.integer):  # tensorflow-datasets' number
            label = class_of(str(value), [str(number) for number in range(len(task.labels))], row.where)
        else:
            label = class_of(value, task.labels, row.where)
    second = None if task.second is None else text_of(row, _column(task, row, task.second))
    keys = [str(row.fields[name]) for name in ("index", "idx", "id") if name in row.fields]
    first = text_of(row, _column(task, row, task.first))
    return TextExample(first, second, label, keys[0] if keys else str(number), row.where), bool(keys)


def _column(task: GlueTask, row: Row, name: str) -> str:
    names = (name, *(other for column, other in task.columns if column == name))
    return next((name for name in names if name in row.fields), name)
