"""Files of word vectors: both formats, there and back, and what is wrong with a file."""

from pathlib import Path

import numpy as np
import pytest

from bestiary.data.errors import DataError
from bestiary.data.vectors import WordVectors, read_vectors, write_vectors

WORDS = ["the", "élan", "don't", "42"]
VECTORS = WordVectors(WORDS, np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))


@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
def test_vectors_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    write_vectors(tmp_path / name, VECTORS)
    found = read_vectors(tmp_path / name)
    assert found.words == WORDS
    np.testing.assert_array_equal(found.vectors, VECTORS.vectors)


def test_binary_files_without_line_feeds_are_read(tmp_path: Path) -> None:
    """As gensim writes them."""
    body = b"".join(
        word.encode() + b" " + vector.tobytes() for word, vector in zip(WORDS, VECTORS.vectors, strict=True)
    )
    (tmp_path / "v.bin").write_bytes(b"4 3\n" + body)
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.bin").vectors, VECTORS.vectors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the 1 2\n", "line 1: expected the number of words"),
        (b"2 2\na 1 2\nb 1\n", "line 3: expected a word and 2 numbers, found 2 parts"),
        (b"2 2\na 1 2\nb c 1 2\n", "line 3: .*cannot have spaces"),
        (b"2 2\na 1 2\na 3 4\n", "'a' is word 1 and word 2"),
        (b"3 2\na 1 2\nb 3 4\n", "line 1 says 3 words, but 2 lines"),
        (b"2 2\na 1 2\nb 1 nan\n", "word 2, 'b', is NaN"),
        (b"2 2\na 1 2\nb 1 x\n", "line 3: the vector of 'b' has no numbers"),
        (b"9 9\na 1 2\n", "too short for 9 vectors"),
        (b"2 2\na " + bytes([0, 0, 128, 63]) * 2 + b"\nbb " + bytes(6), "cut short at word 2 of 2"),
        (b"1 2\n\xff 1 2\n", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / "v")


def test_words_with_spaces_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="word 2, 'a b'"):
        write_vectors(tmp_path / "v.txt", WordVectors(["a", "a b"], np.zeros((2, 2), np.float32)))


def test_the_nearest_are_by_cosine() -> None:
    found = WordVectors(["a", "b", "c"], np.array([[1, 0], [9, 1], [0, 2]], np.float32))
    assert [word for word, _ in found.nearest(found.unit[0], 5, [0])] == ["b", "c"]
