"""Find answers from start and end logits: the best spans of a question over all of its windows.

A span's score is the sum of its two logits (Devlin et al. 2018, 4.2). Spans lie in the context, have a maximum length,
and start in the window with the most context around their first token, so that each span counts once. The search over
all spans is exact. The score of "no answer" is that of [CLS], in the window where it is lowest (4.3).
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from ....data.tasks.squad import Question, Windows


class Span(NamedTuple):
    """A span of the context and its logits."""

    text: str
    start: int
    """index of the first character in the context"""
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


class Answers(NamedTuple):
    """Answers found for a question."""

    spans: list[Span]  # best first, no two with the same text; empty where the context has no tokens
    null: tuple[float, float]  # logits of no answer

    @property
    def text(self) -> str:
        """Text of the best span."""
        return self.spans[0].text if self.spans else ""

    @property
    def null_odds(self) -> float:
        """Score of no answer minus the score of the best span."""
        return sum(self.null) - self.spans[0].score if self.spans else 0.0

    def ranked(self, *, null: bool) -> list[dict[str, Any]]:
        """Return the answers in the format of the released code's nbest_predictions.json; `null` includes no answer."""
        options = [(span.text, span.start_logit, span.end_logit) for span in self.spans]
        if null or not options:
            options.append(("", *self.null))
        options.sort(key=lambda option: -(option[1] + option[2]))
        scores = np.array([option[1] + option[2] for option in options])
        shares = softmax(scores)
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
    """Find the answers to each question.

    Args:
        questions: the questions of the windows.
        windows: W windows.
        start_logits: [T] float32, over the concatenated tokens of the windows.
        end_logits: [T] float32, likewise.
        starts: [W + 1], index of the first token of each window.
        n_best: maximum number of spans per question.
        max_answer_length: maximum length of a span, in tokens.
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
    """Find the `count` best (a, b) with a <= b < a + longest and allowed[a], by start[a] + end[b]; fewer if need be.

    Returns:
        [n, 2] int64, best first; among equals, the earlier and then the shorter first.
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
    """Return the text of a span, with the combining marks after it, which an accent-stripping tokenizer omits."""
    while stop < len(context) and unicodedata.category(context[stop]) == "Mn":
        stop += 1
    return context[start:stop]
