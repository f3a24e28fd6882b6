"""`bestiary words evaluate`: similarities and analogies."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...data.tasks.word_pairs import read_analogies, read_similarities
from ...data.vectors import WordVectors, read_vectors
from ..errors import RunError
from .config import EvaluateConfig

AT_ONCE = 512
"""Analogies that are answered together."""


def main(config: EvaluateConfig) -> int:
    """Run `bestiary words evaluate`; return the exit status."""
    pairs = {path: read_similarities(path) for path in config.similarities}
    analogies = None if config.analogies is None else read_analogies(config.analogies)
    vectors = read_vectors(config.vectors)
    index = folded(vectors.words)
    results: dict[str, Any] = {str(path): similarity(vectors, index, found, path) for path, found in pairs.items()}
    if analogies is not None:
        results[str(config.analogies)] = analogy(vectors, analogies, config)
    if config.json:
        print(json.dumps(results))
        return 0
    for name, found in results.items():
        if "spearman" in found:
            print(f"{name}: Spearman's rho {found['spearman']:.4f}; {found['used']} pairs, {found['missing']} left out")
        else:
            print(f"{name}: {found['accuracy']:.2%} of {found['used']:,} analogies; {found['missing']:,} left out")
            for section, (right, count) in found["sections"].items():
                print(f"  {section}: {right} of {count}")
    return 0


def folded(words: list[str]) -> dict[str, int]:
    """Return the number of each word in capitals; of two words that differ in case only, the more frequent one's."""
    index: dict[str, int] = {}
    for number, word in enumerate(words):
        index.setdefault(word.upper(), number)
    return index


def similarity(vectors: WordVectors, index: dict[str, int], pairs: Any, path: Path) -> dict[str, Any]:
    """Compute Spearman's correlation of cosines and scores over the pairs whose words are there.

    Raises:
        RunError: fewer than two are.
    """
    from scipy import stats

    used = [(index.get(pair.first.upper()), index.get(pair.second.upper()), pair.score) for pair in pairs]
    there = [(first, second, score) for first, second, score in used if first is not None and second is not None]
    if len(there) < 2:
        raise RunError(f"{path}: of its {len(pairs)} pairs, {len(there)} have both words among the vectors'.")
    firsts, seconds, scores = map(list, zip(*there, strict=True))
    cosines = (vectors.unit[firsts] * vectors.unit[seconds]).sum(axis=1)
    correlation: Any = stats.spearmanr(cosines, scores)
    return {"spearman": float(correlation.statistic), "used": len(there), "missing": len(pairs) - len(there)}


def analogy(vectors: WordVectors, questions: Any, config: EvaluateConfig) -> dict[str, Any]:
    """Answer analogies among the most frequent words; a question's own three words are no answers.

    Raises:
        RunError: no question has all its words there.
    """
    index = folded(vectors.words[: config.restrict])
    known = [
        (question.section, [index[word.upper()] for word in question.words])
        for question in questions
        if all(word.upper() in index for word in question.words)
    ]
    if not known:
        raise RunError(f"{config.analogies}: no question has its four words among the {len(index):,} vectors.")
    unit = vectors.unit[: config.restrict]
    sections: dict[str, list[int]] = {}
    for start in range(0, len(known), AT_ONCE):
        part = known[start : start + AT_ONCE]
        first, second, third, fourth = np.array([numbers for _, numbers in part]).T
        cosines = (unit[second] - unit[first] + unit[third]) @ unit.T
        for given in (first, second, third):
            cosines[np.arange(len(part)), given] = -np.inf
        for (section, _), right in zip(part, (cosines.argmax(axis=1) == fourth).tolist(), strict=True):
            counts = sections.setdefault(section, [0, 0])
            counts[0] += right
            counts[1] += 1
    right, count = (sum(counts[i] for counts in sections.values()) for i in (0, 1))
    return {"accuracy": right / count, "used": count, "missing": len(questions) - count, "sections": sections}
