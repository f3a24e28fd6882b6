"""A row of training depends on the seed and its number alone; preprocessing is that of the reference."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bestiary.data.errors import DataError
from bestiary.data.images.augment import OPERATIONS, Augmentation, mixing_share
from bestiary.data.images.processor import Processor
from bestiary.data.images.sets import ArrayImages
from bestiary.data.images.stream import Rows, TrainingBatches, evaluation_batches
from bestiary.data.random import RandomStream

FIXTURE = Path(__file__).parent / "fixtures" / "processed.npz"


def images(count: int = 7, channels: int = 3) -> ArrayImages:
    array = np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), np.uint8)
    return ArrayImages(array, np.arange(count, dtype=np.int32) % 3, ("a", "b", "c"), "made up")


EVERYTHING = Augmentation("shift", 2, flip=True, operations=2, mixup=0.2)


def batches(size: int, index: int = 0, count: int = 1, augmentation: Augmentation = EVERYTHING) -> TrainingBatches:
    processor = Processor((8, 8))
    return TrainingBatches(Rows(images(), processor, augmentation, 5), size, index=index, count=count)


def test_every_image_once_an_epoch():
    stream = batches(7, augmentation=Augmentation())
    labels = [next(stream) for _ in range(3)]
    assert all(sorted(batch["labels"].tolist()) == sorted(images().labels.tolist()) for batch in labels)
    assert len({batch["pixel_values"].tobytes() for batch in labels}) == 3


def test_hosts_and_batch_sizes_do_not_matter():
    whole = next(batches(12))
    parts = [next(batches(12, index, 3)) for index in range(3)]
    small = batches(6)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
        first = small.get_state()
        np.testing.assert_array_equal(values, np.concatenate([next(small)[name], next(small)[name]]))
        small.set_state(first)


def test_resumes_exactly():
    stream = batches(4)
    before = [next(stream) for _ in range(5)]
    state = json.loads(json.dumps(stream.get_state()))
    after = [next(stream) for _ in range(2)]
    resumed = batches(4)
    resumed.set_state(state)
    assert len(before) == 5
    for expected in after:
        found = next(resumed)
        assert all((found[name] == values).all() for name, values in expected.items())
    with pytest.raises(DataError, match="belongs to other images"):
        resumed.set_state(state | {"images": "others"})
    with pytest.raises(DataError, match="row 20, is inside a batch of 3"):
        batches(3).set_state(state)


def test_evaluation_fills_the_last_batch_with_weight_zero():
    found = list(evaluation_batches(images(), Processor((8, 8)), 4))
    weights = np.concatenate([batch["weights"] for batch in found])
    assert weights.tolist() == [1] * 7 + [0]
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in found])[:7], images().labels)


def test_mixup_shares():
    shares = np.array([mixing_share(RandomStream(0, n), 0.2) for n in range(4000)])
    drawn = np.random.default_rng(0).beta(0.2, 0.2, 100_000)
    drawn = np.maximum(drawn, 1 - drawn)
    assert shares.min() >= 0.5
    np.testing.assert_allclose(np.quantile(shares, [0.1, 0.3, 0.5]), np.quantile(drawn, [0.1, 0.3, 0.5]), atol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["none", "shift", "inception"])
def test_augmentations_keep_shape_and_type(channels, crop):
    augment = Augmentation(crop, 3, flip=True, operations=3, magnitude=12)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 9, channels), np.uint8)
    processor = Processor((8, 8), channels=channels)
    for row in range(30):
        found = augment(pixels, RandomStream(row), processor)
        assert (found.shape, found.dtype) == ((8, 8, channels), np.uint8)


def test_augmentations_change_something_and_none_changes_nothing():
    pixels = np.random.default_rng(0).integers(40, 200, (32, 32, 3), np.uint8)
    same = Augmentation()(pixels, RandomStream(0), Processor((32, 32)))
    np.testing.assert_array_equal(same, pixels)
    for name, operation in OPERATIONS.items():
        changed = np.asarray(operation(Image.fromarray(pixels), 1.0, 1))
        assert (changed == pixels).all() == (name == "identity"), name
    flips = [Augmentation(flip=True)(pixels, RandomStream(n), Processor((32, 32))) for n in range(200)]
    assert 70 < sum((flip == pixels[:, ::-1]).all() for flip in flips) < 130


def test_preprocessing_is_the_references():
    """To 1/255, for the settings and pictures that the reference's own processor was given."""
    stored = np.load(FIXTURE)
    for number in range(int(stored["count"])):
        settings = json.loads(str(stored[f"settings{number}"]))
        found = Processor.from_json(settings, "fixture")(stored[f"image{number}"])
        np.testing.assert_allclose(found, stored[f"expected{number}"].transpose(1, 2, 0), atol=1 / 255)


def test_the_file_survives(tmp_path: Path):
    stored = {
        "image_processor_type": "DeiTImageProcessor", "do_resize": True, "size": {"shortest_edge": 256},
        "do_center_crop": True, "crop_size": {"height": 224, "width": 200}, "resample": 3, "do_rescale": True,
        "rescale_factor": 0.5, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0],
        "do_convert_rgb": None,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    processor = Processor.read(tmp_path)
    assert processor is not None
    assert (processor.size, processor.crop, processor.output) == (256, (224, 200), (224, 200))
    processor.save(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == stored
    assert Processor.read(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"longest_edge": 3}}, "size: expected height and width or shortest_edge"),
        ({"image_std": [1.0, 0.0, 1.0]}, "none of image_std zero"),
        ({"resample": 9}, "resample: expected one of"),
        ({"do_pad": True}, "do_pad is not implemented"),
        ({"size": "big"}, "size: expected"),
    ],
)
def test_settings_that_are_not_implemented(changes, message):
    with pytest.raises(DataError, match=message):
        Processor.from_json({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **changes}, "x.json")
