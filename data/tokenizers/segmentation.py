"""Subword regularisation: sample segmentations of words, each a pure function of its number.

- unigram (Kudo 2018, 3.2): a segmentation of a word is sampled with probability proportional to P^alpha.
- BPE dropout (Provilkov et al. 2020, 3.1): each merge is skipped with a probability at each step. A word has a bank of
  `BANK` such segmentations per epoch, and each occurrence uses one of them: the distribution is exactly the paper's,
  but two occurrences of a frequent word in an epoch may share a segmentation.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

BANK = 32
_SAMPLE = 3  # purpose of a random stream

Lattice = list[list[tuple[float, int, int]]]
"""For each end position in a word, the subwords that end there: (cumulative probability, start, id)."""


def segmentations(
    word: str, pieces: Mapping[str, tuple[int, float]], longest: int, unknown: tuple[int, float], alpha: float
) -> Lattice:
    """Build the lattice of all segmentations of a word with their probabilities.

    The probability of a subword is that of being the last one of the word up to its end, under P^alpha: sampling from
    the end backwards gives each segmentation its exact probability (forward filtering, backward sampling).

    Args:
        word: the word, in the characters of the subwords.
        pieces: subword -> (id, log probability).
        longest: length of the longest subword, in characters.
        unknown: (id, log probability) of a character that is not a subword.
        alpha: 1 for the model's probabilities, 0 for equal probabilities.
    """
    total = [0.0] + [-math.inf] * len(word)  # logarithm of the sum over segmentations up to here
    lattice: Lattice = [[]]
    for end in range(1, len(word) + 1):
        found = []
        for start in range(max(0, end - longest), end):
            piece = pieces.get(word[start:end])
            if piece is None and end - start == 1:
                piece = unknown
            if piece is not None:
                found.append((total[start] + alpha * piece[1], start, piece[0]))
        top = max(score for score, _, _ in found)
        weights = [math.exp(score - top) for score, _, _ in found]
        total[end] = top + math.log(sum(weights))
        ends = np.cumsum(weights) / sum(weights)
        lattice.append([(float(e), start, i) for e, (_, start, i) in zip(ends, found, strict=True)])
    return lattice


def walk(lattice: Lattice, number: int) -> list[int]:
    """Return the ids of one segmentation, selected by a 64-bit number."""
    ids: list[int] = []
    end = len(lattice) - 1
    while end:
        number = (number * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's generator, high bits used
        share = (number >> 11) * 2.0**-53
        choice = min(bisect_left(lattice[end], (share,)), len(lattice[end]) - 1)
        _, end, piece = lattice[end][choice]
        ids.append(piece)
    return ids[::-1]


def merge(
    symbols: list[str], rank: Callable[[str, str], float | None], dropout: float, draw: Iterator[float]
) -> list[str]:
    """Merge neighbours, lowest rank first and leftmost among equals, until nothing is left to merge.

    Args:
        symbols: symbols of a word, changed in place.
        rank: rank of two neighbours; None if they are not merged.
        dropout: probability of skipping a merge, independently at every step (Provilkov et al. 2020, algorithm 1).
        draw: uniform numbers in [0, 1); unused without dropout.
    """
    while len(symbols) > 1:
        lowest, place = None, -1
        for i in range(len(symbols) - 1):
            found = rank(symbols[i], symbols[i + 1])
            if found is None or (dropout and next(draw) < dropout):
                continue
            if lowest is None or found < lowest:
                lowest, place = found, i
        if lowest is None:
            break
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return symbols


def banked(
    kept: dict[Any, Any],
    word: str,
    number: int,
    dropout: float,
    key: tuple[int, ...],
    split: Callable[[str, float, Iterator[float]], list[int]],
) -> list[int]:
    """Return one of the word's segmentations of this epoch."""
    if kept.get("key") != (key, dropout):
        kept.clear()
        kept["key"] = (key, dropout)
    slot = number % BANK
    found = kept.get((word, slot))
    if found is None:
        name = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little", signed=True)
        kept[word, slot] = found = split(word, dropout, _uniforms(*key, name, slot))
    return found


def _uniforms(*key: int) -> Iterator[float]:
    """Yield endless numbers in [0, 1)."""
    start = 0
    while True:
        yield from ((mixed(*key, np.arange(start, start + 64)) >> np.uint64(11)) * 2.0**-53).tolist()
        start += 64


def mixed(*parts: int | np.ndarray) -> np.ndarray:
    """Hash parts, numbers or arrays of the same length, to uint64 by splitmix64's finaliser (Steele 2014)."""
    state = np.uint64(_SAMPLE)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)
