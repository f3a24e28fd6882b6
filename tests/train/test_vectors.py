"""`--vectors`: word vectors as initial embeddings, whatever marks a tokenizer's words."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.data.vectors import WordVectors, write_vectors
from bestiary.train.errors import RunError
from bestiary.train.vectors import vectors_weights

VECTORS = WordVectors(["the", "dog", "ing"], np.array([[3, 0], [0, 4], [1, 1]], np.float32))


def new() -> dict[str, Any]:
    return {"embeddings": {"word": {"embedding": jnp.ones((4, 2))}}, "layers": {"kernel": jnp.ones((4, 2))}}


@pytest.mark.parametrize(
    ("tokens", "replaced"),
    [
        (["[PAD]", "The", "##ing", "dog"], {1: 0, 3: 1}),
        (["<s>", "Ġthe", "ing", "Ġdog"], {1: 0, 3: 1}),
        (["<s>", "▁dog", "ing", "▁"], {1: 1}),
        (["<pad>", "the</w>", "ing", "cat</w>"], {1: 0}),
    ],
)
def test_tokens_that_are_words_get_their_vectors(tmp_path: Path, tokens: list[str], replaced: dict[int, int]) -> None:
    write_vectors(tmp_path / "v.txt", VECTORS)
    initial = vectors_weights(tmp_path / "v.txt", new, {"word": tokens})
    params = initial.load()
    np.testing.assert_array_equal(params["layers"]["kernel"], 1)
    found = params["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(np.delete(found, list(replaced), axis=0), 1)
    given = VECTORS.vectors[list(replaced.values())]
    scale = np.sqrt(2) / np.linalg.norm(given, axis=1).mean()
    np.testing.assert_allclose(found[list(replaced)], given * scale, rtol=1e-6)
    assert f"for {len(replaced)} tokens" in initial.described


def test_whole_words_have_no_marks(tmp_path: Path) -> None:
    """Ġ is a letter of Maltese."""
    write_vectors(tmp_path / "v.txt", WordVectors(["Ġunju", "the", "</w>"], VECTORS.vectors))
    tokens = ["Ġunju", "the", "fil</w>", "</w>"]
    assert "for 3 tokens" in vectors_weights(tmp_path / "v.txt", new, {"word": tokens}, whole=True).described


def test_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.txt", VECTORS)
    with pytest.raises(RunError, match=r"none of its 3 words"):
        vectors_weights(tmp_path / "v.txt", new, {"word": ["a", "b", "c", "d"]})
    write_vectors(tmp_path / "v.txt", WordVectors(["the"], np.ones((1, 3), np.float32)))
    with pytest.raises(RunError, match=r"vectors of 3, the embeddings have 2"):
        vectors_weights(tmp_path / "v.txt", new, {"word": ["the"]})
