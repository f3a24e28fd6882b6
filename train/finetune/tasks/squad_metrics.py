"""Exact match and F1 of SQuAD 1.1 and 2.0, by the rules of the official scripts, in per cent.

Texts are compared without case, ASCII punctuation, English articles and superfluous white space, in any language; F1 is
computed on bags of words; each prediction is scored against the answer that it matches best.
"""

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ....data.tasks.squad import Question

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)


def normalised(text: str) -> str:
    """Normalise a text for comparison: lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, answer: str) -> float:
    """Return 1 if the two texts are equal after normalisation, else 0."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str, *, empty_is_right: bool = False) -> float:
    """Return the harmonic mean of precision and recall of the words.

    With `empty_is_right`, as in 2.0, two texts without words score 1; in 1.1 they score 0.
    """
    predicted, wanted = normalised(prediction).split(), normalised(answer).split()
    if empty_is_right and not (predicted and wanted):
        return float(predicted == wanted)
    shared = (collections.Counter(predicted) & collections.Counter(wanted)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def metrics_v1(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """Return `exact_match` and `f1` of version 1.1; a question without a prediction scores 0."""
    matches = scores = 0.0
    for question in questions:
        if question.key in predictions:
            predicted = predictions[question.key]
            matches += max(exact(predicted, answer.text) for answer in question.answers)
            scores += max(f1(predicted, answer.text) for answer in question.answers)
    return {"exact_match": 100.0 * matches / len(questions), "f1": 100.0 * scores / len(questions)}


class _Scored(NamedTuple):
    exact: float
    f1: float
    answerable: bool
    answered: bool


def _score_v2(question: Question, prediction: str) -> _Scored:
    # Answers that consist only of articles and punctuation do not count; "" answers a question without answers.
    answers = [answer.text for answer in question.answers if normalised(answer.text)] or [""]
    return _Scored(
        max(exact(prediction, answer) for answer in answers),
        max(f1(prediction, answer, empty_is_right=True) for answer in answers),
        bool(question.answers),
        bool(prediction),
    )


def metrics_v2(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> dict[str, float]:
    """Return the metrics of version 2.0 under the official script's names.

    Args:
        questions: the questions to score; one without a prediction is skipped, as in the official script.
        predictions: id -> text, "" for no answer.
        null_odds: id -> score against an answer. Questions above `threshold` count as answered by "", and the best
            thresholds are searched for. None: the predictions count as they are.
        threshold: between 0 and 1 for probabilities; any number for odds.
    """
    raw = {q.key: _score_v2(q, predictions[q.key]) for q in questions if q.key in predictions}
    odds = null_odds or {}

    def final(key: str, value: float) -> float:
        if odds.get(key, 0.0) > threshold:
            return float(not raw[key].answerable)
        return value

    exacts = {key: final(key, scored.exact) for key, scored in raw.items()}
    f1s = {key: final(key, scored.f1) for key, scored in raw.items()}
    found: dict[str, float] = {}
    groups = {
        "": list(raw),
        "HasAns_": [key for key, scored in raw.items() if scored.answerable],
        "NoAns_": [key for key, scored in raw.items() if not scored.answerable],
    }
    for prefix, keys in groups.items():
        if keys:
            found[f"{prefix}exact"] = 100.0 * sum(exacts[key] for key in keys) / len(keys)
            found[f"{prefix}f1"] = 100.0 * sum(f1s[key] for key in keys) / len(keys)
            found[f"{prefix}total"] = float(len(keys))
    if null_odds is not None:
        unanswerable = sum(not question.answers for question in questions)
        for name, scores in (("exact", [s.exact for s in raw.values()]), ("f1", [s.f1 for s in raw.values()])):
            found[f"best_{name}"], found[f"best_{name}_thresh"] = _best_threshold(raw, scores, odds, unanswerable)
    return found


def _best_threshold(
    raw: Mapping[str, _Scored], scores: Sequence[float], odds: Mapping[str, float], unanswerable: int
) -> tuple[float, float]:
    """Return (the best mean score in per cent, its threshold), found as in the official script.

    Starting with no question answered, questions are answered one by one in the order of their odds. For a threshold at
    which none is answered, the script reports 0.
    """
    by_key = dict(zip(raw, scores, strict=True))
    total = best = float(unanswerable)
    threshold = 0.0
    for key in sorted(odds, key=lambda key: odds[key]):
        if key not in raw:
            continue
        total += by_key[key] if raw[key].answerable else -float(raw[key].answered)
        if total > best:
            best, threshold = total, odds[key]
    return 100.0 * best / len(raw), threshold


def choose_threshold(
    questions: Sequence[Question], predictions: Mapping[str, str], null_odds: Mapping[str, float]
) -> float:
    """Return the threshold of the odds with the best F1; a question is answered unless its odds exceed it.

    Unlike in the official script, a threshold at which nothing is answered is below all odds, and questions with equal
    odds are answered together.

    Args:
        questions: at least one question.
        predictions: id -> text, never "".
        null_odds: id -> score of no answer minus that of the prediction.
    """
    order = sorted(questions, key=lambda question: null_odds[question.key])
    threshold = null_odds[order[0].key] - 1.0
    total = best = 0.0  # above that of no answer at all
    for number, question in enumerate(order):
        scored = _score_v2(question, predictions[question.key])
        total += scored.f1 if scored.answerable else -float(scored.answered)
        odds = null_odds[question.key]
        last_of_these = number + 1 == len(order) or null_odds[order[number + 1].key] > odds
        if last_of_these and total > best:
            best, threshold = total, odds
    return threshold
