"""Multiple choice: SWAG (Zellers et al. 2018) and CODAH (Chen et al. 2019), each in its official files.

A question is a beginning and several endings, one of which is right. The model reads the pair (first, second) once per
ending (Devlin et al. 2018, 4.4), so a question stores its choices as pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..random import RandomStream
from .tables import read_csv, tab_records, text_of

CHOICES = 4
SWAG_COLUMNS = ("sent1", "sent2", *(f"ending{number}" for number in range(CHOICES)))
FOLDS = 5
"""number of folds of CODAH's cross-validation"""


@dataclass(frozen=True)
class Choice:
    """A question: `pairs` has one (first, second) text per choice, `label` is the index of the right one, or None."""

    key: str
    pairs: tuple[tuple[str, str], ...]
    label: int | None
    where: str


def read_swag(path: Path, *, labelled: bool = True) -> list[Choice]:
    """Read SWAG's train.csv, val.csv or test.csv.

    Columns are found by their names in the header: sent1, sent2 (the start of the second sentence), ending0 to ending3
    and, if `labelled`, label (0 to 3). A question's key is the number in the first column, or the number of its row if
    that column has a name.

    Raises:
        DataError: a column is missing, a row has too few or too many fields, two rows have the same number, or a label
            is invalid; with file and line.
    """
    questions: list[Choice] = []
    keys: set[str] = set()
    needs = (*SWAG_COLUMNS, "label") if labelled else SWAG_COLUMNS
    for number, row in enumerate(read_csv(path, needs)):
        endings = [text_of(row, name) for name in SWAG_COLUMNS[2:]]
        first, second = text_of(row, "sent1"), text_of(row, "sent2")
        key = str(number) if next(iter(row.fields)) else row.fields[""]
        if key in keys:
            raise DataError(f"{row.where}: another row before has the number {key!r} too.")
        keys.add(key)
        pairs = tuple((first, f"{second} {ending}".strip()) for ending in endings)
        label = _label(text_of(row, "label"), row.where) if labelled else None
        questions.append(Choice(key, pairs, label, row.where))
    return _some(questions, path)


def read_codah(path: Path, *, labelled: bool = True) -> list[Choice]:
    """Read CODAH's TSV: category, beginning, four endings, index of the right one; no header, quotes are literal.

    Raises:
        DataError: a row has another number of fields, or a label is invalid; with file and line.
    """
    questions = []
    fields = CHOICES + 2 + labelled
    for number, row in tab_records(path):
        if not row:
            continue
        where = f"{path}, line {number}"
        if len(row) not in (fields, CHOICES + 3):
            raise DataError(
                f"{where}: expected {fields} fields between tabs (category, beginning, {CHOICES} endings"
                f"{', the right one' if labelled else ''}), found {len(row)}."
            )
        label = _label(row[-1], where) if labelled else None
        pairs = tuple((row[1], ending) for ending in row[2 : 2 + CHOICES])
        questions.append(Choice(str(len(questions)), pairs, label, where))
    return _some(questions, path)


def split_fold(questions: list[Choice], fold: int, seed: int = 0) -> tuple[list[Choice], list[Choice]]:
    """Return (training questions, held-out fold) of five-fold cross-validation, as in CODAH's evaluation (section 4).

    The folds are drawn from `seed`; every question is held out in exactly one of them.
    """
    if not 0 <= fold < FOLDS:
        raise DataError(f"--fold is {fold}; it must be from 0 to {FOLDS - 1}.")
    order = RandomStream(seed).permutation(len(questions))
    held_out = set(order[fold::FOLDS].tolist())
    return (
        [question for number, question in enumerate(questions) if number not in held_out],
        [question for number, question in enumerate(questions) if number in held_out],
    )


def _label(text: str, where: str) -> int:
    if text.strip() not in {str(number) for number in range(CHOICES)}:
        raise DataError(f"{where}: expected the right ending's number, 0 to {CHOICES - 1}, found {text!r}.")
    return int(text)


def _some(questions: list[Choice], path: Path) -> list[Choice]:
    if not questions:
        raise DataError(f"{path}: no questions.")
    return questions
