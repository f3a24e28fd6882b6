"""SQuAD 1.1 and 2.0: questions whose answers are spans of a context, and the windows that a model reads them through.

Rajpurkar et al. 2016 and 2018. The files are one JSON object; data sets in other languages share the format (XQuAD,
GermanQuAD, KorQuAD, ...). Positions count characters (Unicode code points) of the context.

A context that is longer than a row is cut into overlapping windows; an answer is mapped to the tokens that it touches,
and a window that does not contain the whole answer points at [CLS] (Devlin et al. 2018, 4.2 and 4.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..json_files import parse_json
from ..reading import read_text
from ..tokenizers.tokenizer import Tokenizer

_SHOWN = 3  # maximum number of bad answers to quote in a message


class Answer(NamedTuple):
    """A span of the context: `context[start : start + len(text)] == text`."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question about a context.

    `answers` are all answers in the file, empty if there are none or if they are unknown. `impossible` is None in files
    of version 1.1, which do not have it.
    """

    key: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    impossible: bool | None = None


class SquadFile(NamedTuple):
    """Questions of a file, in order, and the number skipped because their answer is not in their context."""

    questions: list[Question]
    skipped: int


def read_squad(
    path: Path, *, labelled: bool = True, check_answers: bool = True, skip_bad_answers: bool = False
) -> SquadFile:
    """Read a file in SQuAD's JSON format, 1.1 or 2.0.

    Args:
        path: the file; .gz and .zst are decompressed.
        labelled: whether every question must have an answer or be marked as impossible.
        check_answers: whether each answer must be at the given position of its context, as training needs. The official
            evaluation compares texts only, so a file to evaluate on does not need this.
        skip_bad_answers: skip and count questions whose answer is not there, instead of refusing the file.

    Raises:
        DataError: the file is not JSON (with the line), does not have SQuAD's structure, or has no questions or a
            duplicate id; or a question has no answer, or one that is not in its context (with the question's id).
    """
    document = parse_json(read_text(path), str(path))
    questions: list[Question] = []
    bad: list[str] = []
    for question, problem in _questions(document, path):
        if labelled and not (question.answers or question.impossible):
            raise DataError(f'{path}, question "{question.key}": it has no answers, and is not marked is_impossible.')
        if problem is not None and check_answers:
            bad.append(f'question "{question.key}": {problem}')
            continue
        questions.append(question)
    total = len(questions) + len(bad)
    if bad and not skip_bad_answers:
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        lines = "".join(f"\n  {line}" for line in bad[:_SHOWN])
        raise DataError(
            f"{path}: {len(bad)} of {total} questions have an answer that is not in their context:{lines}{more}\n"
            "Positions count Unicode characters from 0. Correct the file, or skip them with --skip-bad-answers."
        )
    if not questions:
        raise DataError(f"{path}: no questions" + (f" but {len(bad)} with bad answers." if bad else "."))
    repeated = [key for key, count in Counter(question.key for question in questions).items() if count > 1]
    if repeated:
        raise DataError(
            f'{path}: {len(repeated)} ids belong to several questions, such as "{repeated[0]}". Predictions are '
            "written by id, so ids must be unique."
        )
    return SquadFile(questions, len(bad))


def _questions(document: Any, path: Path) -> Any:
    """Yield (question, what is wrong with its answers, or None)."""
    for a, article in enumerate(_list(document, "data", f"{path}")):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}, article {a + 1}")):
            where = f"{path}, article {a + 1}, paragraph {p + 1}"
            context = _text(paragraph, "context", where)
            for q, entry in enumerate(_list(paragraph, "qas", where)):
                at = f"{where}, question {q + 1}"
                key = entry.get("id") if isinstance(entry, dict) else None
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise DataError(f"{at}: expected an id, found {_found(key)}.")
                at = f'{path}, question "{key}"'
                stated = entry.get("answers")
                if not isinstance(stated, list | None):
                    raise DataError(f"{at}: expected a list `answers`, found {_found(stated)}.")
                answers = []
                for answer in stated or []:
                    text = _text(answer, "text", f"{at}, an answer")
                    start = answer.get("answer_start", -1)
                    if not isinstance(start, int) or isinstance(start, bool):
                        raise DataError(f"{at}: expected a whole number as answer_start, found {_found(start)}.")
                    answers.append(Answer(text, start))
                impossible = entry.get("is_impossible")
                if not isinstance(impossible, bool | None):
                    raise DataError(f"{at}: is_impossible is true or false, not {_found(impossible)}.")
                if impossible and answers:
                    raise DataError(f"{at}: it is marked is_impossible, but has answers.")
                question = Question(str(key), _text(entry, "question", at), context, tuple(answers), impossible)
                yield question, next(filter(None, (_problem(answer, context) for answer in question.answers)), None)


def _problem(answer: Answer, context: str) -> str | None:
    if not answer.text.strip():
        return "an empty answer"
    found = context[max(answer.start, 0) :][: len(answer.text)]
    if answer.start >= 0 and found == answer.text:
        return None
    elsewhere = context.find(answer.text)
    hint = f"; it stands at {elsewhere}" if elsewhere >= 0 else "; it stands nowhere in the context"
    return f"expected {_short(answer.text)} at character {answer.start}, found {_short(found)}{hint}"


def _list(holder: Any, name: str, where: str) -> list[Any]:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, list):
        raise DataError(
            f"{where}: expected a list `{name}`, found {_found(value if isinstance(holder, dict) else holder)}. "
            "SQuAD's format is data > paragraphs > context and qas > id, question, answers > text, answer_start."
        )
    return value


def _text(holder: Any, name: str, where: str) -> str:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text as `{name}`, found {_found(value)}.")
    return value


def _found(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {_short(str(value))}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# Windows


@dataclass
class Windows:
    """W windows, those of a question adjacent, and the positions of their tokens in the contexts.

    A window is the question and part of the context, joined as the tokenizer's family joins a pair: BERT's is
    [CLS] question [SEP] part of the context [SEP], of the types 0 ... 0 1 ... 1.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    """W arrays [length] int32"""
    types: list[np.ndarray] = field(default_factory=list)
    """W arrays [length] int32, token types"""
    context_starts: list[int] = field(default_factory=list)
    """index in the window of the context's first token"""
    question: list[int] = field(default_factory=list)
    """number of the question"""
    first: list[int] = field(default_factory=list)
    """index in the window of the answer's first token; 0, the window's first token, if the answer is not in it"""
    last: list[int] = field(default_factory=list)
    """index of the answer's last token"""
    spans: list[np.ndarray] = field(default_factory=list)
    """W arrays [tokens of the context, 2] int32: [start, stop) of each token in the context, in characters"""
    best_context: list[np.ndarray] = field(default_factory=list)
    """W arrays [tokens of the context] bool: of all windows with this token, this one has the most context around it"""
    cut_tokens: int = 0
    """number of tokens truncated from questions longer than `max_question`"""
    unheld: list[int] = field(default_factory=list)
    """numbers of the questions whose answer no window contains as a whole, or has no tokens"""


def make_windows(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    max_question: int = 64,
) -> Windows:
    """Cut questions' contexts into windows.

    Args:
        tokenizer: tokenizer of the model.
        questions: the questions; the first of a question's answers is the one to learn.
        max_length: maximum length of a window, in tokens, special tokens and the question included.
        doc_stride: distance between the starts of consecutive windows, in tokens.
        max_question: maximum length of a question, in tokens; longer questions are truncated, and counted.

    Raises:
        DataError: lengths that leave no room for the context.
    """
    if doc_stride < 1:
        raise DataError(f"--doc-stride is {doc_stride}; it must be at least 1.")
    template = tokenizer.template
    around = template.cost(pair=True)
    if not 0 < max_question < max_length - around:
        raise DataError(
            f"Windows of {max_length} tokens with questions of up to {max_question} leave no room for the context: "
            "raise --max-length, or lower --max-question."
        )
    windows = Windows()
    numbers: dict[str, int] = {}
    for question in questions:
        numbers.setdefault(question.context, len(numbers))
    contexts = [_Context(ids.tolist(), spans) for ids, spans in tokenizer.encode_with_spans(list(numbers))]
    asked = tokenizer.encode_batch([question.question for question in questions])
    for number, (question, words) in enumerate(zip(questions, asked, strict=True)):
        windows.cut_tokens += max(0, len(words) - max_question)
        words = words[:max_question]
        context = contexts[numbers[question.context]]
        answer = context.tokens_of(question.answers[0]) if question.answers else None
        begin = len(template.before) + len(words) + len(template.between)
        parts = context.parts(max_length - len(words) - around, doc_stride)
        held = False
        for start, stop in parts:
            ids, types = tokenizer.join(words, context.ids[start:stop])
            windows.ids.append(np.array(ids, np.int32))
            windows.types.append(np.array(types, np.int32))
            windows.context_starts.append(begin)
            windows.question.append(number)
            windows.spans.append(context.spans[start:stop])
            windows.best_context.append(_best_context(parts, start, stop))
            inside = answer is not None and start <= answer[0] and answer[1] < stop
            held |= inside
            for places, token in zip((windows.first, windows.last), answer or (0, 0), strict=True):
                places.append(begin + token - start if inside else 0)
        if question.answers and not held:
            windows.unheld.append(number)
    return windows


class _Context:
    """A tokenised context."""

    def __init__(self, ids: list[int], spans: np.ndarray):
        self.ids, self.spans = ids, spans

    def tokens_of(self, answer: Answer) -> tuple[int, int] | None:
        """Return the first and last token that the answer touches; None if there is none (zero-width characters)."""
        first = int(np.searchsorted(self.spans[:, 1], answer.start, side="right"))
        last = int(np.searchsorted(self.spans[:, 0], answer.start + len(answer.text), side="left")) - 1
        return (first, last) if first <= last else None

    def parts(self, room: int, stride: int) -> list[tuple[int, int]]:
        """Return [start, stop) of each window; an empty context has one empty window."""
        parts, start = [], 0
        while True:
            stop = min(start + room, len(self.ids))
            parts.append((start, stop))
            if stop == len(self.ids):
                return parts
            start += min(stride, room)


def _best_context(parts: list[tuple[int, int]], start: int, stop: int) -> np.ndarray:
    """Tell for each token whether [start, stop) is the window with the most context around it.

    As in the released code: the smaller of the contexts left and right of the token, plus a hundredth of the window's
    length; among equals, the first window.
    """
    if len(parts) == 1:
        return np.ones(stop - start, np.bool_)
    tokens = np.arange(start, stop)
    mine, best = None, np.full(len(tokens), -np.inf)
    for a, b in parts:
        shown = np.minimum(tokens - a, b - 1 - tokens) + 0.01 * (b - a)
        shown[(tokens < a) | (tokens >= b)] = -np.inf
        if (a, b) == (start, stop):
            mine = shown > best
            best = np.maximum(best, shown)
        elif mine is None:
            best = np.maximum(best, shown)
        else:
            mine &= shown <= best
    assert mine is not None
    return mine
