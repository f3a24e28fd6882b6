"""GLUE (Wang et al. 2018): the nine tasks and the diagnostic set, from the official TSV files or tensorflow-datasets.

The files have no quoting: a quote is an ordinary character. CoLA's training and development files have no header. Some
rows of QQP's files are truncated; they are skipped and counted, as in tensorflow-datasets. Classes are numbered as in
tensorflow-datasets; submissions use the class names of the TSV files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..corpus.corpus import TFDS_PREFIX, Source, is_tfds, open_tfds
from ..errors import DataError
from .tables import Row, TextExample, class_of, field_of, number_of, read_table, text_of


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
    """(column above, alternative name) in some files or in tensorflow-datasets"""


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
            columns=(("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label")),
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
            columns=(("score", "label"),),
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
            columns=(("is_duplicate", "label"),),
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
            columns=(("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label")),
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
            columns=(
                ("sentence1", "Premise"),
                ("sentence2", "Hypothesis"),
                ("sentence1", "premise"),
                ("sentence2", "hypothesis"),
                ("Label", "label"),
            ),
        ),
    )
}
GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
# Tasks with training data; AX has none and evaluates an MNLI model.
FINETUNED: tuple[GlueName, ...] = get_args(GlueName)

TFDS_SPLITS = {"dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}
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
        described = json.loads((_tfds_source(path).tfds_folder / "dataset_info.json").read_text(encoding="utf-8"))
        return TFDS_SPLITS.get(split, split) in [there["name"] for there in described["splits"]]
    return path.is_file() or _split_file(task, path, split) is not None


def has_labels(task: GlueTask, path: str | Path, split: str) -> bool:
    """Tell whether the first example of a split has a label; the full file of the diagnostic set has labels."""
    path = glue_source(task, path)
    if str(path).startswith(TFDS_PREFIX) or is_tfds(path):
        row = next(_tfds_rows(path, split), None)
    else:
        file = path if path.is_file() else _split_file(task, path, split)
        row = None if file is None else next(read_table(file, exact=False), None)
    label = None if row is None else row.fields.get(_column(task, row, task.label))
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
        rows = _tfds_rows(path, split)
    else:
        file = path if path.is_file() else _split_file(task, path, split)
        if file is None:
            raise DataError(f"{path}: no {split}.tsv, the {split} split of {task.folder}.")
        path = file
        header = task.header if task.header is not None and not _names_columns(file) else None

        def cut() -> None:
            found.cut_rows += 1

        rows = read_table(file, header=header, exact=False, on_short=cut if task.cut_rows else None)
    for number, row in enumerate(rows):
        found.examples.append(_example(task, row, number, labelled))
    if not found.examples:
        raise DataError(f"{path}: the file is empty.")
    return found


def _names_columns(file: Path) -> bool:
    """Tell whether a CoLA file has a header: the test file does."""
    first = next(read_table(file, header=("first",), exact=False), None)
    return first is not None and first.fields["first"] == "index"


def _tfds_source(path: str | Path) -> Source:
    named = str(path).startswith(TFDS_PREFIX)
    return Source(Path(path), str(path), "tfds-name" if named else "tfds-folder")


def _tfds_rows(path: str | Path, split: str) -> Iterator[Row]:
    examples = open_tfds(_tfds_source(path), TFDS_SPLITS.get(split, split))
    for number in range(len(examples)):
        fields = {
            name: value.decode("utf-8") if isinstance(value, bytes) else value
            for name, value in examples[number].items()
        }
        yield Row(fields, f"{path}, example {number} of split {split!r}")


def _example(task: GlueTask, row: Row, number: int, labelled: bool) -> TextExample:
    label: int | float | None = None
    if labelled:
        value = field_of(row, _column(task, row, task.label))
        if task.labels is None:
            label = number_of(value, row.where)
        elif isinstance(value, str):
            label = class_of(value, task.labels, row.where)
        else:  # tensorflow-datasets' number
            label = class_of(str(int(value)), [str(number) for number in range(len(task.labels))], row.where)
    second = None if task.second is None else text_of(row, _column(task, row, task.second))
    keys = (str(row.fields[name]) for name in ("index", "idx", "id") if name in row.fields)
    return TextExample(text_of(row, _column(task, row, task.first)), second, label, next(keys, str(number)), row.where)


def _column(task: GlueTask, row: Row, name: str) -> str:
    names = (name, *(other for column, other in task.columns if column == name))
    return next((name for name in names if name in row.fields), name)
