"""Read documents from text, Markdown, WikiText, JSON lines (each also as gzip or zstd) and tensorflow-datasets.

What counts as one document:

    .txt and any other text   The whole file; blank lines separate paragraphs, whose lines are joined. With
                              `blank_line="document"` (the format of BERT's own script), blank lines separate documents
                              and every line is a paragraph.
    .md, .markdown            The whole file.
    .tokens, .raw             An article; each begins with a ` = Title = ` line between two blank lines. Any other text
                              file that begins with such a line is read the same way.
    .jsonl, .ndjson, .json    A line, which is a JSON object whose field `text` (or another, by name) holds the text;
                              each line of that text is a paragraph.
    a TFDS folder, tfds:NAME  An example, whose feature `text` holds the text, as in JSON lines.
    embedded:python           A topic of Python's manual, or the docstrings of one module (see python_docs.py).

Any of the files may also end in .gz or .zst. Folders are read recursively, files in the order of their names; hidden
files and files with other endings are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import CorpusError
from ..json_files import parse_line
from ..reading import COMPRESSIONS, read_lines, read_text
from . import python_docs
from .markup import WIKITEXT_TITLE, Markup, paragraphs
from .tfds import TFDS_PREFIX, decoded, is_tfds, open_tfds, prepared_folder

EMBEDDED = "embedded:python"
_EXAMPLES_AT_ONCE = 256

Format = Literal["text", "markdown", "wikitext", "jsonl", "tfds-folder", "tfds-name", "embedded"]
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".tokens": "wikitext",
    ".raw": "wikitext",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it was read, with its markup. `source` is the file's name, `line` its first line, from 1."""

    text: str
    markup: Markup
    source: str
    line: int = 1

    def paragraphs(self) -> list[str]:
        """Return the document's non-empty paragraphs as plain running text; possibly an empty list."""
        return paragraphs(self.text, self.markup)


@dataclass(frozen=True)
class Source:
    """One file or data set with documents. `name` is its path relative to the folder or file that the user named."""

    path: Path
    name: str
    format: Format

    @property
    def files(self) -> list[tuple[str, Path]]:
        """Return the files that determine what is read, each with a name that survives moving the corpus."""
        if self.format == "embedded":
            return python_docs.documentation_files()
        if self.format in ("tfds-folder", "tfds-name"):
            return [(file.name, file) for file in sorted(self.tfds_folder.iterdir()) if file.is_file()]
        return [(self.name, self.path)]

    @property
    def tfds_folder(self) -> Path:
        """Folder of the prepared data set. `tfds:NAME` is downloaded and prepared first if this machine lacks it."""
        return self.path if self.format == "tfds-folder" else prepared_folder(self.name.removeprefix(TFDS_PREFIX))


@dataclass
class Counts:
    """Counts of what an iteration has read so far."""

    documents: int = 0
    characters: int = 0
    empty_documents: int = 0
    bytes_read: int = 0


@dataclass
class Corpus:
    """Documents of files, folders, prepared tensorflow-datasets folders, `tfds:NAME`, or `embedded:python`.

    The constructor checks that every path exists and holds something to read. Each iteration reads everything again, in
    the same order: paths as given, files of a folder by name. `counts` describes the last iteration.

    Args:
        paths: files, folders and data sets to read.
        encoding: character encoding of the text files, including JSON lines.
        text_field: field (JSON lines) or feature (tensorflow-datasets) that holds a document's text.
        blank_line: what blank lines separate in plain text: paragraphs of a document, or documents.
        split: split of a tensorflow-datasets data set to read.
        verbatim: whether documents keep their markup, line ends and white space.

    Raises:
        CorpusError: a path is missing or a folder has nothing to read; while iterating: bytes are not in the encoding,
            a line is not a JSON object, a field is missing, or (at the end) there was no document at all.
    """

    paths: Sequence[str | Path]
    encoding: str = "utf-8"
    text_field: str = "text"
    blank_line: Literal["paragraph", "document"] = "paragraph"
    split: str = "train"
    verbatim: bool = False
    sources: list[Source] = field(init=False)
    skipped_files: list[Path] = field(init=False, default_factory=list)
    counts: Counts = field(init=False, default_factory=Counts)

    def __post_init__(self) -> None:
        if isinstance(self.paths, (str, Path)):
            self.paths = [self.paths]
        if not self.paths:
            raise CorpusError("No corpus: name at least one file or folder.")
        self.sources = [source for path in self.paths for source in self._sources_of(path)]

    @property
    def bytes_total(self) -> int:
        """Total size of the files, in bytes on disk; 0 if unknown."""
        return sum(file.stat().st_size for source in self.sources for _, file in source.files)

    def __iter__(self) -> Iterator[Document]:
        self.counts = counts = Counts()
        for source in self.sources:
            for document in self._read(source):
                if document.text.strip():
                    counts.documents += 1
                    counts.characters += len(document.text)
                    yield replace(document, markup="verbatim") if self.verbatim else document
                else:
                    counts.empty_documents += 1
        if not counts.documents:
            named = ", ".join(str(path) for path in self.paths)
            raise CorpusError(f"{named}: the corpus is empty: none of its documents contains text.")

    # --- finding ------------------------------------------------------------------------------------------------------

    def _sources_of(self, path: str | Path) -> list[Source]:
        if str(path) == EMBEDDED:
            return [Source(Path(EMBEDDED), EMBEDDED, "embedded")]
        if str(path).startswith(TFDS_PREFIX):
            return [Source(Path(str(path)), str(path), "tfds-name")]
        path = Path(path).expanduser()
        if not path.exists():
            raise CorpusError(f"{path}: no such file or folder. Check the path given with --corpus.")
        if path.is_file():
            return [Source(path, path.name, _format_of(path) or "text")]
        if is_tfds(path):
            return [Source(path, path.name, "tfds-folder")]
        found = []
        for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts):
            inside = file.relative_to(path)
            if any(part.startswith(".") for part in inside.parts) or any(is_tfds(p) for p in _below(path, file)):
                continue
            if file.is_dir() and is_tfds(file):
                found.append(Source(file, inside.as_posix(), "tfds-folder"))
            elif file.is_file() and (kind := _format_of(file)):
                found.append(Source(file, inside.as_posix(), kind))
            elif file.is_file():
                self.skipped_files.append(file)
        if not found:
            endings = ", ".join(_FORMATS)
            raise CorpusError(
                f"{path}: no text in this folder. Expected files that end in {endings}, optionally with .gz or .zst."
            )
        return found

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, source: Source) -> Iterator[Document]:
        match source.format:
            case "text":
                return self._read_text(source)
            case "markdown":
                return iter([Document(self._whole(source), "markdown", source.name)])
            case "wikitext":
                return self._read_wikitext(source)
            case "jsonl":
                return self._read_jsonl(source)
            case "embedded":
                return self._read_embedded(source)
            case "tfds-folder" | "tfds-name":
                return self._read_tfds(source)

    def _count_bytes(self, count: int) -> None:
        self.counts.bytes_read += count

    def _whole(self, source: Source) -> str:
        return read_text(source.path, self.encoding, self._count_bytes)

    def _lines(self, source: Source) -> Iterator[str]:
        return read_lines(source.path, self.encoding, self._count_bytes)

    def _read_text(self, source: Source) -> Iterator[Document]:
        first = next((line for line in read_lines(source.path, self.encoding) if line.strip()), "")
        if WIKITEXT_TITLE.fullmatch(first) and first.startswith(" "):
            yield from self._read_wikitext(source)
        elif self.blank_line == "paragraph":
            yield Document(self._whole(source), "wrapped", source.name)
        else:
            start, block = 1, []
            for number, line in enumerate(self._lines(source), 1):
                if line.strip():
                    start = start if block else number
                    block.append(line)
                elif block:
                    yield Document("\n".join(block), "lines", source.name, start)
                    block = []
            if block:
                yield Document("\n".join(block), "lines", source.name, start)

    def _read_wikitext(self, source: Source) -> Iterator[Document]:
        # A title must be between two blank lines: formulas and table legends within articles look the same.
        start, block, blank_before, title = 1, [], True, 0
        for number, line in enumerate(self._lines(source), 1):
            blank = not line.strip()
            if title and blank:
                *before, heading = block
                if any(part.strip() for part in before):
                    yield Document("\n".join(before), "wikitext", source.name, start)
                start, block = title, [heading]
            title = number if blank_before and WIKITEXT_TITLE.fullmatch(line) else 0
            block.append(line)
            blank_before = blank
        yield Document("\n".join(block), "wikitext", source.name, start)

    def _read_jsonl(self, source: Source) -> Iterator[Document]:
        for number, line in enumerate(self._lines(source), 1):
            if not line or line.isspace():
                continue
            where = f"{source.path}, line {number}"
            text = _text_of(parse_line(line, where), self.text_field, where, "a JSON object")
            yield Document(text, "lines", source.name, number)

    def _read_embedded(self, source: Source) -> Iterator[Document]:
        for name, text in python_docs.documentation(self._count_bytes):
            yield Document(text, "docstrings", f"{source.name}/{name}")

    def _read_tfds(self, source: Source) -> Iterator[Document]:
        examples = open_tfds(source.tfds_folder, self.split, str(source.path))
        size = sum(file.stat().st_size for _, file in source.files) / max(1, len(examples))
        for number, example in examples.windows(_EXAMPLES_AT_ONCE):
            where = f"{source.path}, example {number} of split {self.split!r}"
            self._count_bytes(int(size * (number + 1)) - int(size * number))
            text = _text_of(example, self.text_field, where, "an example with named features")
            yield Document(text, "lines", source.name, number + 1)


def _format_of(file: Path) -> Format | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _below(top: Path, file: Path) -> list[Path]:
    """Return the folders between `top` and `file`, excluding both."""
    return [parent for parent in file.parents if top in parent.parents]


def _text_of(value: Any, name: str, where: str, expected: str) -> str:
    if not isinstance(value, dict):
        raise CorpusError(f"{where}: expected {expected}, found {type(value).__name__}.")
    if name not in value:
        names = ", ".join(sorted(map(str, value))) or "none"
        raise CorpusError(f"{where}: no field {name!r} (found: {names}). Name the field with --text-field.")
    text = decoded(value[name], f"{where}: field {name!r}")
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field {name!r} holds {type(text).__name__}, expected text.")
    return text
