"""The data of tasks that are asked by prompts: examples as prompts and answers, and the official metrics."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.corpus.parallel import ParallelText
from ...data.tasks.glue import FINETUNED, GLUE
from ...data.tasks.multiple_choice import Choice, split_fold
from ...data.tasks.squad import Question, read_squad
from ...data.tasks.tables import TextExample
from ..errors import RunError
from ..finetune.tasks.choice import ChoiceTask
from ..finetune.tasks.glue import glue_task
from ..finetune.tasks.scores import scored
from ..finetune.tasks.squad_metrics import metrics_v1, metrics_v2
from ..finetune.tasks.table import table_task
from .templates import TEMPLATES, UNANSWERABLE, Template

NAMES = (*FINETUNED, "swag", "codah", "squad", "translation", "classification")


class Item(NamedTuple):
    """An example, asked."""

    key: str
    prompt: str
    answers: tuple[str, ...]  # candidates; for a question with a free answer, only the right one, to be shown
    right: int | None  # number of the right candidate; None: it has none


class AskedTask(NamedTuple):
    """A task: its examples, and how answers are counted."""

    template: Template
    items: Sequence[Item]  # to answer
    shown: Sequence[Item]  # to draw shots from
    free: bool  # answers are texts, not one of the candidates
    metrics: Callable[[Sequence[Any]], dict[str, float]]  # of predictions: candidates' numbers, or texts
    baseline: Sequence[Any]  # predictions of the most frequent answer, or of none
    values: bool = False  # predictions are values: the candidates' mean
    longest: int = 24  # maximum number of tokens of an answer that is generated, if no candidate is longer


def asked_task(
    name: str,
    data: Path,
    train: Path | None,
    split: str,
    limit: int | None,
    template: Template,
    columns: dict[str, Any],
) -> AskedTask:
    """Read a task.

    Args:
        name: one of `NAMES`.
        data: its folder or file.
        train: file or folder of the examples to show; None: those of `data`.
        split: split to answer, where `data` is a folder.
        limit: number of examples to answer, the first ones; None: all.
        template: the template.
        columns: for a table: text, text_pair, label; for translation: text, label, target, train_target.

    Raises:
        DataError: the data is invalid.
        RunError: the data is no table, or has another number of labels than the template has answers.
    """
    if name == "squad":
        return _squad(data, train, limit, template)
    if name == "translation":
        return _translation(data, train, limit, template, columns)
    if name in ("swag", "codah"):
        return _choice(ChoiceTask(name, 0), data, train, split, limit, template)
    if name == "classification":
        if not data.is_file():
            raise RunError(f"{data}: expected a table (.tsv, .csv or .jsonl).")
        task: Any = table_task(train or data, labels=(), regression=False, max_length=0, **columns)
        answers = template.answers or tuple(f" {label}" for label in task.labels)
        if len(answers) != len(task.labels):
            raise RunError(
                f"--answers: expected {len(task.labels)}, for the labels {', '.join(map(repr, task.labels))}; "
                f"found {len(answers)}: {', '.join(repr(answer.strip()) for answer in answers)}."
            )
        template = template._replace(answers=answers)
        shown = [] if train is None else task.read(train, "train", labelled=True)
        return _texts(task.metric_names, None, task.read(data, "dev", labelled=True)[:limit], shown, template)
    task = glue_task(name, 0)
    examples = task.read(data, split, labelled=True)
    source = data if train is None and not data.is_file() else train
    shown = [] if source is None else task.read(source, "train", labelled=True)
    return _texts(task.metric_names, GLUE[name].range, examples[:limit], shown, template)


def _texts(
    metrics: tuple[str, ...],
    values: tuple[float, float] | None,
    examples: Sequence[TextExample],
    shown: Sequence[TextExample],
    template: Template,
) -> AskedTask:
    answers = template.answers
    assert answers is not None

    def items(examples: Sequence[TextExample]) -> list[Item]:
        return [
            Item(e.key, template.fill(e.first, e.second), answers, None if e.label is None else round(e.label))
            for e in examples
        ]

    labels = np.array([example.label for example in examples])
    if values is None:
        constant = np.bincount(labels.astype(np.int64)).argmax()
        baseline = np.full(len(labels), constant)
    else:
        baseline = np.full(len(labels), labels.mean())
    return AskedTask(
        template,
        items(examples),
        items(shown),
        False,
        lambda predictions: scored(metrics, np.asarray(predictions), labels),
        baseline.tolist(),
        values is not None,
    )


def _choice(
    task: ChoiceTask, data: Path, train: Path | None, split: str, limit: int | None, template: Template
) -> AskedTask:
    questions = task.read(data, split, labelled=True)
    if train is not None:
        shown = task.read(train, "train", labelled=True)
    elif data.is_file():  # one file of all questions: as in cross-validation, one fold is answered
        shown, questions = split_fold(questions, 0)
    else:
        shown = task.read(data, "train", labelled=True)

    questions = questions[:limit]

    def items(questions: Sequence[Choice]) -> list[Item]:
        return [
            Item(q.key, template.fill(*q.pairs[0]), tuple(f" {second}" for _, second in q.pairs), q.label)
            for q in questions
        ]

    labels = np.array([question.label for question in questions])
    return AskedTask(
        template,
        items(questions),
        items(shown),
        False,
        lambda predictions: {"accuracy": float((np.asarray(predictions) == labels).mean())},
        np.full(len(labels), np.bincount(labels).argmax()).tolist(),
    )


def _squad(data: Path, train: Path | None, limit: int | None, template: Template) -> AskedTask:
    questions = read_squad(data, check_answers=False).questions[:limit]
    shown = [] if train is None else read_squad(train, check_answers=False).questions
    second = any(question.impossible is not None for question in questions)

    def items(questions: Sequence[Question]) -> list[Item]:
        return [
            Item(
                question.key,
                template.fill(question.context, question.question),
                (f" {question.answers[0].text}" if question.answers else UNANSWERABLE,),
                0,
            )
            for question in questions
        ]

    def metrics(texts: Sequence[str]) -> dict[str, float]:
        none = UNANSWERABLE.strip()
        found = {
            question.key: "" if second and text.strip().lower().startswith(none) else text
            for question, text in zip(questions, texts, strict=True)
        }
        return (metrics_v2 if second else metrics_v1)(questions, found)

    return AskedTask(template, items(questions), items(shown), True, metrics, [""] * len(questions))


def _translation(
    data: Path, train: Path | None, limit: int | None, template: Template, columns: dict[str, Any]
) -> AskedTask:
    fields = (columns["text"], columns["label"])

    def items(path: Path, target: Path | None) -> list[Item]:
        text = ParallelText([path] if target is None else [path, target])
        if text.form == "tfds":  # of which its training split would be read
            raise RunError(f"{path}: a data set. Expected lines, with --target for their translations, .tsv or .jsonl.")
        if text.form == "json":
            text.fields = fields
        return [Item(str(pair.line), template.fill(pair.source, None), (f" {pair.target}",), 0) for pair in text]

    questions = items(data, columns["target"])[:limit]
    shown = [] if train is None else items(train, columns["train_target"])
    right = [item.answers[0].strip() for item in questions]

    def metrics(texts: Sequence[str]) -> dict[str, float]:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        lists = list(texts), [right]
        return {"bleu": BLEU().corpus_score(*lists).score, "chrf": CHRF().corpus_score(*lists).score}

    return AskedTask(template, questions, shown, True, metrics, [""] * len(right), longest=64)


def default_template(name: str, pairs: bool) -> Template:
    """Return the template of a task; that of a table of pairs is its own."""
    return TEMPLATES["pairs" if name == "classification" and pairs else name]
