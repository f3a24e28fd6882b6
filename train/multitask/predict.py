"""Answer one of a model's tasks: `bestiary multitask predict runs/unit --task vqa --image a.png --question "..."`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from ...data.images.files import any_images
from ...data.images.processor import Processor
from ...data.images.sets import EncodedImages
from ...data.json_files import json_text
from ...data.multitask.examples import Examples, Pictures
from ...data.tasks.tables import TextExample
from ...models import load
from ...models.multimodal.unit import Unit, UnitConfig, UnitTask
from ..arguments import did_you_mean
from ..errors import RunError
from ..images.prediction import model_folder
from ..progress import Progress
from ..sharding import start_parallelism
from .config import PredictConfig
from .loop import Answerer
from .model import Inputs
from .tasks import question_texts, sentence_texts


def main(config: PredictConfig) -> int:
    """Run `bestiary multitask predict`; return the exit status."""
    folder = model_folder(config.run)
    loaded = load(folder)
    c: UnitConfig = loaded.config
    if not isinstance(c, UnitConfig):
        raise RunError(f"{folder}: not a model that `bestiary multitask train` saves.")
    names = [task.name for task in c.tasks]
    if config.task not in names:
        meant = did_you_mean(config.task, names) or f" Expected {' or '.join(names)}."
        raise RunError(f"--task {config.task}: {folder} has no such task.{meant}")
    task = c.task(config.task)
    processor = Processor.read(folder)
    tokenizer = None if c.text is None else loaded.tokenizer
    inputs = Inputs(processor, tokenizer, c.max_length or 512)
    asked, examples = read_examples(config, task, inputs)
    parallelism = start_parallelism(config.parallelism)
    params = parallelism.place_model(loaded.model, loaded.params)
    model: Unit = loaded.model
    logits = Answerer(model, inputs, parallelism, Progress())(params, task.name, examples, size=config.batch_size)
    assert logits is not None
    wide = logits.astype(np.float64)
    probabilities = softmax(wide, axis=-1) if task.loss == "softmax" else expit(wide)
    said = "answer" if task.reads == "image and text" else "class"
    for number, (own, row) in enumerate(zip(asked, probabilities, strict=True), 1):
        best = np.argsort(-row, kind="stable")[: config.top].tolist()
        top = {task.labels[label]: round(float(row[label]), 6) for label in best}
        found = task.labels[best[0]]
        line = {**own, said: found, "probability": top[found], "top": top}
        print(json_text(line, f"prediction {number}", ensure_ascii=False), flush=True)
    return 0


def read_examples(config: PredictConfig, task: UnitTask, inputs: Inputs) -> tuple[list[dict[str, Any]], Examples]:
    """Read what is asked on the command line.

    Returns:
        (for each example, what it is, to print; the examples, whose labels mean nothing)

    Raises:
        RunError: the task reads something else, or pairs, or the numbers of images and texts do not fit.
        DataError: an image cannot be read, or a question is too long.
    """
    given = {name: getattr(config, name) for name in ("image", "text", "text_pair", "question")}
    takes = {"image": ("image",), "text": ("text", "text_pair"), "image and text": ("image", "question")}[task.reads]
    needs = takes[0] if task.reads != "image and text" else "question"
    wrong = [name for name, values in given.items() if values and name not in takes]
    if wrong or not given[needs]:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in takes)
        found = f"found --{wrong[0].replace('_', '-')}" if wrong else f"found no --{needs}"
        raise RunError(f"--task {task.name} reads {task.reads}: expected {flags}, {found}.")
    if task.reads == "text":
        first, second = config.text, config.text_pair
        if task.pairs != bool(second):
            said = (
                "pairs of texts: expected a --text-pair for each --text"
                if task.pairs
                else "texts alone: leave out --text-pair"
            )
            raise RunError(f"--task {task.name} was trained on {said}.")
        if second and len(second) != len(first):
            raise RunError(f"Give as many --text-pair as --text; found {len(second)} and {len(first)}.")
        pairs: Sequence[str | None] = second or [None] * len(first)
        rows = [TextExample(a, b, None, "", "") for a, b in zip(first, pairs, strict=True)]
        assert inputs.tokenizer is not None
        texts, _ = sentence_texts(rows, inputs.tokenizer, inputs.longest)
        asked = [{"text": a} | ({} if b is None else {"text_pair": b}) for a, b in zip(first, pairs, strict=True)]
        return asked, Examples(np.zeros(len(rows), np.int32), task.labels, texts=texts)
    paths = any_images(config.image)
    images = pictures(paths)
    if task.reads == "image":
        of = np.arange(len(paths))
        return [{"image": str(path)} for path in paths], Examples(images.labels, task.labels, Pictures(images, of))
    questions = list(config.question)
    if len(paths) > 1 and len(questions) not in (1, len(paths)):
        raise RunError(f"{len(paths)} images and {len(questions)} questions: give one question, or one for each image.")
    count = max(len(paths), len(questions))
    questions = questions * count if len(questions) == 1 else questions
    of = np.arange(count) if len(paths) == count else np.full(count, len(paths) - 1)  # of one image; -1 of none
    assert inputs.tokenizer is not None
    texts = question_texts(questions, ["--question"] * count, inputs.tokenizer, inputs.longest)
    asked = [
        {"image": str(paths[number]) if number >= 0 else None, "question": question}
        for number, question in zip(of.tolist(), questions, strict=True)
    ]
    return asked, Examples(np.zeros(count, np.int32), task.labels, Pictures(images, of), texts)


def pictures(paths: Sequence[Path]) -> EncodedImages:
    """Return files as a set of images."""
    names = [str(path) for path in paths]
    return EncodedImages(names, np.zeros(len(names), np.int32), ("",), lambda name: Path(name).read_bytes(), "")
