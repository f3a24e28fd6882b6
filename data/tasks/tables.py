"""Read tables of texts: TSV, CSV and JSON lines with named columns; every error names its file and line.

    .tsv .txt               one row per line, fields separated by tabs; quotes are ordinary characters, as in GLUE
    .csv                    RFC 4180: commas, and quotes around fields that contain commas, quotes or line ends; if the
                            header has no comma, the semicolons or tabs that it has separate the fields
    .jsonl .ndjson .json    one object per line

Files are UTF-8 and may also end in `.gz` or `.zst`. Blank lines are skipped; a line of empty fields is a row.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..json_files import expect, parse_line
from ..reading import COMPRESSIONS, read_lines

LONGEST_FIELD = 1 << 30  # characters; the csv module's own limit is 131,072
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

Records = Iterator[tuple[int, list[str]]]
"""each row's line number, from 1, and its fields"""


class Row(NamedTuple):
    """A row of a table: its fields by column, and its location, for messages."""

    fields: dict[str, Any]
    where: str


class TextExample(NamedTuple):
    """A text or a pair of texts to classify or to score."""

    first: str
    second: str | None
    label: int | float | None  # class number or value; None if unknown
    key: str  # name of the example in a file of predictions
    where: str  # file and line


def read_table(
    path: Path, *, header: Sequence[str] | None = None, on_short: Callable[[], None] | None = None
) -> Iterator[Row]:
    """Yield the rows of a table.

    Args:
        path: .tsv, .txt, .csv, .jsonl, .ndjson or .json, optionally with .gz or .zst.
        header: column names, for a file without a header.
        on_short: called for a row with too few fields, which is then skipped; None makes such a row an error.

    Raises:
        DataError: a row has too few or too many fields, or the file is not a table.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson", ".json"):
        return _json_lines(path)
    if kind == ".csv":
        return _rows(path, csv_records(path), header, on_short)
    if kind in (".tsv", ".txt"):
        return _rows(path, tab_records(path), header, on_short)
    raise DataError(
        f"{path}: expected a name that ends in .tsv, .txt, .csv, .jsonl or .json (or these with .gz, .zst)."
    )


def read_csv(path: Path, needs: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a CSV file, whatever its name ends in, whose header must have some columns.

    Raises:
        DataError: a column is missing, a row has too few or too many fields, or it is not CSV; with file and line.
    """
    number, header = next(records := csv_records(path), (1, []))
    missing = [name for name in needs if name not in header]
    if missing:
        found = ", ".join(name or "(no name)" for name in header) or "nothing"
        raise DataError(f"{path}, line {number}: no column {', '.join(missing)}; found {found}.")
    return _rows(path, chain([(number, header)], records), None, None)


def tab_records(path: Path) -> Records:
    """Yield the fields of each line between tabs; none for a blank line, which is a row if there is one column.

    Raises:
        DataError: the file cannot be read.
    """
    for number, line in enumerate(read_lines(path), 1):
        yield number, line.split("\t") if line else []


def csv_records(path: Path) -> Records:
    """Yield the fields of each record of a CSV file; a blank line is none.

    Raises:
        DataError: it is not CSV.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines = read_lines(path)
    first = next(lines, "")
    delimiter = "," if "," in first else next((mark for mark in ";\t" if mark in first), ",")
    reader = csv.reader((f"{line}\n" for line in chain([first], lines)), delimiter=delimiter, strict=True)
    number = 1
    try:
        for record in reader:
            if record:
                yield number, record
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: not CSV ({error}).") from None


def _rows(
    path: Path, records: Records, header: Sequence[str] | None, on_short: Callable[[], None] | None
) -> Iterator[Row]:
    if header is None:
        header = next((record for _, record in records if record), [])
        twice = {name for name in header if name and header.count(name) > 1}
        if twice:
            raise DataError(f"{path}, line 1: two columns are called {sorted(twice)[0]!r}.")
        odd = next((name for name in header if _CONTROL.search(name)), None)
        if odd is not None:
            raise DataError(f"{path}, line 1: a column is called {odd[:60]!r}, with a control character in it.")
    columns = len(header)
    blank: list[int] = []  # lines since the last row
    for number, record in records:
        if not record:
            blank.append(number)
            continue
        if columns == 1:  # a blank line is a row, unless it is at the end
            yield from (Row({header[0]: ""}, f"{path}, line {line}") for line in blank)
        blank.clear()
        if len(record) < columns and on_short is not None:
            on_short()
            continue
        if len(record) != columns:
            raise DataError(
                f"{path}, line {number}: expected {columns} fields ({', '.join(header)}), found {len(record)}: "
                f"{_shown(record)}"
            )
        if list(record) == list(header):
            raise DataError(f"{path}, line {number}: the header again. Are these several files in one?")
        fields: dict[str, Any] = {}
        for name, field in zip(header, record, strict=True):
            fields.setdefault(name, field)  # of the columns without a name, the first: pandas writes one an index
        yield Row(fields, f"{path}, line {number}")


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield Row(expect(parse_line(line, where), dict, where), where)


def _shown(record: Sequence[str]) -> str:
    text = " | ".join(record)
    return f"{text[:120]}..." if len(text) > 120 else text


def text_of(row: Row, column: str) -> str:
    """Return a field that must be text.

    Raises:
        DataError: there is no such column, or it does not hold text.
    """
    value = field_of(row, column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {json.dumps(value)}, expected text.")
    return value


def field_of(row: Row, column: str) -> Any:
    """Return a field of any type.

    Raises:
        DataError: there is no such column.
    """
    if column not in row.fields:
        raise DataError(f"{row.where}: no column {column!r} (found: {', '.join(map(str, row.fields)) or 'none'}).")
    return row.fields[column]


def number_of(value: Any, where: str) -> float:
    """Return the value of a regression target.

    Raises:
        DataError: it is not a finite number.
    """
    number = math.nan
    if (isinstance(value, str) and _NUMBER.fullmatch(value.strip())) or _is_number(value):
        number = float(value)
    if not math.isfinite(number):
        raise DataError(f"{where}: the target is {_short(value)}, expected a finite number, such as 3.5.")
    return number


def _is_number(value: Any) -> bool:
    """Tell whether a value of JSON or of a data set is a number; a boolean is not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def class_of(value: Any, labels: Sequence[str], where: str) -> int:
    """Return the class number of a label.

    Raises:
        DataError: the label is not in the label set.
    """
    text = label_text(value, where)
    if text not in labels:
        known = ", ".join(map(repr, labels[:20])) + (", ..." if len(labels) > 20 else "")
        raise DataError(f"{where}: the label {text!r} is not in the label set ({known}).")
    return list(labels).index(text)


def label_text(value: Any, where: str) -> str:
    """Return a label as text; JSON numbers and booleans are labels too.

    Raises:
        DataError: the label is missing, or of another type.
    """
    if isinstance(value, str) and value.strip():
        text = value.strip()
        if _CONTROL.search(text):
            raise DataError(f"{where}: the label {_short(text)} has a control character in it.")
        return text
    if isinstance(value, bool | int):
        return json.dumps(value)
    if value is None or isinstance(value, str):
        raise DataError(f"{where}: the label is missing.")
    raise DataError(f"{where}: the label is {_short(value)}, expected text, an integer or a boolean.")


def labels_of(values: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the sorted label set: integers by value, anything else alphabetically.

    Raises:
        DataError: two labels are spellings of one number, such as 1 and 1.0.
    """
    found = sorted(set(values))
    numbers: dict[float, str] = {}
    for text in found:
        if _NUMBER.fullmatch(text) and (other := numbers.setdefault(float(text), text)) != text:
            raise DataError(f"{where}: the labels {other!r} and {text!r} are the same number; write it in one way.")
    if all(_INTEGER.fullmatch(value) for value in found):
        found.sort(key=int)
    return tuple(found)


def read_texts(
    path: Path,
    *,
    text: str,
    text_pair: str | None,
    label: str | None,
    labels: Sequence[str] | None,
) -> list[TextExample]:
    """Read the examples of a user's own file.

    Args:
        path: a file that `read_table` supports.
        text: column of the text, or of the first text of a pair.
        text_pair: column of the second text of a pair, or None.
        label: column of the label; None to read no labels.
        labels: the label set; None for numbers (regression).

    Raises:
        DataError: a row is invalid (with file and line), or the file is empty.
    """
    examples = []
    for number, row in enumerate(read_table(path)):
        target: int | float | None = None
        if label is not None:
            value = field_of(row, label)
            target = number_of(value, row.where) if labels is None else class_of(value, labels, row.where)
        second = None if text_pair is None else text_of(row, text_pair)
        examples.append(TextExample(text_of(row, text), second, target, str(number), row.where))
    if not examples:
        raise DataError(f"{path}: the file is empty. Expected a header and rows.")
    return examples


def read_labels(path: Path, label: str) -> tuple[str, ...]:
    """Return the label set of a file.

    Raises:
        DataError: a row is invalid (with file and line), or the file is empty.
    """
    found = [label_text(field_of(row, label), row.where) for row in read_table(path)]
    if not found:
        raise DataError(f"{path}: the file is empty. Expected a header and rows.")
    return labels_of(found, str(path))
