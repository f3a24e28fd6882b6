"""GLUE as text to text, with the prefixes of T5 (Raffel et al. 2020, 2.4 and appendix D).

    mrpc sentence1: ... sentence2: ...      equivalent
    stsb sentence1: ... sentence2: ...      3.8

A rating is the text of the nearest multiple of 0.2. An answer that is none of a task's is wrong.
"""

from __future__ import annotations

import numpy as np

from ..corpus.parallel import Pair, clean_line
from .glue import GLUE, GlueTask
from .tables import TextExample

NAMES: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("hypothesis", "premise"),  # in the original's alphabetical order: the second text comes first
}
"""Names of a task's texts in the input, in its order; of the others sentence1 and sentence2."""
STEP = 0.2  # of a rating


def source_text(task: GlueTask, example: TextExample) -> str:
    """Return the input for an example."""
    texts = [example.first] if example.second is None else [example.first, example.second]
    if task.name == "mnli":
        texts.reverse()
    names = NAMES.get(task.name, ("sentence1", "sentence2"))
    parts = (f"{name}: {clean_line(text)[0]}" for name, text in zip(names, texts, strict=True))
    return " ".join([task.name, *parts])


def answer_text(task: GlueTask, label: float) -> str:
    """Return the output for a label: the name of a class, or a rating."""
    if task.label_names is None:
        return f"{np.round(label / STEP) * STEP:.1f}"
    return task.label_names[int(label)]


def answer_of(task: GlueTask, text: str) -> float | None:
    """Return the label that an output means; None if it means none."""
    text = text.strip()
    if task.label_names is not None:
        return task.label_names.index(text) if text in task.label_names else None
    try:
        value = float(text)
    except ValueError:
        return None
    low, high = task.range or (-np.inf, np.inf)
    return value if low <= value <= high else None


def as_pairs(name: str, examples: list[TextExample]) -> list[Pair]:
    """Return labelled examples of a task as pairs of texts."""
    task, pairs = GLUE[name], []
    for number, example in enumerate(examples, 1):
        assert example.label is not None
        pairs.append(Pair(source_text(task, example), answer_text(task, float(example.label)), number))
    return pairs
