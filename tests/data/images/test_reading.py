"""Every format gives the images and classes that are in it, or says what is wrong and where."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bestiary.data.errors import DataError
from bestiary.data.images.reading import read_images
from bestiary.data.images.sets import hold_out


def write_idx(path: Path, array: np.ndarray) -> None:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count, ending in (("train", 6, ".gz"), ("t10k", 3, "")):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{ending}", random.integers(0, 256, (count, 5, 4), np.uint8))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{ending}", np.arange(count, dtype=np.uint8))
    return tmp_path


def test_idx_files(mnist: Path):
    found = read_images(mnist)
    assert {split: len(images.labels) for split, images in found.items()} == {"train": 6, "test": 3}
    assert found["train"].classes == ("0", "1", "2", "3", "4", "5")
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(found["train"].pixels(2, 1)[..., 0], random.integers(0, 256, (6, 5, 4), np.uint8)[2])
    assert found["train"].pixels(0).shape == (5, 4, 3)
    assert found["train"].fingerprint != found["test"].fingerprint


def test_real_mnist(shared: Path):
    found = read_images(shared / "data" / "mnist")
    train, test = found["train"], found["test"]
    assert len(train.labels) == 60_000
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.pixels(0, None).shape == (28, 28, 1)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t10k-images-idx3-ubyte", b"\0\0\x0d\3", "t10k-images-idx3-ubyte: not an IDX file of bytes"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\3" + b"\0\0\0\1" * 3 + b"ab", "expected 1 bytes for 1 x 1 x 1, found 2"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\1" + b"\0\0\0\1a", "has 3 images, and .*ubyte 1 labels"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08", "compressed data is damaged or truncated"),
    ],
)
def test_damaged_idx_files(mnist: Path, name: str, data: bytes, message: str):
    (mnist / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_images(mnist)


def test_cifar(tmp_path: Path):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (4, 3, 32, 32), np.uint8)
    labels = np.array([3, 0, 9, 3], np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(4, -1)], axis=1)
    (tmp_path / "data_batch_1.bin").write_bytes(records[:2].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[2:].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[:1].tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    found = read_images(tmp_path)
    assert found["train"].labels.tolist() == labels.tolist()
    assert found["train"].classes[9] == "class9"
    np.testing.assert_array_equal(found["train"].pixels(2), pixels[2].transpose(1, 2, 0))
    (tmp_path / "data_batch_1.bin").write_bytes(records[:2].tobytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_1.bin: 6,145 bytes, not a multiple of 3,073"):
        read_images(tmp_path)


def test_cifar_100_has_coarse_and_fine_labels(tmp_path: Path):
    record = np.concatenate([np.array([5, 77], np.uint8), np.zeros(3072, np.uint8)])
    (tmp_path / "train.bin").write_bytes(record.tobytes())
    assert read_images(tmp_path)["train"].labels.tolist() == [77]


def test_cifars_pickles_are_refused(tmp_path: Path):
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(DataError, match="pickles"):
        read_images(tmp_path)


def lay_out(folder: Path, encoded, picture, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(6 + seed, 5, seed=seed)))


FOLDERS = ["train/10/a.png", "train/9/b.PNG", "train/9/c.png", "val/9/d.png"]


def test_class_folders_and_their_archive(tmp_path: Path, encoded, picture):
    lay_out(tmp_path / "pets", encoded, picture, FOLDERS)
    (tmp_path / "pets" / "train" / "9" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for name in FOLDERS:
            archive.write(tmp_path / "pets" / name, f"pets/{name}")
        archive.writestr("__MACOSX/train/9/._b.png", b"")
    for path in (tmp_path / "pets", tmp_path / "pets.zip"):
        found = read_images(path)
        assert set(found) == {"train", "dev"}
        assert found["train"].classes == found["dev"].classes == ("9", "10")  # by value
        assert found["train"].labels.tolist() == [1, 0, 0]
        np.testing.assert_array_equal(found["dev"].pixels(0), picture(9, 5, seed=3))
        assert found["dev"].name(0).endswith("val/9/d.png")


def test_without_splits_everything_is_for_training(tmp_path: Path, encoded, picture):
    lay_out(tmp_path, encoded, picture, ["cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png", "dog/c.png"])
    (images,) = read_images(tmp_path).values()
    train, held = hold_out(images, 0.3, seed=0)
    assert len(train.labels) == 3
    assert sorted(held.labels.tolist()) == [0, 1]
    assert {train.name(n) for n in range(3)}.isdisjoint(held.name(n) for n in range(2))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/x.png", "val/b/y.png"], "dev has classes that the training images lack: b"),
        (["val/b/y.png"], "no training images; found the splits dev"),
        (["train/a/x.png", "train/y.png"], "y.png: expected images as SPLIT/CLASS/IMAGE"),
        (["a/x.png", "a/b/c/y.png"], "a/b/c/y.png: expected images as CLASS/IMAGE"),
        ([], "no images in it"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, encoded, picture, names: list[str], message: str):
    lay_out(tmp_path, encoded, picture, names)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a\\..\\evil.png", "C:/evil.png"])
def test_archives_with_unsafe_names_are_refused(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(DataError, match="unsafe name"):
        read_images(tmp_path / "x.zip")


def test_what_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 no")
    with pytest.raises(DataError, match="not a zip archive"):
        read_images(tmp_path / "x.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_are_named(tmp_path: Path, encoded, picture, method: int):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("cat/a.png", encoded(picture()))
    data = bytearray(path.read_bytes())
    start = 30 + len("cat/a.png") + 9 * (method == zipfile.ZIP_LZMA)  # after the headers
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    (images,) = read_images(path).values()
    with pytest.raises(DataError, match=r"x.zip: cat/a.png is damaged"):
        images.pixels(0)


def test_tables(tmp_path: Path, encoded, picture):
    lay_out(tmp_path, encoded, picture, ["p/a.png", "p/b.png"])
    (tmp_path / "train.csv").write_text("image,label\np/a.png,cat\np/b.png,dog\n")
    (tmp_path / "dev.tsv").write_text("image\tlabel\np/b.png\tdog\n")
    for found in (read_images(tmp_path), read_images(tmp_path / "train.csv", tmp_path / "dev.tsv")):
        assert {split: images.labels.tolist() for split, images in found.items()} == {"train": [0, 1], "dev": [1]}
        np.testing.assert_array_equal(found["dev"].pixels(0), picture(7, 5, seed=1))
        assert found["dev"].name(0) == str(tmp_path / "p" / "b.png")


def test_prepared_data_sets(tmp_path: Path, encoded, picture):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
    )
    splits, place = [], dict(data_dir=tfds.core.Path(tmp_path), dataset_name="pets", filetype_suffix="array_record")
    for split, count in (("train", 3), ("validation", 1)):
        template = tfds.core.ShardedFileTemplate(split=split, **place)
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for number in range(count):
            example = {"image": encoded(picture(5 + number, seed=number)), "label": number % 2}
            writer.write(features.serialize_example(example))
        writer.close()
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path, features=features, split_infos=splits, filename_template=template, check_data=False
    )
    found = read_images(tmp_path)
    assert {split: images.labels.tolist() for split, images in found.items()} == {"train": [0, 1, 0], "dev": [0]}
    assert found["dev"].classes == ("cat", "dog")
    np.testing.assert_array_equal(found["train"].pixels(2), picture(7, seed=2))
    for column in ("path_column", "label_column"):
        with pytest.raises(DataError, match="photo"):
            read_images(tmp_path, **{column: "photo"})
    (tmp_path / "label.labels.txt").write_text("cat\ncat\n")
    with pytest.raises(DataError, match=r"label.labels.txt: several classes are called 'cat'"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\np/a.png,cat\np/none.png,dog\n", r"t.csv, line 3: there is no file"),
        ("image,label\n../a.png,cat\n", r"t.csv, line 2: ../a.png: expected a path within"),
        ("image,label\np/a.png,cat\np/a.png,dog\n", r"t.csv, line 3: p/a.png occurs twice"),
        ("image,kind\np/a.png,cat\n", r"t.csv, line 2: no column 'label'"),
        ("image,label\n", "t.csv: no rows"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, encoded, picture, text: str, message: str):
    lay_out(tmp_path, encoded, picture, ["p/a.png"])
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "t.csv")
