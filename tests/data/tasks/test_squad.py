"""SQuAD's files and windows: answers stand where they are said to, in any script, and every window knows its place."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import DataError, Tokenizer, load_tokenizer
from bestiary.data.tasks.squad import Answer, Question, make_windows, read_squad

UNCASED = Path(__file__).parents[1] / "fixtures" / "wordpiece" / "uncased"
BYTES = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "byte_bpe"
CONTEXT = "In May the river rose, and in May the bridge fell."


def write(path: Path, *questions: dict, context: str = CONTEXT, version: str = "1.1") -> Path:
    paragraph = {"context": context, "qas": [{"question": "When?", **question} for question in questions]}
    path.write_text(json.dumps({"version": version, "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    return path


def answered(key: str, text: str, start: int) -> dict:
    return {"id": key, "answers": [{"text": text, "answer_start": start}]}


def test_both_versions_are_read(tmp_path: Path):
    first = read_squad(write(tmp_path / "1.json", answered("a", "May", 3), answered("b", "May", 30)))
    assert [q.answers for q in first.questions] == [(Answer("May", 3),), (Answer("May", 30),)]
    assert [q.impossible for q in first.questions] == [None, None]
    impossible = {"id": "c", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]}
    second = read_squad(write(tmp_path / "2.json", {**answered("a", "May", 3), "is_impossible": False}, impossible))
    assert [(q.impossible, len(q.answers)) for q in second.questions] == [(False, 1), (True, 0)]


def test_an_answer_that_is_not_in_its_context_is_named_or_left_out(tmp_path: Path):
    path = write(
        tmp_path / "train.json", answered("fine", "May", 3), answered("off", "May", 4), answered("no", "June", 3)
    )
    with pytest.raises(DataError) as error:
        read_squad(path)
    said = str(error.value)
    assert f"{path}: 2 of 3 questions" in said
    assert "question \"off\": expected 'May' at character 4, found 'ay '; it stands at 3" in said
    assert "question \"no\": expected 'June' at character 3, found 'May '; it stands nowhere in the context" in said
    assert "--skip-bad-answers" in said
    kept = read_squad(path, skip_bad_answers=True)
    assert ([q.key for q in kept.questions], kept.skipped) == (["fine"], 2)
    # The official evaluation compares texts, so a file to evaluate on may be off.
    assert len(read_squad(path, check_answers=False).questions) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n oops', "line 2: not JSON"),
        ("[]", "expected a list `data`"),
        ('{"data": []}', "no questions"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "article 1, paragraph 1: expected text as `context`"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}', "question 1: expected an id"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 7}]}]}]}', '"7": expected text as `question`'),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q", "answers": []}]}]}]}',
            '"x": it has no answers',
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q", "answers": [{"text": "c", '
            '"answer_start": "0"}]}]}]}]}',
            "expected a whole number as answer_start",
        ),
        *(
            (
                '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q", ENTRY}]}]}]}'.replace(
                    "ENTRY", entry
                ),
                said,
            )
            for entry, said in (
                ('"answers": 5', "expected a list `answers`, found int"),
                ('"answers": ""', "expected a list `answers`, found str"),
                ('"answers": {"text": "c"}', "expected a list `answers`, found dict"),
                ('"answers": [5]', '"x", an answer: expected text as `text`'),
                ('"answers": [{"text": "c", "answer_start": 0.0}]', "expected a whole number as answer_start"),
                ('"is_impossible": 1', "is_impossible is true or false"),
                (
                    '"is_impossible": true, "answers": [{"text": "c", "answer_start": 0}]',
                    "is_impossible, but has answers",
                ),
            )
        ),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": true, "question": "q"}]}]}]}', "expected an id"),
    ],
)
def test_what_is_not_squad_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_squad(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_an_id_twice_is_refused(tmp_path: Path):
    path = write(tmp_path / "twice.json", answered("a", "May", 3), answered("a", "May", 30))
    with pytest.raises(DataError, match='1 ids belong to several questions, such as "a"'):
        read_squad(path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(UNCASED)


def text_of(windows, window: int, question: Question) -> str:
    """What the window's answer tokens stand for."""
    spans, start = windows.spans[window], windows.context_starts[window]
    return question.context[spans[windows.first[window] - start, 0] : spans[windows.last[window] - start, 1]]


def test_windows_are_joined_as_the_family_joins_a_pair():
    roberta = load_tokenizer(BYTES)
    context = "The file is read. It is a größer one, and the end of it is here."
    questions = [Question("q", "What is it?", context, (Answer("größer one", context.index("größer")),))]
    windows = make_windows(roberta, questions, max_length=40, doc_stride=8, max_question=20)
    ((whole, spans),) = roberta.encode_with_spans([context])
    (asked,) = roberta.encode_batch(["What is it?"])
    cls, sep = roberta.cls_id, roberta.sep_id
    room = 40 - len(asked) - 4
    for window, ids in enumerate(windows.ids):
        part = whole[8 * window :][:room]
        assert ids.tolist() == [cls, *asked, sep, sep, *part, sep]
        assert not windows.types[window].any()
        assert windows.context_starts[window] == len(asked) + 3
        assert windows.spans[window].tolist() == spans[8 * window :][:room].tolist()
        if windows.first[window]:
            assert text_of(windows, window, questions[0]) == "größer one"
    assert any(windows.first)
    with pytest.raises(DataError, match="leave no room"):
        make_windows(roberta, questions, max_length=8, max_question=4)


def test_windows_cover_the_context_with_the_stride(tokenizer: Tokenizer):
    words = [f"word{number}" for number in range(60)]
    context = " ".join(words)
    question = Question("q", "where is it", context, (Answer("word40", context.index("word40")),))
    ((whole, spans),) = tokenizer.encode_with_spans([context])
    windows = make_windows(tokenizer, [question], max_length=40, doc_stride=16, max_question=8)
    head = [tokenizer.cls_id, *tokenizer.encode_batch(["where is it"])[0], tokenizer.sep_id]
    room = 40 - len(head) - 1
    held = 0
    best = np.zeros(len(whole), int)
    for window, ids in enumerate(windows.ids):
        start = 16 * window
        stop = min(start + room, len(whole))
        assert ids.tolist() == [*head, *whole[start:stop], tokenizer.sep_id]
        assert windows.context_starts[window] == len(head)
        assert (windows.spans[window] == spans[start:stop]).all()
        best[start:stop] += windows.best_context[window]
        inside = question.answers[0].start >= spans[start, 0] and question.answers[0].start + 6 <= spans[stop - 1, 1]
        assert (windows.first[window] > 0) == (windows.last[window] > 0) == inside
        if inside:
            held += 1
            assert text_of(windows, window, question) == "word40"
    assert held > 1
    assert stop == len(whole)
    assert (best == 1).all(), "every token is shown best by exactly one window"
    assert windows.unheld == []


def test_an_answer_that_no_window_holds_points_at_cls_and_is_counted(tokenizer: Tokenizer):
    context = " ".join(f"word{number}" for number in range(60))
    question = Question("q", "where", context, (Answer(context[:-1], 0),))
    windows = make_windows(tokenizer, [question], max_length=40, doc_stride=16, max_question=8)
    assert set(windows.first) == set(windows.last) == {0}
    assert windows.unheld == [0]


@pytest.mark.parametrize(
    "context",
    [
        "Der Zürichsee liegt südlich; Genève ist französisch.",
        unicodedata.normalize("NFD", "Der Zürichsee liegt südlich; Genève ist französisch."),
        "東京は日本の首都です。　人口は約1400万人。",
        "Москва\u00a0—\u3000столица\u2003России, основана в\u20281147\u00a0году.",
        "नई दिल्ली भारत की राजधानी है 🇮🇳 और बड़ी है।",
        "İstanbul 😀 ist\u200b groß und die ﬁfte Stadt",
    ],
)
def test_answers_in_other_scripts_come_back_as_they_are(tokenizer: Tokenizer, context: str):
    """A word found by Python's own splitting, told by its character, is found again through the tokens."""
    questions, at = [], 0
    for word in context.split():
        at = context.index(word, at)
        questions.append(Question(f"{len(questions)}", "?", context, (Answer(word, at),)))
        at += len(word)
    windows = make_windows(tokenizer, questions, max_length=128)
    assert len(windows.ids) == len(questions)
    for window, question in enumerate(questions):
        found = text_of(windows, window, question)
        # What a token does not cover hangs on its last letter (stripped accents) or is not to be seen.
        rest = question.answers[0].text.removeprefix(found)
        assert question.answers[0].text.startswith(found)
        assert all(unicodedata.category(c) in ("Mn", "Cf") for c in rest), (found, rest)


def test_lengths_that_leave_no_room_are_refused(tokenizer: Tokenizer):
    question = Question("q", "where", "here", (Answer("here", 0),))
    with pytest.raises(DataError, match="leave no room for the context"):
        make_windows(tokenizer, [question], max_length=64, max_question=64)
    with pytest.raises(DataError, match="--doc-stride is 0"):
        make_windows(tokenizer, [question], doc_stride=0)


@pytest.mark.parametrize("answer", [Answer("\u200b", 5), Answer("here", -9), Answer("nowhere", 99)])
def test_an_answer_without_tokens_points_at_cls_and_is_counted(tokenizer: Tokenizer, answer: Answer):
    """The last two come from files to evaluate on, whose positions need not be right."""
    windows = make_windows(tokenizer, [Question("lost", "where", "here \u200b there", (answer,))])
    assert (windows.first, windows.last, windows.unheld) == ([0], [0], [0])


def test_the_real_files(shared: Path):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "bert-base-uncased")
    read = read_squad(shared / "data" / "squad" / "dev-v1.1.json")
    assert (len(read.questions), read.skipped) == (10_570, 0)
    some = read.questions[::40]
    windows = make_windows(tokenizer, some)
    assert windows.unheld == []
    same = [
        text_of(windows, w, some[q]) == some[q].answers[0].text
        for w, q in enumerate(windows.question)
        if windows.first[w]
    ]
    assert np.mean(same) > 0.98  # the others begin or end inside of a token, as the data has them
