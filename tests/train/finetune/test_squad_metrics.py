"""SQuAD's official numbers, worked out by hand and by trying every threshold, and n-best against every span."""

import itertools
import random

import numpy as np
import pytest

from bestiary.data.tasks.squad import Answer, Question, Windows
from bestiary.train.finetune.tasks.squad_answers import best_pairs, find_answers
from bestiary.train.finetune.tasks.squad_metrics import choose_threshold, exact, f1, metrics_v1, metrics_v2, normalised


def question(key: str, *answers: str, impossible: bool | None = None) -> Question:
    return Question(key, "?", " ".join(answers), tuple(Answer(text, 0) for text in answers), impossible)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog & AN eel!", "cat dog eel"),
        ("the-cat", "thecat"),  # punctuation goes before the articles are looked for
        ("another theme", "another theme"),
        ("A\u00a0B\u3000the\tC", "b c"),
        ("L’État, c’est «moi»", "l’état c’est «moi»"),  # only ASCII punctuation
        ("The", ""),
    ],
)
def test_texts_are_compared_in_their_normal_form(text, expected):
    assert normalised(text) == expected


def test_f1_is_that_of_bags_of_words():
    assert f1("the big big cat", "big black cat") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert f1("dog", "cat") == 0.0
    assert exact("The Cat.", "cat") == 1.0
    # No words at all: wrong in 1.1, and right in 2.0 where the answer has none either.
    assert f1("", "") == 0.0
    assert f1("", "the", empty_is_right=True) == 1.0
    assert f1("cat", "", empty_is_right=True) == 0.0


def test_version_1_takes_the_best_answer_and_counts_what_is_missing_as_wrong():
    questions = [question("a", "big cat", "The Cat"), question("b", "dog"), question("c", "eel")]
    found = metrics_v1(questions, {"a": "cat!", "b": "a dog ran"})
    assert found == {"exact_match": 100.0 / 3, "f1": 100.0 * (1 + 2 * 0.5 / 1.5) / 3}


def test_version_2_scores_both_kinds_and_looks_for_thresholds():
    questions = [question("a", "cat"), question("b", "dog", "the"), question("c"), question("d")]
    found = metrics_v2(questions, {"a": "cat", "b": "big dog", "c": "", "d": "eel"})
    assert found == {
        "exact": 50.0, "f1": 100.0 * (1 + 2 / 3 + 1) / 4, "total": 4,
        "HasAns_exact": 50.0, "HasAns_f1": 100.0 * (1 + 2 / 3) / 2, "HasAns_total": 2,
        "NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2,
    }  # fmt: skip
    odds = {"a": -3.0, "b": 1.0, "c": 0.0, "d": 2.0}
    predictions = {"a": "cat", "b": "big dog", "c": "eel", "d": "eel"}
    found = metrics_v2(questions, predictions, odds, threshold=0.5)
    assert (found["HasAns_exact"], found["NoAns_exact"]) == (50.0, 50.0)
    assert (found["best_exact"], found["best_exact_thresh"]) == (75.0, -3.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (75.0, -3.0)


def test_the_chosen_threshold_is_the_best_of_all():
    draw = random.Random(0)
    words = ["cat", "dog", "eel", "fox"]
    for _ in range(20):
        questions = [question(str(n), *draw.sample(words, draw.choice((0, 1, 2))), impossible=True) for n in range(12)]
        predictions = {q.key: " ".join(draw.sample(words, 2)) for q in questions}
        odds = {q.key: float(draw.randint(-3, 3)) for q in questions}  # with ties
        chosen = choose_threshold(questions, predictions, odds)

        def score(threshold, questions=questions, predictions=predictions, odds=odds):
            return metrics_v2(questions, predictions, odds, threshold)["f1"]

        assert score(chosen) == pytest.approx(max(score(t) for t in (-99.0, *odds.values())))


def test_no_answer_anywhere_is_a_threshold_below_all_odds():
    questions = [question("a", impossible=True), question("b", impossible=True)]
    assert choose_threshold(questions, {"a": "x", "b": "x"}, {"a": -5.0, "b": 3.0}) < -5.0


def test_the_best_pairs_are_those_of_all():
    random_numbers = np.random.default_rng(0)
    for tokens, longest, count in ((1, 5, 3), (9, 4, 6), (40, 7, 20), (6, 30, 100)):
        start, end = random_numbers.normal(size=(2, tokens)).round(1)
        allowed = random_numbers.random(tokens) < 0.7
        every = [(a, b) for a, b in itertools.product(range(tokens), repeat=2) if a <= b < a + longest and allowed[a]]
        expected = sorted(every, key=lambda pair: -(start[pair[0]] + end[pair[1]]))[:count]
        assert [tuple(pair) for pair in best_pairs(start, end, allowed, count, longest)] == expected
    assert best_pairs(np.zeros(0), np.zeros(0), np.zeros(0, bool), 3, 3).shape == (0, 2)


def test_answers_are_found_over_all_windows_and_cut_from_the_context():
    """Two windows of one question: tokens 0-3 and 2-5 of a context of six, seen best by the first up to token 2."""
    context = "Café de\u0301 la Paix, Paris"
    spans = np.array([[0, 4], [5, 7], [9, 11], [12, 16], [16, 17], [18, 23]])  # the accent is in no token
    windows = Windows(
        ids=[np.zeros(8), np.zeros(8)],
        context_starts=[3, 3],
        question=[0, 0],
        spans=[spans[:4], spans[2:]],
        best_context=[np.array([1, 1, 1, 0], bool), np.array([0, 1, 1, 1], bool)],
    )
    # [CLS] question [SEP] four tokens [SEP], twice
    start = np.array([1, 9, 9, 5, 2, 0, 9, 9, -1, 9, 9, 0, 0, 0, 3, 9], np.float32)
    end = np.array([1, 9, 9, 0, 6, 0, 0, 9, 0, 9, 9, 0, 1, 0, 4, 9], np.float32)
    starts = np.array([0, 8, 16])
    (found,) = find_answers([Question("q", "?", context)], windows, start, end, starts, n_best=3, max_answer_length=3)
    assert [(span.text, span.score) for span in found.spans] == [
        ("Café de\u0301", 11.0), ("de\u0301", 8.0), ("Paris", 7.0)
    ]  # fmt: skip
    assert found.null == (-1.0, 0.0), "of the window where it is lowest"
    assert found.null_odds == -12.0
    ranked = found.ranked(null=True)
    assert [option["text"] for option in ranked] == ["Café de\u0301", "de\u0301", "Paris", ""]
    assert sum(option["probability"] for option in ranked) == pytest.approx(1.0)
    assert ranked[0]["probability"] == pytest.approx(1 / (1 + np.exp(-3) + np.exp(-4) + np.exp(-12)))
