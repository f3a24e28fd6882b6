"""Batches of one task each: their shares, what they hold, and that they go on where they stopped."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from bestiary.data.errors import DataError
from bestiary.data.images.augment import Augmentation
from bestiary.data.images.processor import Processor
from bestiary.data.images.sets import ArrayImages
from bestiary.data.multitask.examples import Examples, Pictures, TaskRows, Texts, evaluation_batches
from bestiary.data.multitask.mixture import Mixture, of_task

GREY = Processor((4, 4), mean=(0.5,), std=(0.5,), channels=1)


def texts(count: int) -> Texts:
    random = np.random.default_rng(0)
    ids = [np.full(random.integers(1, 40), number + 1, np.int32) for number in range(count)]
    return Texts(ids, [np.zeros_like(row) for row in ids], 0)


def questions(count: int = 50) -> Examples:
    array = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    images = ArrayImages(array, np.zeros(3, np.int32), ("",), "here")
    labels = (np.arange(count) % 2).astype(np.int32)
    return Examples(labels, ("a", "b"), Pictures(images, np.arange(count) % 4 - 1), texts(count))


def mixture(batch: int = 4, seed: int = 0, **more: Any) -> Mixture:
    both = {"vqa": questions(), "mood": Examples(np.zeros(30, np.int32), ("x", "y"), texts=texts(30))}
    rows = {
        name: TaskRows(examples, GREY, Augmentation(), batch=batch, seed=seed, task=number)
        for number, (name, examples) in enumerate(both.items())
    }
    return Mixture(rows, {"vqa": 3, "mood": 1}, batch, seed=seed, threads=1, **more)


def test_a_batch_is_of_one_task_by_its_share():
    batches = mixture()
    names = [batches.place(number)[0] for number in range(1100)]
    assert 0.2 < names.count("mood") / 1100 < 0.3
    for name in ("vqa", "mood"):
        own = [number for task, number in map(batches.place, range(1100)) if task == name]
        assert own == list(range(len(own)))


def test_an_epoch_has_every_example_once():
    batches = mixture(batch=5)
    seen: Counter[int] = Counter()
    while seen.total() < 50:
        task, batch = of_task(next(batches))
        if task == "vqa":
            seen.update(batch["input_ids"][:, 0].tolist())  # the number of the example
    assert seen == Counter(range(1, 51))


def test_what_a_batch_holds():
    examples = questions()
    batch = examples.batch([0, 5], GREY)
    assert batch["has_image"].tolist() == [0, 1]
    np.testing.assert_array_equal(batch["pixel_values"][0], 0)
    np.testing.assert_allclose(batch["pixel_values"][1], 2 * 1 / 255 - 1, atol=1e-6)
    lengths = [len(examples.texts.ids[number]) for number in (0, 5)] if examples.texts else []
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["segment_ids"].sum(axis=1).tolist() == lengths
    for row, number in enumerate((0, 5)):
        assert set(batch["input_ids"][row].tolist()) <= {0, number + 1}


@pytest.mark.parametrize("longest", [12, 30, 40])
def test_rows_are_no_longer_than_the_encoder_reads(longest: int):
    ids = [np.ones(length, np.int32) for length in (3, longest)]
    examples = Examples(np.zeros(2, np.int32), ("a", "b"), texts=Texts(ids, ids, 0, longest))
    shapes = [examples.batch(numbers, None)["input_ids"].shape[1] for numbers in ([0], [0, 1])]
    assert shapes == [min(16, longest), longest]


def test_batches_are_of_similar_lengths():
    """In the first epoch and in later ones, which begin within a batch."""
    rows = TaskRows(questions(397), GREY, Augmentation(), batch=8, seed=1, task=0)
    shapes = [rows.batch(range(8 * number, 8 * number + 8))["input_ids"].shape[1] for number in range(150)]
    for epoch in range(3):
        own = shapes[50 * epoch : 50 * epoch + 50]
        assert np.mean(own) < 36  # of lengths up to 39; eight at random nearly always need 48
        assert {16, 48} <= set(own)


def test_a_saved_position_goes_on_and_parts_make_the_whole():
    whole = mixture()
    before = [next(whole) for _ in range(7)]
    state = whole.get_state()
    again = mixture()
    again.set_state(state)
    halves = [mixture(index=index, count=2) for index in range(2)]
    for half in halves:
        half.set_state(state)
    for _ in range(5):
        expected, found = next(whole), next(again)
        parts = [next(half) for half in halves]
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(values, found[name])
        name = next(name for name in expected if name.endswith("/labels"))
        np.testing.assert_array_equal(expected[name], np.concatenate([part[name] for part in parts]))
    assert len(before) == 7
    with pytest.raises(DataError, match="belongs to other tasks or data"):
        again.set_state(state | {"tasks": "others"})


def test_evaluation_has_every_example_once():
    examples, seen = questions(), []
    for numbers, batch in evaluation_batches(examples, GREY, 12):
        assert len(batch["labels"]) == 12
        np.testing.assert_array_equal(batch["labels"][: len(numbers)], examples.labels[numbers])
        seen += numbers.tolist()
    assert sorted(seen) == list(range(50))
