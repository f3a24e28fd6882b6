"""Multiple choice: SWAG (Zellers et al. 2018) and CODAH (Chen et al. 2019), each in its official files.

A question is a beginning and several endings, one of which is right. The model reads the pair (first, second) once per
ending (Devlin et al. 2018, 4.4), so a question stores its choices as pairs.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..random import RandomStream
from ..reading import read_lines, read_text

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
    and, if `labelled`, label (0 to 3). A question's key is the number in the first column, or the line number if that
    column has a name.

    Raises:
        DataError: a column is missing, a row has too few fields, or a label is invalid; with file and line.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{path}: the file is empty. Expected SWAG's CSV with a header.")
        wanted = (*SWAG_COLUMNS, "label") if labelled else SWAG_COLUMNS
        missing = [name for name in wanted if name not in header]
        if missing:
            found = ", ".join(name or "(no name)" for name in header)
            raise DataError(f"{path}, line 1: no column {', '.join(missing)}; found {found}.")
        column = {name: header.index(name) for name in wanted}
        questions = []
        line = reader.line_num
        for row in reader:
            where, line = f"{path}, line {line + 1}", reader.line_num
            if not row:
                continue
            if len(row) < len(header):
                raise DataError(f"{where}: expected {len(header)} fields, found {len(row)}.")
            first, second = row[column["sent1"]], row[column["sent2"]]
            pairs = tuple((first, f"{second} {row[column[name]]}".strip()) for name in SWAG_COLUMNS[2:])
            key = row[0] if not header[0] else str(len(questions))
            questions.append(Choice(key, pairs, _label(row[column["label"]], where) if labelled else None, where))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error}).") from None
    return _some(questions, path)


def read_codah(path: Path, *, labelled: bool = True) -> list[Choice]:
    """Read CODAH's TSV: category, beginning, four endings, index of the right one; no header, quotes are literal.

    Raises:
        DataError: a row has another number of fields, or a label is invalid; with file and line.
    """
    questions = []
    fields = CHOICES + 2 + labelled
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = line.split("\t")
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
