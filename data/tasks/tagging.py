"""Read tagged sentences: entities in CoNLL columns (IOB1, IOB2 or BIOES), parts of speech in CoNLL-U.

Entity tags are always stored as IOB2: B-x begins an entity of type x, I-x continues it, O is outside. In IOB1, the
scheme of the CoNLL-2003 files, an entity begins with I-x, and with B-x only directly after another entity of its type
(Ramshaw and Marcus 1995; Tjong Kim Sang and Veenstra 1999). In BIOES, S-x is an entity of one word, and E-x ends one of
several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..errors import DataError
from ..reading import read_lines
from ..tokenizers.tokenizer import Tokenizer

OUTSIDE = "O"
Scheme = Literal["iob2", "iob1", "bioes"]
PartOfSpeech = Literal["upos", "xpos"]
UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
"""The universal parts of speech, a closed set (universaldependencies.org/u/pos)."""
_WORD_NUMBER = re.compile(r"([1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?|(0|[1-9][0-9]{0,8})\.([1-9][0-9]{0,8})")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
Lines = list[tuple[int, list[str]]]
"""line number, from 1, and fields of each line of a sentence"""


@dataclass(frozen=True)
class Sentence:
    """Words and, if known, their tags; `lines` are the words' lines of `file`."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    file: str
    lines: tuple[int, ...]
    """of each word"""
    text: str | None = None
    """the running text that the words are from, if it is known"""
    spans: tuple[tuple[int, int], ...] = ()
    """[start, stop) of each word in `text`, in characters"""

    def where(self, word: int) -> str:
        """Return file and line of a word."""
        return f"{self.file}, line {self.lines[word]}"


class TaggedFile(NamedTuple):
    """A file as it was read."""

    sentences: list[Sentence]
    repaired: int  # number of repaired tags
    columns: int


def read_conll(
    path: Path,
    *,
    scheme: Scheme = "iob2",
    repair: bool = False,
    word_column: int = 0,
    tag_column: int = -1,
    comment: str | None = None,
    labelled: bool = True,
    columns: int | None = None,
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
        comment: what lines begin with that are to be skipped.
        labelled: whether to read tags.
        columns: number of columns of the training file; a file with fewer, which lacks that of the tags, has no tags.

    Raises:
        DataError: lines have different numbers of columns, a word is empty, a tag is invalid for the scheme, or the
            file is empty; with file and line.
    """
    sentences, repaired = [], 0
    first: tuple[int, int] | None = None  # line and number of columns of the first word
    for rows in _blocks(path, comment, tabs=False):
        rows = [(number, fields) for number, fields in rows if not fields[0].startswith("-DOCSTART-")]
        if not rows:
            continue
        for number, fields in rows:
            first = first or (number, len(fields))
            if len(fields) != first[1]:
                raise DataError(
                    f"{path}, line {number}: expected {first[1]} columns, as on line {first[0]}, found {len(fields)}: "
                    f"{chr(9).join(fields)!r}."
                )
        assert first is not None
        if columns is not None and first[1] < columns and tag_column % columns >= first[1]:
            word_column, labelled, columns = word_column % columns, False, None
        lines = tuple(number for number, _ in rows)
        words = tuple(_column(fields, word_column, path, number) for number, fields in rows)
        tags = None
        if labelled:
            if first[1] < 2:
                raise DataError(
                    f"{path}, line {lines[0]}: expected at least 2 columns, a word and its tag among them, found "
                    f"{first[1]}: {words[0]!r}."
                )
            found = [_column(fields, tag_column, path, number) for number, fields in rows]
            tags, count = (_from_bioes if scheme == "bioes" else _from_iob)(found, scheme, repair, path, lines)
            repaired += count
        sentences.append(Sentence(words, tags, str(path), lines))
    return TaggedFile(_some(sentences, path), repaired, first[1] if first else 0)


def _from_iob(
    tags: list[str], scheme: Scheme, repair: bool, path: Path, lines: tuple[int, ...]
) -> tuple[tuple[str, ...], int]:
    """Return (the tags in IOB2, the number of repaired tags)."""
    converted: list[str] = []
    repaired = 0
    before = OUTSIDE
    for tag, line in zip(tags, lines, strict=True):
        prefix, kind = _parts(tag, "BI", path, line, "of IOB1 or IOB2: expected O, B-x or I-x")
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


def _from_bioes(
    tags: list[str], scheme: Scheme, repair: bool, path: Path, lines: tuple[int, ...]
) -> tuple[tuple[str, ...], int]:
    """Return (the tags in IOB2, the number of repaired tags); `scheme` is BIOES."""
    del scheme
    converted: list[str] = []
    repaired = 0
    begun = ""  # type of the entity that has begun and not ended
    for tag, line in zip([*tags, OUTSIDE], [*lines, lines[-1]], strict=True):
        prefix, kind = _parts(tag, "BIES", path, line, "of BIOES: expected O, B-x, I-x, E-x or S-x")
        continues = prefix in ("I", "E")
        wrong = kind != begun if continues else bool(begun)
        if wrong and not repair:
            problem = (
                f"{tag} continues no entity" if continues and not begun else f"no E-{begun} ends the entity before"
            )
            raise DataError(f"{path}, line {line}: {problem}. To read such tags nevertheless, pass --repair.")
        repaired += wrong
        converted.append(OUTSIDE if tag == OUTSIDE else f"{'I' if continues and not wrong else 'B'}-{kind}")
        begun = kind if prefix in ("B", "I") else ""
    return tuple(converted[:-1]), repaired


def _parts(tag: str, prefixes: str, path: Path, line: int, expected: str) -> tuple[str, str]:
    """Return (prefix, type) of a tag; empty for O."""
    if tag == OUTSIDE:
        return "", ""
    prefix, _, kind = tag.partition("-")
    if len(prefix) != 1 or prefix not in prefixes or not kind or _CONTROL.search(kind):
        hint = " If the file is in BIOES, pass --scheme bioes." if prefix in ("S", "E") and kind else ""
        raise DataError(f"{path}, line {line}: the tag {tag!r} is not {expected}.{hint}")
    return prefix, kind


def read_conllu(path: Path, *, column: PartOfSpeech = "upos", labelled: bool | None = True) -> TaggedFile:
    """Read words and parts of speech from CoNLL-U (universaldependencies.org/format.html).

    Words are syntactic words: lines of multiword tokens (1-2) and of empty nodes (1.1) are skipped.

    Args:
        path: the file; .gz and .zst are decompressed.
        column: upos (universal tags) or xpos (language-specific tags).
        labelled: whether to read tags; None: if the file has any.

    Raises:
        DataError: a line does not have ten fields or has no tag, words are not numbered from 1, a tag is no universal
            part of speech, or the file is empty; with file and line.
    """
    sentences = []
    for rows in _blocks(path, "#", tabs=True):
        kept = _numbered_words(rows, path)
        if not kept:
            continue
        tags = tuple(fields[{"upos": 3, "xpos": 4}[column]] for _, fields in kept) if labelled is not False else None
        lines = tuple(number for number, _ in kept)
        sentences.append(Sentence(tuple(fields[1] for _, fields in kept), tags, str(path), lines))
    if labelled is None and all(tag == "_" for sentence in sentences for tag in sentence.tags or ()):
        sentences = [replace(sentence, tags=None) for sentence in sentences]
    for sentence in sentences:
        for word, tag in enumerate(sentence.tags or ()):
            if tag == "_":
                raise DataError(f"{sentence.where(word)}: the word has no {column.upper()}.")
            if column == "upos" and tag not in UPOS:
                raise DataError(
                    f"{sentence.where(word)}: {tag!r} is not a universal part of speech: {', '.join(UPOS)}."
                )
    return TaggedFile(_some(sentences, path), 0, 10)


def _numbered_words(rows: Lines, path: Path) -> Lines:
    """Return the lines of words among a sentence's lines, after checking the fields and the numbers of all of them."""
    kept: Lines = []
    until = empty = 0  # end of the last multiword token; number of empty nodes since the last word
    for number, fields in rows:
        where = f"{path}, line {number}"
        if len(fields) != 10:
            raise DataError(f"{where}: expected CoNLL-U's 10 fields between tabs, found {len(fields)}.")
        if "" in fields:
            raise DataError(f"{where}: field {fields.index('') + 1} is empty; CoNLL-U writes _ for nothing.")
        found = _WORD_NUMBER.fullmatch(fields[0])
        if found is None:
            raise DataError(f"{where}: expected a word's number, found {fields[0]!r}.")
        word, last, after, node = (int(part) if part else None for part in found.groups())
        following = len(kept) + 1
        if after is not None:
            empty += 1
            wanted, right = f"{len(kept)}.{empty}", (after, node) == (len(kept), empty)
        elif last is not None:
            wanted, right = f"{following}-{following + 1}", word == following and last > following > until
            until = last
        else:
            wanted, right = str(following), word == following
            kept.append((number, fields))
            empty = 0
        if not right:
            raise DataError(f"{where}: the number is {fields[0]}; the next in the sentence is {wanted}.")
    if until > len(kept):
        raise DataError(
            f"{path}, line {rows[-1][0]}: the sentence ends with word {len(kept)}, within a multiword token."
        )
    return kept


def _blocks(path: Path, comment: str | None, *, tabs: bool) -> Iterator[Lines]:
    """Yield the groups of lines between blank lines, without comments; `tabs`: only tabs separate fields."""
    block: Lines = []
    for number, line in enumerate(read_lines(path), 1):
        # Only these two are blank: a no-break or ideographic space may be a word.
        text = line.rstrip(" \t")
        if "\r" in text:
            raise DataError(f"{path}, line {number}: a carriage return within the line. Lines end in a line feed.")
        if not text:
            if block:
                yield block
            block = []
        elif comment is None or not line.startswith(comment):
            if tabs:
                fields = line.split("\t")
            elif "\t" in text:
                fields = [field.strip(" ") for field in text.split("\t")]
            else:
                fields = [field for field in text.split(" ") if field]
            block.append((number, fields))
    if block:
        yield block


def _column(fields: list[str], column: int, path: Path, line: int) -> str:
    if not -len(fields) <= column < len(fields):
        raise DataError(
            f"{path}, line {line}: there is no column {column}; found {len(fields)}: {chr(9).join(fields)!r}."
        )
    if not fields[column]:
        raise DataError(f"{path}, line {line}: column {column} is empty: {chr(9).join(fields)!r}.")
    return fields[column]


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
    single word that is longer than a piece is truncated. A sentence without words is one piece, of special tokens.

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
        start, empty = 0, not pieces
        while start < len(pieces) or empty:
            empty = False
            begun = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, begun + room, side="right"))
            split += start == 0 and stop < len(pieces)
            part = pieces[start:stop]
            joined, its_types = tokenizer.join([i for piece in part for i in piece])
            ids.append(np.array(joined, np.int32))
            types.append(np.array(its_types, np.int32))
            marks = np.zeros(len(joined), np.bool_)
            if part:
                marks[np.concatenate([[0], ends[start : stop - 1] - begun]).astype(np.int64) + begin] = True
            first.append(marks)
            number.append(s)
            words.append((start, stop))
            start = stop
    ranges = np.array(words, np.int64).reshape(-1, 2)
    return TokenisedSentences(ids, types, first, np.array(number, np.int64), ranges, split, truncated)
