"""Classify or score texts of a user's table: TSV, CSV or JSON lines with named columns."""

from dataclasses import dataclass
from pathlib import Path

from ....data.tasks.tables import TextExample, read_labels, read_texts
from ...errors import RunError
from .text import TextTask


@dataclass(frozen=True)
class TableTask(TextTask):
    """A user's table."""

    text: str = "sentence"
    text_pair: str | None = None
    label: str = "label"
    positive: str | None = None

    @property
    def positive_class(self) -> int:
        return 1 if self.positive is None or self.labels is None else self.labels.index(self.positive)

    def read(self, path: Path, split: str, *, labelled: bool) -> list[TextExample]:
        return read_texts(
            path,
            text=self.text,
            text_pair=self.text_pair,
            label=self.label if labelled else None,
            labels=self.labels,
        )


def table_task(
    train: Path,
    *,
    text: str,
    text_pair: str | None,
    label: str,
    labels: tuple[str, ...],
    regression: bool,
    max_length: int,
    positive: str | None = None,
) -> TableTask:
    """Make the task of a table; arguments as in TableConfig.

    Raises:
        DataError: the data is invalid; with file and line.
        RunError: there are fewer than two classes, a class is given twice, or `positive` is none of two.
    """
    if len(set(labels)) < len(labels) or any(name != name.strip() for name in labels):
        raise RunError(f"--labels {' '.join(map(repr, labels))}: each label once, without spaces around it.")
    known = None if regression else labels or read_labels(train, label)
    if known is not None and len(known) < 2:
        raise RunError(f"{train}: all labels are {', '.join(known)!r}; there is nothing to learn.")
    metrics = ("pearson", "spearman")
    if known is not None:
        metrics = ("accuracy", "f1") if len(known) == 2 else ("accuracy", "macro_f1")
    if positive is not None and (known is None or len(known) != 2 or positive not in known):
        among = "a regression has no classes" if known is None else f"the labels are {', '.join(map(repr, known))}"
        raise RunError(f"--positive {positive!r}: expected one of two labels; {among}.")
    pairs = text_pair is not None
    return TableTask("classification", max_length, known, known, metrics, pairs, text, text_pair, label, positive)
