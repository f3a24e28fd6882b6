"""Read parallel text: pairs of a source and a target line, from a user's files.

Supported formats:

    two files                 one sentence per line, the same number of lines in both
    .tsv                      one pair per line, in two of its columns
    .jsonl, .ndjson, .json    one pair per line, in two fields of an object, which may be nested in `translation`, as in
                              `{"translation": {"en": ..., "de": ...}}` (WMT data sets on the hub)
    a TFDS folder, tfds:NAME  wmt14_translate and the like: examples with features such as `en` and `de`

Any file may also end in .gz or .zst. Files are streamed. Only `\\n` (after an optional `\\r`) ends a line, so that a
Unicode line separator within a sentence does not shift the pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from ..errors import CorpusError
from ..json_files import parse_line
from ..reading import COMPRESSIONS, read_lines
from .corpus import Source
from .tfds import TFDS_PREFIX, decoded, is_tfds, open_tfds

LINES_SHOWN = 10
_JSON = (".jsonl", ".ndjson", ".json")
_EXAMPLES_AT_ONCE = 1024
_COLUMN = re.compile("[1-9][0-9]{0,5}")
# Control characters, and Unicode's line and paragraph separators: none of them means anything within a sentence.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

Form = Literal["lines", "tsv", "json", "tfds"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A source text, a target text, and their line number, from 1."""

    source: str
    target: str
    line: int


@dataclass
class Findings:
    """Peculiarities of the input that a user should know about: how often they occur, and in which lines first."""

    counts: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, what: str, line: int) -> None:
        """Count a line; remember the first few."""
        self.counts[what] = self.counts.get(what, 0) + 1
        shown = self.lines.setdefault(what, [])
        if len(shown) < LINES_SHOWN:
            shown.append(line)

    def __iter__(self) -> Iterator[str]:
        """Yield one message per peculiarity."""
        for what, count in self.counts.items():
            numbers = ", ".join(map(str, self.lines[what]))
            more = ", ..." if count > len(self.lines[what]) else ""
            yield f"{count:,} {'line' if count == 1 else 'lines'} with {what}: {numbers}{more}"


def clean_line(line: str) -> tuple[str, bool]:
    """Return the line stripped, with control characters replaced by spaces, and whether there were any."""
    found = _CONTROL.search(line) is not None
    return (_CONTROL.sub(" ", line) if found else line).strip(), found


@dataclass
class ParallelText:
    """Pairs from two files, or from one file or data set that holds both sides.

    The constructor checks that everything exists; each iteration reads everything again. `findings` describes the last
    iteration.

    Args:
        paths: two files, source and target; or one .tsv or .jsonl file, tensorflow-datasets folder, or `tfds:NAME`.
        fields: the two sides: two column numbers of a .tsv, from 1, or two names of JSON fields or features. None: the
            first two columns, or the fields or features named by `languages`.
        languages: ISO 639-1 codes of source and target.
        encoding: character encoding of the files.
        split: split of a tensorflow-datasets data set.
        empty: whether to keep pairs with an empty side, or to drop and count them.

    Raises:
        CorpusError: a path is missing or of another kind; while iterating: bytes are not in the encoding, a line lacks
            its columns or fields, the files have different numbers of lines, or there is no pair at all.
    """

    paths: Sequence[str | Path]
    fields: tuple[str, str] | None = None
    languages: tuple[str, str] = ("en", "de")
    encoding: str = "utf-8"
    split: str = "train"
    empty: Literal["keep", "drop"] = "keep"
    form: Form = field(init=False)
    findings: Findings = field(init=False, default_factory=Findings)

    def __post_init__(self) -> None:
        if not 1 <= len(self.paths) <= 2:
            raise CorpusError(
                f"{len(self.paths)} paths: expected two files, source and target, or one that holds both sides."
            )
        for path in self.paths:
            if not str(path).startswith(TFDS_PREFIX) and not Path(path).expanduser().exists():
                raise CorpusError(f"{path}: no such file or folder.")
        self.form = self._form()
        if self.form == "tsv" and self.fields and not all(map(_COLUMN.fullmatch, self.fields)):
            raise CorpusError(f"{self.paths[0]}: columns {' and '.join(self.fields)}: expected two numbers, from 1.")

    def _form(self) -> Form:
        if len(self.paths) == 2:
            for path in self.paths:
                if str(path).startswith(TFDS_PREFIX) or Path(path).expanduser().is_dir():
                    raise CorpusError(f"{path}: a data set contains both sides. Expected two files, or one data set.")
            return "lines"
        path = Path(self.paths[0]).expanduser()
        if str(self.paths[0]).startswith(TFDS_PREFIX):
            return "tfds"
        if path.is_dir():
            if not is_tfds(path):
                raise CorpusError(f"{path}: not a prepared tensorflow-datasets folder (no features.json in it).")
            return "tfds"
        endings = [suffix.lower() for suffix in path.suffixes]
        if endings and endings[-1] in COMPRESSIONS:
            endings.pop()
        if endings and endings[-1] in _JSON:
            return "json"
        if endings and endings[-1] == ".tsv":
            return "tsv"
        raise CorpusError(
            f"{path}: a file with both sides must end in .tsv or {', '.join(_JSON)} (optionally with .gz or .zst). "
            "Otherwise name two files, source and target."
        )

    @property
    def _source(self) -> Source:
        path = self.paths[0]
        named = str(path).startswith(TFDS_PREFIX)
        return Source(Path(path).expanduser(), str(path), "tfds-name" if named else "tfds-folder")

    def __str__(self) -> str:
        return ", ".join(str(path) for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for equal contents, wherever the files are."""
        parts: list[Any] = [self.form, self.fields, self.languages, self.encoding, self.split, self.empty]
        files = [Path(path).expanduser() for path in self.paths]
        if self.form == "tfds":
            files = [file for _, file in self._source.files]
        for file in files:
            with file.open("rb") as opened:
                parts.append(hashlib.file_digest(opened, "sha256").hexdigest())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Pair]:
        self.findings = findings = Findings()
        read = {"lines": self._lines, "tsv": self._tsv, "json": self._json, "tfds": self._tfds}[self.form]
        any_pair = False
        for line, (source, target) in enumerate(read(), 1):
            source, control = clean_line(source)
            target, control_too = clean_line(target)
            if control or control_too:
                findings.add("control characters, taken for spaces", line)
            if not (source and target):
                left_out = ", left out" if self.empty == "drop" else ""
                sides = "two empty sides" if not (source or target) else f"an empty {'target' if source else 'source'}"
                findings.add(sides + left_out, line)
                if self.empty == "drop":
                    continue
            any_pair = True
            yield Pair(source, target, line)
        if not any_pair:
            raise CorpusError(f"{self}: no pair of lines with text on both sides.")

    def _lines(self) -> Iterator[tuple[str, str]]:
        source, target = (read_lines(Path(path).expanduser(), self.encoding) for path in self.paths)
        for number, (left, right) in enumerate(zip_longest(source, target)):
            if left is None or right is None:
                lines = number + 1 + sum(1 for _ in (target if left is None else source))
                counts = (number, lines) if left is None else (lines, number)
                raise CorpusError(
                    f"{self.paths[0]} has {counts[0]:,} lines and {self.paths[1]} has {counts[1]:,}: lines are paired "
                    "by number, so the counts must be equal."
                )
            yield left, right

    def _tsv(self) -> Iterator[tuple[str, str]]:
        path = Path(self.paths[0]).expanduser()
        first, second = (int(name) - 1 for name in self.fields or ("1", "2"))
        columns = 0
        for number, line in enumerate(read_lines(path, self.encoding), 1):
            cells = line.split("\t")
            columns = columns or len(cells)
            if len(cells) <= max(first, second):
                raise CorpusError(
                    f"{path}, line {number}: {len(cells)} columns between tabs; expected at least "
                    f"{max(first, second) + 1}."
                )
            if len(cells) != columns:
                raise CorpusError(f"{path}, line {number}: {len(cells)} columns between tabs; line 1 has {columns}.")
            yield cells[first], cells[second]

    def _json(self) -> Iterator[tuple[str, str]]:
        path = Path(self.paths[0]).expanduser()
        for number, line in enumerate(read_lines(path, self.encoding), 1):
            where = f"{path}, line {number}"
            value = parse_line(line, where)
            if isinstance(value, dict) and isinstance(value.get("translation"), dict):
                value = value["translation"]
            yield self._fields_of(value, where)

    def _tfds(self) -> Iterator[tuple[str, str]]:
        examples = open_tfds(self._source.tfds_folder, self.split, str(self.paths[0]))
        for number, example in examples.windows(_EXAMPLES_AT_ONCE):
            yield self._fields_of(example, f"{self.paths[0]}, example {number} of split {self.split!r}")

    def _fields_of(self, value: Any, where: str) -> tuple[str, str]:
        names = self.fields or self.languages
        if not isinstance(value, dict):
            raise CorpusError(f"{where}: expected an object with named fields, found {type(value).__name__}.")
        missing = [name for name in names if name not in value]
        if missing:
            there = ", ".join(sorted(map(str, value))) or "none"
            raise CorpusError(f"{where}: no field {missing[0]!r} (found: {there}). Name them with --fields.")
        texts = []
        for name in names:
            text = decoded(value[name], f"{where}: field {name!r}")
            if not isinstance(text, str):
                raise CorpusError(f"{where}: field {name!r} holds {type(text).__name__}, expected text.")
            texts.append(text)
        return texts[0], texts[1]
