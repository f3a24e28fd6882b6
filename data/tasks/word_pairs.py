"""Benchmarks of word vectors: similarities of words (WordSim-353, SimLex-999), and analogies (questions-words.txt)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..reading import read_lines


class Similarity(NamedTuple):
    """A pair of words, and how similar people find them."""

    first: str
    second: str
    score: float


class Analogy(NamedTuple):
    """`first` is to `second` as `third` is to `fourth`; `section` names the kind of relation."""

    section: str
    words: tuple[str, str, str, str]


def read_similarities(path: Path) -> list[Similarity]:
    """Read a file of word pairs: two words and a score a line, separated by tabs or commas; # begins a comment.

    A first line of names of columns is passed over. Where it has one named SimLex999, that is the score.

    Raises:
        DataError: there is no such file, or a line is something else; with its number.
    """
    found: list[Similarity] = []
    column = 2
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("\t" if "\t" in line else ",")]
        try:
            found.append(Similarity(parts[0], parts[1], float(parts[column])))
        except (IndexError, ValueError):
            if found or len(parts) < 3:
                raise DataError(
                    f"{path}, line {number}: expected two words and a score, separated by tabs or commas."
                ) from None
            column = parts.index("SimLex999") if "SimLex999" in parts else 2
    if len(found) < 2:
        raise DataError(f"{path}: no pairs of words there.")
    return found


def read_analogies(path: Path) -> list[Analogy]:
    """Read a file of analogies: sections that begin with `: name`, and four words a line.

    Raises:
        DataError: there is no such file, or a line is something else; with its number.
    """
    found: list[Analogy] = []
    section = ""
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if line.startswith(":"):
            section = line[1:].strip()
        elif len(words) == 4:
            found.append(Analogy(section, (words[0], words[1], words[2], words[3])))
        elif words:
            raise DataError(f"{path}, line {number}: expected four words, found {len(words)}.")
    if not found:
        raise DataError(f"{path}: no analogies there.")
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    return list(read_lines(path))
