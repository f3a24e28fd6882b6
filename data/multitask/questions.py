"""Read questions about images: easy-VQA's files, or tables of questions, answers and paths of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..images.files import SPLITS, Tree, folder_tree, table_files, zip_tree
from ..images.sets import EncodedImages
from ..json_files import expect, read_json
from ..tasks.tables import field_of, label_text, labels_of, read_table, text_of

ENDING = "_questions.json"
FORMATS = (
    "a folder with train_questions.json (rows of question, answer and number) and train/images/NUMBER.png, also in "
    "images.zip, as easy-VQA's; or a table of questions, answers and paths of images"
)


class Question(NamedTuple):
    """One question as it is in the data."""

    text: str
    answer: str
    image: str  # name of the image; empty for a question without one
    where: str


class Questions(NamedTuple):
    """The questions of a split."""

    texts: list[str]
    labels: np.ndarray  # [n] int32, numbers of the answers
    classes: tuple[str, ...]  # the answers
    images: EncodedImages  # each once
    image_of: np.ndarray  # [n] int64, number of each question's image, -1 for none
    where: list[str]


def read_questions(
    path: Path,
    evaluation: Path | None = None,
    *,
    question: str = "question",
    answer: str = "answer",
    image: str = "image",
) -> dict[str, Questions]:
    """Read the splits of a data set: "train", and "dev" and "test" if it has them.

    Args:
        path: a folder or a table; see `FORMATS`.
        evaluation: a second table, of "dev".
        question: column of a table that holds the questions.
        answer: column of the answers.
        image: column of the images' paths, relative to the table's folder; empty for a question without an image.

    Raises:
        DataError: it is neither, or a row is invalid; with file and line.
    """
    if evaluation is not None and path.is_dir():
        raise DataError(f"{path}: not a table, so that {evaluation} cannot be its evaluation set.")
    if path.is_dir():
        files = sorted(path.glob(f"*{ENDING}"))
        if files:
            return _easy_vqa(path, files)
        tables = table_files(path)
        if not tables:
            raise DataError(f"{path}: no questions in it. Expected {FORMATS}.")
    elif path.is_file():
        tables = {"train": path} | ({} if evaluation is None else {"dev": evaluation})
    else:
        raise DataError(f"{path}: there is no such folder or file. Expected {FORMATS}.")
    splits: dict[str, list[Question]] = {}
    for split, table in tables.items():
        for row in read_table(table):
            given = text_of(row, image)
            if given and (Path(given).is_absolute() or ".." in Path(given).parts):
                raise DataError(f"{row.where}: {given}: expected a path within {table.parent}.")
            if given and not (table.parent / given).is_file():
                raise DataError(f"{row.where}: there is no file {table.parent / given}.")
            name = str(table.parent / given) if given else ""
            asked, said = text_of(row, question), label_text(field_of(row, answer), row.where)
            splits.setdefault(split, []).append(Question(asked, said, name, row.where))
    return _numbered(splits, Tree([], lambda name: Path(name).read_bytes(), ""), str(path))


def _easy_vqa(folder: Path, files: list[Path]) -> dict[str, Questions]:
    """Read easy-VQA's files (Zhou 2019)."""
    archive = folder / "images.zip"
    tree = zip_tree(archive) if archive.is_file() else folder_tree(folder)
    names = set(tree.names)
    splits: dict[str, list[Question]] = {}
    for file in files:
        name = file.name.removesuffix(ENDING)
        split = SPLITS.get(name.lower())
        if split is None:
            raise DataError(f"{file}: expected a name of train, dev or test before {ENDING}.")
        for number, row in enumerate(expect(read_json(file), list, str(file)), 1):
            where = f"{file}, row {number}"
            fits = isinstance(row, list) and len(row) == 3 and all(map(isinstance, row, (str, str, int)))
            if not fits:
                raise DataError(f"{where}: expected [question, answer, number of the image], found {row!r:.80}.")
            picture = f"{name}/images/{row[2]}.png"
            if picture not in names:
                raise DataError(f"{where}: {tree.source} has no {picture}.")
            splits.setdefault(split, []).append(Question(row[0], label_text(row[1], where), picture, where))
    return _numbered(splits, tree, str(folder))


def _numbered(splits: Mapping[str, list[Question]], tree: Tree, source: str) -> dict[str, Questions]:
    """Number the answers, those of the training split in order of their names, and the images of each split."""
    if not splits.get("train"):
        raise DataError(f"{source}: no training questions in it; found the splits {', '.join(splits) or 'none'}.")
    classes = labels_of((row.answer for row in splits["train"]), source)
    numbers = {name: number for number, name in enumerate(classes)}
    found = {}
    for split, rows in splits.items():
        unknown = next((row for row in rows if row.answer not in numbers), None)
        if unknown is not None:
            raise DataError(f"{unknown.where}: the training questions never have the answer {unknown.answer!r}.")
        pictures = {name: number for number, name in enumerate(dict.fromkeys(row.image for row in rows if row.image))}
        images = EncodedImages(list(pictures), np.zeros(len(pictures), np.int32), ("",), tree.read, tree.source)
        found[split] = Questions(
            [row.text for row in rows],
            np.array([numbers[row.answer] for row in rows], np.int32),
            classes,
            images,
            np.array([pictures.get(row.image, -1) for row in rows], np.int64),
            [row.where for row in rows],
        )
    return found
