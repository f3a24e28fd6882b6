"""Split running text into words, in the way in which tagged training data is split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

Split = Literal["punctuation", "clitics", "hyphens"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""What may be words of their own: punctuation, the ends of contractions (n't, 's), hyphens within words."""

_CLITIC = re.compile(r"(?:n['’]t|['’](?:s|re|ve|ll|m|d))$", re.IGNORECASE)
_WHOLE = re.compile(r"(?:https?://|www\.)\S+|[^\s@]+@[^\s@]+\.[^\s@]+", re.IGNORECASE)
_ABBREVIATION = re.compile(r"(?:[^\W\d_]\.)+|(?:Mr|Mrs|Ms|Dr|St|Inc|Corp|Ltd|Co|Jr|Sr|Prof|Gen|Sen|Rep|Gov|vs|etc)\.")
_COMPOUND = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)+")
_GLUED = re.compile(r"\w.*[,!?;)]", re.DOTALL)


def learnt_splits(sentences: Iterable[Sequence[str]]) -> tuple[Split, ...]:
    """Tell by the words of training data which splits it has: those that occur more often than their absence."""
    alone, within = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for words in sentences:
        for word in words:
            alone["punctuation"] += word in (",", "!", "?", ";", ")")
            within["punctuation"] += _GLUED.fullmatch(word) is not None
            clitic = _CLITIC.search(word)
            if clitic is not None:
                (within if clitic.start() else alone)["clitics"] += 1
            alone["hyphens"] += word == "-"
            within["hyphens"] += _COMPOUND.fullmatch(word) is not None
    within["hyphens"] *= 4  # since a dash between words is often written as a hyphen
    # Without any evidence, punctuation stands apart and everything else stays whole, as in most data.
    return tuple(name for name in SPLITS if alone[name] > within[name] - (name == "punctuation"))


def word_spans(text: str, splits: Sequence[str] = ("punctuation",)) -> list[tuple[int, int]]:
    """Return [start, stop) of each word, in characters.

    White space always separates words. Addresses, @names, #tags, abbreviations such as `U.S.`, and numbers such as
    1,234.50 stay whole; a run of one punctuation mark is one word.
    """
    found: list[tuple[int, int]] = []
    for chunk in re.finditer(r"\S+", text):
        if "punctuation" not in splits:
            found.append(chunk.span())
            continue
        for start, stop in _parts(chunk[0]):
            start, stop = start + chunk.start(), stop + chunk.start()
            word = text[start:stop]
            clitic = _CLITIC.search(word) if "clitics" in splits else None
            end = start + clitic.start() if clitic is not None and clitic.start() else stop
            if "hyphens" in splits and not _WHOLE.fullmatch(word):
                found += [(start + m.start(), start + m.end()) for m in re.finditer(r"-+|[^-]+", text[start:end])]
            else:
                found.append((start, end))
            if end < stop:
                found.append((end, stop))
    return found


def _parts(chunk: str) -> Iterator[tuple[int, int]]:
    """Yield the words of a text without white space, punctuation apart."""
    start, stop = 0, len(chunk)
    while start < stop and _is_mark(chunk[start]) and not _begins_name(chunk[start:stop]):
        end = start + 1
        while end < stop and chunk[end] == chunk[start]:
            end += 1
        yield start, end
        start = end
    ends: list[tuple[int, int]] = []
    while start < stop and _is_mark(chunk[stop - 1]) and not _ABBREVIATION.fullmatch(chunk, start, stop):
        begin = stop - 1
        while begin > start and chunk[begin - 1] == chunk[stop - 1]:
            begin -= 1
        ends.append((begin, stop))
        stop = begin
    if start < stop:
        if _WHOLE.fullmatch(chunk, start, stop) or _ABBREVIATION.fullmatch(chunk, start, stop):
            yield start, stop
        else:
            yield from _inner(chunk, start, stop)
    yield from reversed(ends)


def _inner(chunk: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the words of chunk[start:stop], which ends with a letter or digit; the marks within some words stay."""
    begun = start
    position = start + _begins_name(chunk[start:stop])
    while position < stop:
        mark = chunk[position]
        flanked = (
            position > begun and not _is_mark(chunk[position - 1]) and not _is_mark(chunk[position + 1 : position + 2])
        )
        digits = flanked and chunk[position - 1].isdecimal() and chunk[position + 1].isdecimal()
        if not _is_mark(mark) or (flanked and (mark in "-'’./&_" or (digits and mark in ",:"))):
            position += 1
            continue
        if begun < position:
            yield begun, position
        end = position + 1
        while end < stop and chunk[end] == mark:
            end += 1
        yield position, end
        begun = position = end
    if begun < stop:
        yield begun, stop


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" if character else True


def _begins_name(text: str) -> bool:
    """Tell whether a text is an @name or a #tag."""
    return text[0] in "@#" and len(text) > 1 and not _is_mark(text[1])
