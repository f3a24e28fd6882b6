"""Files of word vectors, in the text and the binary format of word2vec, as gensim reads and writes them.

The first line is the number of words and the size of their vectors. In the text format, a line then holds a word and
its numbers, separated by spaces; in the binary format a word, a space and float32 numbers, and a line feed, which
gensim leaves out. Which one a file is shows in what follows its first word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .errors import DataError
from .files import replacing

LONGEST_WORD = 4096  # in bytes; a longer one is a sign of a damaged file


@dataclass(frozen=True)
class WordVectors:
    """Words in the order of their frequency, and their vectors [V, D] float32."""

    words: list[str]
    vectors: np.ndarray

    def __post_init__(self) -> None:
        if len(self.words) != len(self.vectors):
            raise DataError(f"{len(self.words):,} words, but {len(self.vectors):,} vectors.")

    @cached_property
    def index(self) -> dict[str, int]:
        """Word -> its number."""
        return {word: number for number, word in enumerate(self.words)}

    @cached_property
    def unit(self) -> np.ndarray:
        """The vectors divided by their lengths, [V, D] float32; zeros stay zeros."""
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return self.vectors / np.maximum(lengths, np.finfo(np.float32).tiny)

    def nearest(self, queries: np.ndarray, count: int, but: Sequence[int] = ()) -> list[tuple[str, float]]:
        """Return the `count` words nearest to a vector [D] by cosine, with the cosines, without the words `but`."""
        cosines = self.unit @ (queries / max(float(np.linalg.norm(queries)), 1e-30))
        cosines[list(but)] = -np.inf
        best = np.argsort(-cosines, kind="stable")[: min(count, len(self.words) - len(but))]
        return [(self.words[number], float(cosines[number])) for number in best]


def write_vectors(path: Path, found: WordVectors, *, binary: bool | None = None) -> None:
    """Write word vectors; as binary if asked, or if the name ends in .bin.

    Raises:
        DataError: a word has white space in it, which these formats cannot hold.
    """
    for number, word in enumerate(found.words):
        if not word or word.split() != [word]:
            raise DataError(f"word {number + 1}, {word!r}: these formats cannot hold a word with white space in it.")
    binary = path.suffix == ".bin" if binary is None else binary
    vectors = np.ascontiguousarray(found.vectors, "<f4")
    with replacing(path) as unfinished, unfinished.open("wb") as handle:
        handle.write("{} {}\n".format(*vectors.shape).encode())
        for word, vector in zip(found.words, vectors, strict=True):
            numbers = vector.tobytes() if binary else " ".join(f"{number:.9g}" for number in vector.tolist()).encode()
            handle.write(word.encode() + b" " + numbers + b"\n")


def read_vectors(path: Path) -> WordVectors:
    """Read word vectors, in either format.

    Raises:
        DataError: there is no such file, its first line is not two numbers, it ends too soon, a vector has another
            length or is not finite, or a word occurs twice; with the line or the number of the word.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    size = os.path.getsize(path)
    with path.open("rb") as handle:
        header = handle.readline(64)
        parts = header.split()
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or not header.endswith(b"\n"):
            raise DataError(
                f"{path}, line 1: expected the number of words and the size of their vectors, such as `71290 100`, "
                f"found {header[:40]!r}. (GloVe's files have no such line: put it there.)"
            )
        count, width = int(parts[0]), int(parts[1])
        body = handle.read()
    if size - len(header) < count * (width + 2):
        raise DataError(f"{path}: too short for {count:,} vectors of {width} numbers. Copy the file again.")
    first = body.split(b"\n", 1)[0].rstrip().split(b" ")
    is_text = 2 * sum(map(_is_number, first[1:])) > len(first) - 1  # most of them, so that a mistake is named
    words, vectors = (_read_text if is_text else _read_binary)(path, body, count, width)
    index: dict[str, int] = {}
    for number, word in enumerate(words, 1):
        if index.setdefault(word, number) != number:
            raise DataError(f"{path}: {word!r} is word {index[word]:,} and word {number:,}. Leave one of them out.")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(f"{path}: the vector of word {bad[0] + 1:,}, {words[bad[0]]!r}, is NaN or infinite.")
    return WordVectors(words, vectors)


def _is_number(part: bytes) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True


def _read_text(path: Path, body: bytes, count: int, width: int) -> tuple[list[str], np.ndarray]:
    lines = body.split(b"\n")
    if lines and not lines[-1].strip():
        lines.pop()
    if len(lines) != count:
        raise DataError(f"{path}: line 1 says {count:,} words, but {len(lines):,} lines follow it.")
    words, vectors = [], np.empty((count, width), np.float32)
    for number, line in enumerate(lines):
        word, *numbers = line.rstrip().split(b" ")
        if len(numbers) != width:
            raise DataError(
                f"{path}, line {number + 2}: expected a word and {width} numbers, found {len(numbers) + 1} parts. "
                "(A word cannot have spaces in it.)"
            )
        try:
            vectors[number] = np.array(numbers, "S").astype(np.float32)
        except ValueError:
            raise DataError(
                f"{path}, line {number + 2}: the vector of {word.decode(errors='replace')!r} has no numbers."
            ) from None
        words.append(_decoded(word, f"{path}, line {number + 2}"))
    return words, vectors


def _read_binary(path: Path, body: bytes, count: int, width: int) -> tuple[list[str], np.ndarray]:
    words, vectors, at = [], np.empty((count, width), np.float32), 0
    for number in range(count):
        space = body.find(b" ", at, at + LONGEST_WORD)
        end = space + 1 + 4 * width
        if space < 0 or end > len(body):
            raise DataError(f"{path}: damaged or cut short at word {number + 1:,} of {count:,}. Copy the file again.")
        words.append(_decoded(body[at:space].lstrip(b"\n"), f"{path}, word {number + 1:,}"))
        vectors[number] = np.frombuffer(body, "<f4", width, space + 1)
        at = end
    if body[at:].strip(b"\n"):
        raise DataError(f"{path}: more follows after the {count:,} words that line 1 says.")
    return words, vectors


def _decoded(word: bytes, where: str) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{word[error.start]:02x}).") from None
