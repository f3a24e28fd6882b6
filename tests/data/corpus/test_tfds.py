"""Prepared tensorflow-datasets folders that are damaged, or name code of their own."""

import json
import sys

import pytest

from bestiary.data import Corpus
from bestiary.data.errors import DataError


@pytest.fixture
def folder(tmp_path, write_tfds):
    return write_tfds(tmp_path / "some", ["One.", "Two."])


OWN = "tensorflow_datasets.core.features.text_feature.Text"


@pytest.mark.parametrize("name", ["this.Feature", "os.path", "tensorflow_datasets.testing.Text", "Text", "", 3])
@pytest.mark.parametrize("form", ["new", "old"])
def test_only_the_library_s_own_features(folder, name, form):
    path = folder / "features.json"
    if form == "new":
        assert OWN in path.read_text()
        path.write_text(path.read_text().replace(f'"{OWN}"', json.dumps(name)))
    else:
        path.write_text(json.dumps({"type": name, "content": {}}))
    with pytest.raises(DataError, match=r"features.json: .* is not one of tensorflow-datasets' own features"):
        list(Corpus([folder]))
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("features.json", b"{"),
        ("features.json", b"[]"),
        ("features.json", b"null"),
        ("features.json", b"\xff"),
        ("features.json", b"{}"),
        ("dataset_info.json", b"{"),
        ("dataset_info.json", b"[]"),
        ("dataset_info.json", b'{"version": 5}'),
        ("dataset_info.json", b""),
    ],
)
def test_a_damaged_description(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=str(folder)):
        list(Corpus([folder]))


def test_damaged_and_missing_records(folder):
    (records,) = folder.glob("*array_record*")
    whole = records.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"\0" * len(whole), whole.replace(b"One", b"0ne")):
        records.write_bytes(content)
        with pytest.raises(DataError, match=str(folder)):
            list(Corpus([folder]))
    records.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(Corpus([folder]))


def test_the_number_of_examples_is_that_of_the_description(folder):
    path = folder / "dataset_info.json"
    for count in (1, 3):
        path.write_text(path.read_text().replace('"2"', f'"{count}"'))
        with pytest.raises(DataError, match=rf"2 examples of split 'train'; dataset_info.json says {count}"):
            list(Corpus([folder]))
        path.write_text(path.read_text().replace(f'"{count}"', '"2"'))
