"""Read images of data sets that tensorflow-datasets has prepared, without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.tfds import Examples, open_tfds
from ..errors import DataError
from ..json_files import read_object, value_of
from .files import SPLITS
from .sets import EncodedImages

WINDOW = 1000  # examples that are read together for their labels


def prepared_images(folder: Path, image: str = "image", label: str = "label") -> dict[str, EncodedImages]:
    """Read the splits of a prepared data set: "train", and "dev" and "test" if it has them.

    Args:
        folder: the data set.
        image: feature that holds the encoded images.
        label: feature that holds the numbers of the classes, whose names are in `LABEL.labels.txt` if there is one.

    Raises:
        DataError: a feature is missing or of another kind, names of classes repeat, or the data set is damaged.
    """
    where = str(folder)
    described = value_of(read_object(folder / "dataset_info.json"), "splits", list[dict], where)
    names = [value_of(split, "name", str, where) for split in described]
    listed = folder / f"{label}.labels.txt"
    classes = tuple(listed.read_text(encoding="utf-8").split("\n")) if listed.is_file() else ()
    classes = classes[:-1] if classes and not classes[-1] else classes
    if len(set(classes)) < len(classes):
        repeated = next(name for name in classes if classes.count(name) > 1)
        raise DataError(f"{listed}: several classes are called {repeated!r}.")
    found: dict[str, tuple[Examples, np.ndarray]] = {}
    for name in names:
        split = SPLITS.get(name.lower())
        if split is None or split in found:
            continue
        examples = open_tfds(folder, name, where, raw=(image,))
        labels = [_label(example, image, label, f"{where}, split {name!r}") for _, example in examples.windows(WINDOW)]
        found[split] = examples, np.array(labels, np.int32)
    if "train" not in found or not len(found["train"][1]):
        raise DataError(f"{where}: no training images; found the splits {', '.join(names) or 'none'}.")
    count = max(int(labels.max(initial=0)) for _, labels in found.values()) + 1
    classes = classes or tuple(map(str, range(count)))
    if count > len(classes):
        raise DataError(f"{listed}: {len(classes)} names of classes, and labels up to {count - 1}.")
    return {
        split: EncodedImages(
            [str(number) for number in range(len(labels))],
            labels,
            classes,
            lambda name, examples=examples: examples.read([int(name)])[0][image],
            f"{where}, {split}",
        )
        for split, (examples, labels) in found.items()
    }


def _label(example: dict[str, Any], image: str, label: str, where: str) -> int:
    """Return the label of an example, after checking both features."""
    for feature, kind in ((image, bytes), (label, int | np.integer)):
        if not isinstance(example.get(feature), kind):
            raise DataError(f"{where}: expected an image {image!r} and a class {label!r}, found {', '.join(example)}.")
    if example[label] < 0:
        raise DataError(f"{where}: an image without a label ({example[label]}).")
    return int(example[label])
