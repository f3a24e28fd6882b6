"""Classify or rate the texts of any table: TSV, CSV or JSON lines with named columns.

bestiary finetune classification --train reviews.csv --text review --label stars --model FOLDER --out runs/stars
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ....data.tasks.tables import TextExample, read_labels, read_texts
from ...errors import RunError
from ..config import FinetuneConfig
from ..loop import finetune, hold_out
from .task import TaskData
from .text import TextTask


@dataclass(frozen=True)
class TableTask(TextTask):
    """A table of one's own."""

    text: str = "sentence"
    text_pair: str | None = None
    label: str = "label"

    def read(self, path: Path, split: str, *, labelled: bool) -> list[TextExample]:
        return read_texts(
            path,
            text=self.text,
            text_pair=self.text_pair,
            label=self.label if labelled else None,
            labels=self.labels,
        )


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Fine-tune an encoder to classify or rate texts of a TSV, CSV or JSON-lines file with named columns.

    The label set is what the training file has, and goes with the model.
    """

    train: Path
    """Training examples: .tsv (quotes are ordinary characters), .csv or .jsonl, each plain, .gz or .zst."""
    dev: Path | None = None
    """Examples to evaluate on. None: a share of the training examples is held out."""
    test: Path | None = None
    """Examples without labels, predicted at the end."""
    dev_fraction: float = 0.1
    """Share that is held out where there is no --dev."""
    text: str = "sentence"
    """Column of the text, or of a pair's first text."""
    text_pair: str | None = None
    """Column of a pair's second text."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """The label set, in the order of the classes' numbers. None: every label of the training file."""
    regression: bool = False
    """The labels are numbers to be predicted as such."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.regression and self.labels:
            raise RunError("--regression predicts numbers: leave --labels out.")
        if not 0 < self.dev_fraction < 1:
            raise RunError(f"--dev-fraction is {self.dev_fraction}; it must be between 0 and 1.")


def table_task(
    train: Path,
    *,
    text: str,
    text_pair: str | None,
    label: str,
    labels: tuple[str, ...],
    regression: bool,
    max_length: int,
) -> TableTask:
    """The task that a table makes; arguments as in TableConfig.

    Raises:
        DataError: with file and line. RunError: fewer than two classes.
    """
    known = None if regression else labels or read_labels(train, label)
    if known is not None and len(known) < 2:
        raise RunError(f"{train}: all labels are {', '.join(known)!r}; there is nothing to tell apart.")
    metrics = ("pearson", "spearman")
    if known is not None:
        metrics = ("accuracy", "f1") if len(known) == 2 else ("accuracy", "macro_f1")
    pairs = text_pair is not None
    return TableTask("classification", max_length, known, known, metrics, pairs, text, text_pair, label)


def main(config: TableConfig) -> int:
    """`bestiary finetune classification`; returns the exit status."""
    task = table_task(
        config.train,
        text=config.text,
        text_pair=config.text_pair,
        label=config.label,
        labels=config.labels,
        regression=config.regression,
        max_length=config.run.max_length,
    )

    def data() -> TaskData:
        train = task.read(config.train, "train", labelled=True)
        if config.dev is not None:
            dev = task.read(config.dev, "dev", labelled=True)
        else:
            train, dev = hold_out(train, config.dev_fraction, config.run.seed)
        test = {} if config.test is None else {"test": task.read(config.test, "test", labelled=False)}
        return TaskData(train, {"dev": dev}, test)

    return finetune(config, config.run, task, data)
