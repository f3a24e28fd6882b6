"""The tasks of a run: their data, read and encoded, and what the model has to know of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...data.errors import DataError
from ...data.images.reading import read_images
from ...data.images.sets import ImageSet
from ...data.multitask.examples import Examples, Pictures, Texts
from ...data.multitask.questions import Questions, read_questions
from ...data.progress import counted
from ...data.random import RandomStream
from ...data.tasks.glue import FINETUNED, GLUE, read_glue
from ...data.tasks.tables import TextExample, read_labels, read_texts
from ...data.tokenizers.tokenizer import Tokenizer
from ...models.multimodal.unit import UnitTask
from ..arguments import did_you_mean
from ..errors import RunError
from ..progress import Progress
from .task_file import READS, TaskPart

HELD_OUT = 4  # purpose of random numbers


class Sentences(NamedTuple):
    """Texts or pairs of texts to classify."""

    examples: Sequence[TextExample]
    classes: tuple[str, ...]


Split = ImageSet | Sentences | Questions


@dataclass(frozen=True)
class TaskData:
    """A task's data as it was read: split -> what it holds."""

    name: str
    part: TaskPart
    splits: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.splits["train"].classes

    @property
    def task(self) -> UnitTask:
        """The task as the model has it."""
        loss = self.part.loss or ("sigmoid" if self.part.kind == "question-answering" else "softmax")
        reads: Any = READS[self.part.kind]
        train = self.splits["train"]
        pairs = isinstance(train, Sentences) and train.examples[0].second is not None
        return UnitTask(self.name, reads, self.classes, self.part.queries, loss, pairs)

    def training_texts(self) -> list[str]:
        """Return the training texts, for a tokenizer."""
        train = self.splits["train"]
        if isinstance(train, Questions):
            return list(train.texts)
        if isinstance(train, Sentences):
            return [text for example in train.examples for text in (example.first, example.second) if text]
        return []


def read_task(name: str, part: TaskPart) -> TaskData:
    """Read the data of a task.

    Raises:
        DataError: it is invalid, with file and line.
        RunError: it does not fit the task.
    """
    found: Mapping[str, Any]
    if part.kind == "image-classification":
        found = read_images(part.data, part.eval_data, path_column=part.image, label_column=part.label)
    elif part.kind == "question-answering":
        columns = {"question": part.question, "answer": part.answer, "image": part.image}
        found = read_questions(part.data, part.eval_data, **columns)
    else:
        found = _read_glue(name, part) if part.glue is not None else _read_table(part)
    if len(found["train"].classes) < 2:
        raise RunError(f"{name}: all training examples of {part.data} have one class; there is nothing to learn.")
    return TaskData(name, part, found)


def _read_glue(name: str, part: TaskPart) -> dict[str, Sentences]:
    assert part.glue is not None
    if part.glue not in FINETUNED:
        meant = did_you_mean(part.glue, FINETUNED) or f" Expected one of {', '.join(FINETUNED)}."
        raise RunError(f"{name}: there is no GLUE task {part.glue!r}.{meant}")
    task = GLUE[part.glue]
    if task.label_names is None:
        raise RunError(f"{name}: {part.glue} has values, not classes.")
    splits = {"train": "train", "dev": task.evaluation[0]}
    return {
        split: Sentences(read_glue(task, part.data, stored, labelled=True).examples, task.label_names)
        for split, stored in splits.items()
    }


def _read_table(part: TaskPart) -> dict[str, Sentences]:
    labels = read_labels(part.data, part.label)
    tables = {"train": part.data} | ({} if part.eval_data is None else {"dev": part.eval_data})
    return {
        split: Sentences(
            read_texts(table, text=part.text, text_pair=part.text_pair, label=part.label, labels=labels), labels
        )
        for split, table in tables.items()
    }


def encode(
    data: TaskData, tokenizer: Tokenizer | None, longest: int, seed: int, progress: Progress
) -> dict[str, Examples]:
    """Encode the splits of a task, and hold out a part of the training examples if there is nothing to evaluate on.

    Args:
        data: the task's data.
        tokenizer: of the model; None if it reads no text.
        longest: maximum length of a text, in tokens.
        seed: random seed.
        progress: where to report the splits.

    Returns:
        "train", and what to evaluate on.

    Raises:
        DataError: a question is too long.
        RunError: there are too few examples.
    """
    found, cut = {}, 0
    for split, read in data.splits.items():
        found[split], more = _encoded(read, tokenizer, longest)
        cut += more
    train, name = found["train"], data.name
    if len(found) == 1:
        if train.count < 2:
            raise RunError(f"{name}: {counted(train.count, 'example')}: too few to hold one out.")
        order = RandomStream(seed, HELD_OUT, train.count).permutation(train.count)
        count = min(max(1, round(data.part.held_out * train.count)), train.count - 1)
        found = {"train": train.only(np.sort(order[count:])), "dev": train.only(np.sort(order[:count]))}
    for split, examples in found.items():
        if not examples.count:
            raise RunError(f"{name}: no examples of {split}.")
        progress.line(f"{name}, {split}: {counted(examples.count, 'example')} of {len(examples.classes)} classes")
    if cut:
        progress.line(f"{name}: {counted(cut, 'token')} beyond max_length {longest} cut off")
    return found


def _encoded(read: Split, tokenizer: Tokenizer | None, longest: int) -> tuple[Examples, int]:
    """Encode a split; also return the number of tokens that were cut off."""
    if isinstance(read, Questions):
        assert tokenizer is not None
        texts = question_texts(read.texts, read.where, tokenizer, longest)
        return Examples(read.labels, read.classes, Pictures(read.images, read.image_of), texts), 0
    if isinstance(read, Sentences):
        assert tokenizer is not None
        labels = np.array([example.label for example in read.examples], np.int32)
        texts, cut = sentence_texts(read.examples, tokenizer, longest)
        return Examples(labels, read.classes, texts=texts), cut
    of = np.arange(len(read.labels))
    return Examples(np.asarray(read.labels, np.int32), read.classes, Pictures(read, of)), 0


def question_texts(questions: Sequence[str], where: Sequence[str], tokenizer: Tokenizer, longest: int) -> Texts:
    """Encode questions; an empty one has no tokens.

    Raises:
        DataError: a question is longer than `longest` tokens.
    """
    encoded = tokenizer.encode(questions)
    for ids, text, place in zip(encoded.ids, questions, where, strict=True):
        if len(ids) > longest and text.strip():
            raise DataError(
                f"{place}: a question of {len(ids)} tokens, beyond max_length {longest}: {text[:60]!r}. Shorten it, or "
                "raise max_length, up to the positions of the text encoder."
            )
    empty = [not text.strip() for text in questions]
    ids, types = (
        [np.array([] if none else row, np.int32) for row, none in zip(rows, empty, strict=True)]
        for rows in (encoded.ids, encoded.types)
    )
    return Texts(ids, types, tokenizer.pad_id, longest)


def sentence_texts(examples: Sequence[TextExample], tokenizer: Tokenizer, longest: int) -> tuple[Texts, int]:
    """Encode texts or pairs of texts; also return the number of tokens that were cut off."""
    pairs = examples[0].second is not None
    second = [example.second or "" for example in examples] if pairs else None
    encoded = tokenizer.encode([example.first for example in examples], second, longest)
    ids, types = ([np.array(row, np.int32) for row in rows] for rows in (encoded.ids, encoded.types))
    return Texts(ids, types, tokenizer.pad_id, longest), encoded.truncated
