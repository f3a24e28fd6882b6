"""`--vectors`: word vectors as the initial embeddings of a new model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from ..data.vectors import WordVectors, read_vectors
from .errors import RunError
from .loop import InitialWeights

MARKS = ("▁", "Ġ")
"""What begins a token that begins a word, in some tokenizers."""
END = "</w>"
"""What ends a token that ends a word, in others."""


def vectors_weights(
    path: Path, initialise: Callable[[], Any], tokens: Mapping[str, list[str]], *, whole: bool = False
) -> InitialWeights:
    """Return new parameters with word vectors as the embeddings of the tokens that are whole words.

    The vectors are scaled so that they are as long, on average, as the embeddings they replace.

    Args:
        path: file of vectors, in either of word2vec's formats.
        initialise: returns new parameters, boxed or not.
        tokens: name of a table of embeddings -> its tokens, by their ids.
        whole: whether all tokens are whole words, without marks.

    Raises:
        RunError: the vectors have another width than the embeddings, or no token is among their words.
    """
    vectors = read_vectors(path)
    shapes: dict[Any, Any] = flatten_dict(nn.unbox(jax.eval_shape(initialise)))
    found = {at: at[-2] for at in shapes if at[-1] == "embedding" and at[-2] in tokens}
    if not found:
        raise RunError(f"--vectors {path}: this model has no table of word embeddings. Leave it out.")
    for at in found:
        width = shapes[at].shape[1]
        if width != vectors.vectors.shape[1]:
            raise RunError(f"--vectors {path}: vectors of {vectors.vectors.shape[1]}, the embeddings have {width}.")
    rows = {name: matches(of, vectors, whole=whole) for name, of in tokens.items() if name in found.values()}
    count = sum(len(ids) for ids, _ in rows.values())
    if not count:
        raise RunError(f"--vectors {path}: none of its {len(vectors.words):,} words is a token of this model's.")

    def load() -> Any:
        params: dict[Any, Any] = flatten_dict(jax.device_get(nn.unbox(initialise())))
        for at, name in found.items():
            ids, numbers = rows[name]
            table, new = np.array(params[at]), vectors.vectors[numbers]
            scale = np.linalg.norm(table, axis=1).mean() / max(float(np.linalg.norm(new, axis=1).mean()), 1e-30)
            table[ids] = new * scale
            params[at] = table
        return unflatten_dict(params)

    return InitialWeights(load, f"new weights, with the vectors of {path} for {count:,} tokens")


def matches(tokens: list[str], vectors: WordVectors, *, whole: bool) -> tuple[list[int], list[int]]:
    """Return the ids of tokens that are words, and the words' numbers; in lower case if need be."""
    begins = not whole and any(token.startswith(MARKS) for token in tokens)
    ends = not whole and any(token.endswith(END) for token in tokens)
    ids, numbers = [], []
    for number, token in enumerate(tokens):
        if (begins and not token.startswith(MARKS)) or (ends and not token.endswith(END)):
            continue
        word = (token.removesuffix(END) if ends else token)[begins:]
        at = vectors.index.get(word, vectors.index.get(word.lower()))
        if at is not None:
            ids.append(number)
            numbers.append(at)
    return ids, numbers
