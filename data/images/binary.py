"""Read images that are distributed as plain bytes: the IDX files of MNIST, and the binary files of CIFAR."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from .sets import ArrayImages

MOST_BYTES = 1 << 32
IDX_SPLITS = {"train": ("train",), "test": ("t10k", "test")}
CIFAR_SIDE = 32


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressing it if its name ends in .gz.

    Raises:
        DataError: the compressed data is damaged, or holds more than 4 GiB.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the compressed data is damaged or truncated ({error}).") from None
    if len(data) > MOST_BYTES:
        raise DataError(f"{path}: more than {MOST_BYTES:,} bytes when decompressed.")
    return data


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an IDX file of bytes (LeCun et al. 1998, "The MNIST database").

    Args:
        path: the file.
        axes: number of axes that it must have.

    Returns:
        uint8, of the shape in the file.

    Raises:
        DataError: it is no such file, or longer or shorter than its header says.
    """
    data = read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 0x08:
        raise DataError(f"{path}: not an IDX file of bytes; it begins with {data[:4].hex(' ') or 'nothing'}.")
    if data[3] != axes or len(data) < 4 + 4 * axes:
        raise DataError(f"{path}: an IDX file with {data[3]} axes; expected {axes}.")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4))
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    expected = int(np.prod(shape, dtype=object))
    if body.size != expected:
        sizes = " x ".join(map(str, shape))
        raise DataError(f"{path}: expected {expected:,} bytes for {sizes}, found {body.size:,}.")
    return body.reshape(shape)


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Find the IDX files of a folder: split -> (images, labels)."""
    found: dict[str, tuple[Path, Path]] = {}
    for split, names in IDX_SPLITS.items():
        for name in names:
            images = sorted(folder.glob(f"*{name}-images?idx3-ubyte*"))
            labels = sorted(folder.glob(f"*{name}-labels?idx1-ubyte*"))
            if len(images) > 1 or len(images) != len(labels):
                listed = ", ".join(path.name for path in (*images, *labels))
                raise DataError(f"{folder}: expected one file of images and one of labels of {name}, found {listed}.")
            if images:
                found[split] = images[0], labels[0]
    return found


def read_idx_pair(images: Path, labels: Path) -> ArrayImages:
    """Read the images and labels of a split. The classes are the numbers from 0 to the highest label."""
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(f"{images} has {len(pixels):,} images, and {labels} {len(classes):,} labels.")
    if not pixels.size:
        raise DataError(f"{images}: no images in it.")
    names = tuple(map(str, range(int(classes.max()) + 1)))
    return ArrayImages(pixels[..., None], classes.astype(np.int32), names, str(images))


def cifar_files(folder: Path) -> dict[str, list[Path]]:
    """Find the binary files of CIFAR-10 or CIFAR-100 in a folder: split -> files.

    Raises:
        DataError: it has the Python version, whose files are pickles.
    """
    ten = sorted(folder.glob("data_batch_*.bin"))
    if ten or (folder / "test_batch.bin").is_file():
        found = {"train": ten, "test": [path for path in [folder / "test_batch.bin"] if path.is_file()]}
    else:
        found = {split: [path for path in [folder / f"{split}.bin"] if path.is_file()] for split in ("train", "test")}
    if not any(found.values()) and ((folder / "data_batch_1").is_file() or (folder / "meta").is_file()):
        raise DataError(
            f"{folder}: CIFAR's Python version, whose files are pickles, which can run any code when they are read. "
            "Download the binary version."
        )
    return {split: paths for split, paths in found.items() if paths}


def read_cifar(paths: Sequence[Path]) -> ArrayImages:
    """Read binary files of CIFAR-10 (a label, then 3,072 bytes) or CIFAR-100 (a coarse and a fine label).

    The names of the classes are those of `batches.meta.txt` or `fine_label_names.txt` beside the files, else numbers.

    Raises:
        DataError: a file's length is not a multiple of its records'.
    """
    hundred = paths[0].name in ("train.bin", "test.bin")
    labels, pixels = 1 + hundred, 3 * CIFAR_SIDE * CIFAR_SIDE
    parts = []
    for path in paths:
        data = np.frombuffer(read_bytes(path), np.uint8)
        if not data.size or data.size % (labels + pixels):
            raise DataError(f"{path}: {data.size:,} bytes, not a multiple of {labels + pixels:,}, a record of CIFAR.")
        parts.append(data.reshape(-1, labels + pixels))
    records = np.concatenate(parts)
    array = records[:, labels:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
    count = 100 if hundred else 10
    found = records[:, labels - 1].astype(np.int32)
    if found.max() >= count:
        raise DataError(f"{paths[0].parent}: a label {found.max()}; expected 0 to {count - 1}.")
    listed = paths[0].parent / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    names = tuple(listed.read_text().split()) if listed.is_file() else tuple(map(str, range(count)))
    if len(set(names)) != count:
        raise DataError(f"{listed}: expected {count} names of classes, found {len(set(names))}.")
    return ArrayImages(np.ascontiguousarray(array), found, names, str(paths[0].parent))
