"""`bestiary words nearest`: the words nearest to a word, in words, as JSON, or as a picture."""

import json

import numpy as np
from matplotlib.figure import Figure

from ...data.files import check_output, replacing
from ...data.vectors import WordVectors, read_vectors
from ..arguments import did_you_mean
from ..errors import RunError
from .config import NearestConfig


def main(config: NearestConfig) -> int:
    """Run `bestiary words nearest`; return the exit status."""
    if config.plot is not None:
        check_output(config.plot)
    vectors = read_vectors(config.vectors)
    found = {}
    for word in config.words:
        if word not in vectors.index:
            near = did_you_mean(word, vectors.words[:50_000])
            raise RunError(f"{config.vectors}: {word!r} is not among its {len(vectors.words):,} words.{near}")
        number = vectors.index[word]
        found[word] = vectors.nearest(vectors.unit[number], config.count, [number])
    if config.plot is not None:
        draw(config, vectors, found)
    if config.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    for word, near in found.items():
        print(f"{word}: " + ", ".join(f"{other} {cosine:.3f}" for other, cosine in near))
    return 0


def draw(config: NearestConfig, vectors: WordVectors, found: dict[str, list[tuple[str, float]]]) -> None:
    """Draw words and their neighbours on the first two principal components, a colour for each word's."""
    groups = {word: number for number, word in enumerate(found)}
    for word, near in found.items():
        for other, _ in near:
            groups.setdefault(other, groups[word])
    rows = vectors.unit[[vectors.index[word] for word in groups]]
    centred = rows - rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    places = centred @ axes[:2].T
    share = sizes**2 / max(float((sizes**2).sum()), 1e-30)
    figure = Figure(figsize=(8, 6), layout="constrained")
    plane = figure.subplots()
    for (word, group), (x, *y) in zip(groups.items(), places.tolist(), strict=True):
        height = y[0] if y else 0.0  # vectors of a single number have one component
        plane.plot(x, height, ".", color=f"C{group}")
        weight = "bold" if word in found else "normal"
        plane.annotate(word, (x, height), (3, 3), textcoords="offset points", fontsize=8, weight=weight)
    plane.set_xlabel(f"first principal component, {share[0]:.0%} of the variance")
    plane.set_ylabel(f"second, {share[1]:.0%}" if len(share) > 1 else "")
    plane.spines[["top", "right"]].set_visible(False)
    with replacing(config.plot) as unfinished:  # type: ignore[arg-type]
        figure.savefig(unfinished, format="png", dpi=150)
