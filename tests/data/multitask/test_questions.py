"""Questions about images, in easy-VQA's files and in tables; every mistake with its place."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bestiary.data.errors import DataError
from bestiary.data.multitask.questions import read_questions

ROWS = {"train": [["what?", "yes", 0], ["is it?", "no", 1], ["what?", "no", 0]], "test": [["is it?", "yes", 0]]}


def picture(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As easy-VQA is distributed, its images in folders."""
    for split, rows in ROWS.items():
        (tmp_path / f"{split}_questions.json").write_text(json.dumps(rows))
        for number in {row[2] for row in rows}:
            picture(tmp_path / split / "images" / f"{number}.png", grey=10 * number)
    return tmp_path


def test_easy_vqas_files(folder: Path):
    for again in range(2):
        found = read_questions(folder)
        train = found["train"]
        assert set(found) == {"train", "test"}
        assert train.texts == ["what?", "is it?", "what?"]
        assert (train.classes, train.labels.tolist()) == (("no", "yes"), [1, 0, 0])
        assert train.image_of.tolist() == [0, 1, 0]
        assert train.images.pixels(1).tolist() == np.full((4, 4, 3), 10).tolist()
        if not again:  # the second time, in an archive
            with zipfile.ZipFile(folder / "images.zip", "w") as archive:
                for path in folder.glob("*/images/*.png"):
                    archive.write(path, path.relative_to(folder).as_posix())
                    path.unlink()


def test_tables_with_a_question_that_has_no_image(tmp_path: Path):
    picture(tmp_path / "a" / "0.png")
    (tmp_path / "train.csv").write_text("question,answer,image\nwhat?,1,a/0.png\nand?,2,\n")
    (tmp_path / "more.tsv").write_text("question\tanswer\timage\nwhat?\t2\ta/0.png\n")
    found = read_questions(tmp_path / "train.csv", tmp_path / "more.tsv")
    assert found["train"].image_of.tolist() == [0, -1]
    assert found["dev"].labels.tolist() == [1]
    assert list(read_questions(tmp_path)) == ["train"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_questions.json", '[["what?", "yes"]]', "row 1: expected .question, answer, number of the image."),
        ("train_questions.json", '[["what?", "yes", 7]]', "has no train/images/7.png"),
        (
            "test_questions.json",
            '[["what?", "maybe", 0]]',
            "row 1: the training questions never have the answer 'maybe'",
        ),
        ("tests_questions.json", "[]", "expected a name of train, dev or test before _questions.json"),
        ("train_questions.json", "[]", "no training questions in it"),
    ],
)
def test_mistakes_in_easy_vqas_files(folder: Path, file: str, content: str, message: str):
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("what?,1,b.png", "line 3: there is no file"),
        ("what?,1,../b.png", "line 3: ../b.png: expected a path within"),
        ("what?,,a.png", "line 3: the label is missing"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, row: str, message: str):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"question,answer,image\nwhat?,1,a.png\n{row}\n")
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "t.csv")


def test_nothing_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"no questions in it\. Expected a folder with train_questions.json"):
        read_questions(tmp_path)
    with pytest.raises(DataError, match=r"not a table, so that more\.csv cannot be its evaluation set"):
        read_questions(tmp_path, Path("more.csv"))
    with pytest.raises(DataError, match="there is no such folder or file"):
        read_questions(tmp_path / "none")
