"""Answers from the scores of their first and last tokens: the best spans of a question over all of its windows.

A span's score is the sum of its two logits (Devlin et al. 2018, 4.2). Spans lie in the context, are at most so many
tokens long, and begin where their window shows the token best, so that a span counts once. The best are found exactly,
among all spans. No answer has the score of the two logits of [CLS], in the window where it is lowest (4.3).
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ....data.tasks.squad import Question, Windows


class Span(NamedTuple):
    """A stretch of the context and its logits."""

    text: str
    start: int
    """first character of the context"""
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


class Answers(NamedTuple):
    """What is found for a question."""

    spans: list[Span]  # best first, no two with the same text; empty where the context has no tokens
    null: tuple[float, float]  # logits of no answer

    @property
    def text(self) -> str:
        """The best span's."""
        return self.spans[0].text if self.spans else ""

    @property
    def null_odds(self) -> float:
        """How much more speaks for no answer than for the best span."""
        return sum(self.null) - self.spans[0].score if self.spans else 0.0

    def ranked(self, *, null: bool) -> list[dict[str, Any]]:
        """As in the released code's nbest_predictions.json, with no answer among them where `null`."""
        options = [(span.text, span.start_logit, span.end_logit) for span in self.spans]
        if null or not options:
            options.append(("", *self.null))
        options.sort(key=lambda option: -(option[1] + option[2]))
        scores = np.array([option[1] + option[2] for option in options])
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        return [
            {"text": text, "probability": float(share), "start_logit": start, "end_logit": end}
            for (text, start, end), share in zip(options, shares, strict=True)
        ]


def find_answers(
    questions: Sequence[Question],
    windows: Windows,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    starts: np.ndarray,
    *,
    n_best: int,
    max_answer_length: int,
) -> list[Answers]:
    """The answers of each question.

    Args:
        questions: those that the windows were made of.
        windows: W of them.
        start_logits, end_logits: [T] float32, of the windows' tokens one after the other.
        starts: [W + 1], where each window begins in them.
        n_best: spans of a question.
        max_answer_length: tokens of a span.
    """
    found: list[list[Span]] = [[] for _ in questions]
    nulls: list[list[tuple[float, float]]] = [[] for _ in questions]
    for window, (number, spans) in enumerate(zip(windows.question, windows.spans, strict=True)):
        base = int(starts[window])
        nulls[number].append((float(start_logits[base]), float(end_logits[base])))
        first = base + windows.context_starts[window]
        begin, end = start_logits[first : first + len(spans)], end_logits[first : first + len(spans)]
        context = questions[number].context
        for a, b in best_pairs(begin, end, windows.best_context[window], n_best, max_answer_length):
            text = _cut(context, int(spans[a, 0]), int(spans[b, 1]))
            found[number].append(Span(text, int(spans[a, 0]), float(begin[a]), float(end[b])))
    answers = []
    for candidates, null in zip(found, nulls, strict=True):
        candidates.sort(key=lambda span: -span.score)
        distinct = {span.text: span for span in reversed(candidates)}
        kept = sorted(distinct.values(), key=lambda span: -span.score)[:n_best]
        answers.append(Answers(kept, min(null, key=sum)))
    return answers


def best_pairs(start: np.ndarray, end: np.ndarray, allowed: np.ndarray, count: int, longest: int) -> np.ndarray:
    """The `count` best (a, b) with a <= b < a + longest, by start[a] + end[b] where allowed[a]; fewer if there are.

    Returns:
        [n, 2] int64, best first; of equal ones, the earlier and then the shorter first.
    """
    tokens = len(start)
    if not tokens:
        return np.zeros((0, 2), np.int64)
    padded = np.concatenate([end, np.full(longest - 1, -np.inf, end.dtype)])
    scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)
    scores = np.where(allowed[:, None], scores, -np.inf).reshape(-1)
    if count < len(scores):
        bound = np.partition(scores, -count)[-count]
        chosen = np.flatnonzero(scores >= bound)
    else:
        chosen = np.arange(len(scores))
    chosen = chosen[scores[chosen] > -np.inf]
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:count]
    first, more = np.divmod(chosen, longest)
    return np.stack([first, first + more], axis=1)


def _cut(context: str, start: int, stop: int) -> str:
    """The text of a span, with the marks that hang on its last letter: a tokenizer that strips accents ends before."""
    while stop < len(context) and unicodedata.category(context[stop]) == "Mn":
        stop += 1
    return context[start:stop]
