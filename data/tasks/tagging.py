"""Read tagged sentences: entities in CoNLL columns (IOB1 or IOB2), parts of speech in CoNLL-U.

Entity tags are always stored as IOB2: B-x begins an entity of type x, I-x continues it, O is outside. In IOB1, the
scheme of the CoNLL-2003 files, an entity begins with I-x, and with B-x only directly after another entity of its type
(Ramshaw and Marcus 1995; Tjong Kim Sang and Veenstra 1999).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..errors import DataError
from ..reading import read_lines
from ..tokenizers.tokenizer import Tokenizer

OUTSIDE = "O"
Scheme = Literal["iob2", "iob1"]
PartOfSpeech = Literal["upos", "xpos"]


@dataclass(frozen=True)
class Sentence:
    """Words and, if known, their tags; `line` is the first word's line of `file`."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    file: str
    lines: tuple[int, ...]
    """of each word"""

    def where(self, word: int) -> str:
        """Return file and line of a word."""
        return f"{self.file}, line {self.lines[word]}"


class TaggedFile(NamedTuple):
    """Sentences of a file, and the number of repaired tags."""

    sentences: list[Sentence]
    repaired: int


def read_conll(
    path: Path,
    *,
    scheme: Scheme = "iob2",
    repair: bool = False,
    word_column: int = 0,
    tag_column: int = -1,
    labelled: bool = True,
) -> TaggedFile:
    """Read entities from columns, one word per line, sentences separated by blank lines.

    Columns are separated by tabs in a line that contains one, else by spaces. A line of only spaces and tabs is blank.
    Lines that begin with -DOCSTART- are skipped.

    Args:
        path: the file; .gz and .zst are decompressed.
        scheme: tagging scheme of the file; the result is IOB2.
        repair: read an I-x that continues no entity as B-x, and count it, instead of refusing the file.
        word_column: column of the words, from 0; negative numbers count from the end.
        tag_column: column of the tags, likewise.
        labelled: whether to read tags.

    Raises:
        DataError: a line has too few columns, a tag is invalid, an I-x in IOB2 continues no entity, or the file is
            empty; with file and line.
    """
    sentences, repaired = [], 0
    for rows in _blocks(path):
        rows = [(number, fields) for number, fields in rows if not fields[0].startswith("-DOCSTART-")]
        if not rows:
            continue
        lines = tuple(number for number, _ in rows)
        words = tuple(_column(fields, word_column, path, number) for number, fields in rows)
        tags = None
        if labelled:
            least = 1 + max(word_column, tag_column, 1)
            for number, fields in rows:
                if len(fields) < least:
                    raise DataError(
                        f"{path}, line {number}: expected at least {least} columns, a word and its tag among them, "
                        f"found {len(fields)}: {chr(9).join(fields)!r}."
                    )
            found = [_column(fields, tag_column, path, number) for number, fields in rows]
            tags, count = _to_iob2(found, scheme, repair, path, lines)
            repaired += count
        sentences.append(Sentence(words, tags, str(path), lines))
    return TaggedFile(_some(sentences, path), repaired)


def _to_iob2(
    tags: list[str], scheme: Scheme, repair: bool, path: Path, lines: tuple[int, ...]
) -> tuple[tuple[str, ...], int]:
    """Return (the tags in IOB2, the number of repaired tags)."""
    converted: list[str] = []
    repaired = 0
    before = OUTSIDE
    for tag, line in zip(tags, lines, strict=True):
        prefix, _, kind = tag.partition("-")
        if tag != OUTSIDE and not (prefix in ("B", "I") and kind):
            raise DataError(f"{path}, line {line}: the tag {tag!r} is not of IOB1 or IOB2: expected O, B-x or I-x.")
        if prefix == "I" and before[2:] != kind:
            if scheme == "iob2" and not repair:
                after = "at the sentence's start" if len(converted) == 0 else f"after {before}"
                raise DataError(
                    f"{path}, line {line}: {tag} {after} continues no entity, which IOB2 does not allow. If the file "
                    f"is in IOB1, pass --scheme iob1; to read such tags as B-{kind}, pass --repair."
                )
            repaired += scheme == "iob2"
            tag = f"B-{kind}"
        converted.append(tag)
        before = tag
    return tuple(converted), repaired


def read_conllu(path: Path, *, column: PartOfSpeech = "upos", labelled: bool = True) -> TaggedFile:
    """Read words and parts of speech from CoNLL-U (universaldependencies.org/format.html).

    Words are syntactic words: lines of multiword tokens (1-2) and of empty nodes (1.1) are skipped.

    Args:
        path: the file; .gz and .zst are decompressed.
        column: upos (universal tags) or xpos (language-specific tags).
        labelled: whether to read tags.

    Raises:
        DataError: a line does not have ten fields or has no tag, or the file is empty; with file and line.
    """
    sentences = []
    for rows in _blocks(path, comments=True):
        kept = []
        for number, fields in rows:
            if len(fields) != 10:
                raise DataError(
                    f"{path}, line {number}: expected CoNLL-U's 10 fields between tabs, found {len(fields)}."
                )
            if fields[0].isdecimal():
                kept.append((number, fields))
            elif not fields[0].replace("-", "").replace(".", "").isdecimal():
                raise DataError(f"{path}, line {number}: expected a word's number, found {fields[0]!r}.")
        if not kept:
            continue
        tags = None
        if labelled:
            tags = tuple(fields[{"upos": 3, "xpos": 4}[column]] for _, fields in kept)
            if "_" in tags:
                number = kept[tags.index("_")][0]
                raise DataError(f"{path}, line {number}: the word has no {column.upper()}.")
        lines = tuple(number for number, _ in kept)
        sentences.append(Sentence(tuple(fields[1] for _, fields in kept), tags, str(path), lines))
    return TaggedFile(_some(sentences, path), 0)


def _blocks(path: Path, *, comments: bool = False) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield the groups of lines between blank lines, as (line number, fields)."""
    block: list[tuple[int, list[str]]] = []
    for number, line in enumerate(read_lines(path), 1):
        # Only these two are blank: a no-break or ideographic space may be a word.
        stripped = line.strip(" \t")
        if not stripped:
            if block:
                yield block
            block = []
        elif not (comments and line.startswith("#")):
            block.append((number, line.split("\t") if "\t" in stripped else stripped.split()))
    if block:
        yield block


def _column(fields: list[str], column: int, path: Path, line: int) -> str:
    try:
        return fields[column]
    except IndexError:
        raise DataError(
            f"{path}, line {line}: there is no column {column}; found {len(fields)}: {chr(9).join(fields)!r}."
        ) from None


def _some(sentences: list[Sentence], path: Path) -> list[Sentence]:
    if not sentences:
        raise DataError(f"{path}: no sentences.")
    return sentences


# Labels and tokens


def tag_set(sentences: Sequence[Sentence], *, entities: bool) -> tuple[str, ...]:
    """Return the tag set of sentences in a fixed order; for entities, O first, and both B-x and I-x for every type."""
    found = {tag for sentence in sentences for tag in sentence.tags or ()}
    if not entities:
        return tuple(sorted(found))
    kinds = sorted({tag[2:] for tag in found if tag != OUTSIDE})
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))


def check_tags(sentences: Sequence[Sentence], labels: Sequence[str]) -> None:
    """Raise DataError, with file and line, at the first tag that is not among the labels."""
    known = set(labels)
    for sentence in sentences:
        for word, tag in enumerate(sentence.tags or ()):
            if tag not in known:
                raise DataError(
                    f"{sentence.where(word)}: the tag {tag!r} is not among those trained on: {', '.join(labels)}."
                )


class TokenisedSentences(NamedTuple):
    """P pieces: sentences, or parts of sentences that are longer than a row."""

    ids: list[np.ndarray]  # P arrays [T] int32, special tokens included
    types: list[np.ndarray]  # P arrays [T] int32, token types
    first: list[np.ndarray]  # P arrays [T] bool: the token is a word's first
    sentence: np.ndarray  # [P] int64, the sentence's number
    words: np.ndarray  # [P, 2] int64, the first of its words and the one after its last
    split: int  # sentences that were too long for one piece
    truncated: int  # tokens of words that alone are too long for one


def tokenise_words(tokenizer: Tokenizer, sentences: Sequence[Sentence], *, max_length: int) -> TokenisedSentences:
    """Tokenise word by word; a sentence of more than `max_length` tokens is cut between words into several pieces.

    A word without tokens (a control character, say) becomes the unknown token, so that every word has a first token. A
    single word that is longer than a piece is truncated.

    Raises:
        DataError: the length leaves no room for a word.
    """
    around = tokenizer.template.cost(pair=False)
    room = max_length - around
    if room < 1:
        raise DataError(f"--max-length is {max_length}; it must be at least {around + 1}.")
    begin = len(tokenizer.template.before)
    encoded = iter(tokenizer.encode_words([word for sentence in sentences for word in sentence.words]))
    ids, types, first, number, words = [], [], [], [], []
    split = truncated = 0
    for s, sentence in enumerate(sentences):
        whole = [next(encoded) or [tokenizer.unk_id] for _ in sentence.words]
        pieces = [piece[:room] for piece in whole]
        truncated += sum(map(len, whole)) - sum(map(len, pieces))
        ends = np.cumsum([len(piece) for piece in pieces])
        start = 0
        while start < len(pieces):
            begun = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, begun + room, side="right"))
            split += start == 0 and stop < len(pieces)
            part = pieces[start:stop]
            joined, its_types = tokenizer.join([i for piece in part for i in piece])
            ids.append(np.array(joined, np.int32))
            types.append(np.array(its_types, np.int32))
            marks = np.zeros(len(joined), np.bool_)
            marks[np.concatenate([[0], ends[start : stop - 1] - begun]).astype(np.int64) + begin] = True
            first.append(marks)
            number.append(s)
            words.append((start, stop))
            start = stop
    ranges = np.array(words, np.int64).reshape(-1, 2)
    return TokenisedSentences(ids, types, first, np.array(number, np.int64), ranges, split, truncated)
