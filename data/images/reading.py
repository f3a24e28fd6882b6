"""Read labelled images in whatever format a path holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..corpus.tfds import TFDS_PREFIX, is_tfds, prepared_folder
from ..errors import DataError
from .binary import cifar_files, idx_files, read_cifar, read_idx_pair
from .files import class_folders, folder_tree, table_files, table_images, zip_tree
from .prepared import prepared_images
from .sets import ImageSet

FORMATS = (
    "IDX files (train-images-idx3-ubyte, plain or .gz, as MNIST's), CIFAR's binary version, a folder or .zip with a "
    "folder for each class (or SPLIT/CLASS/IMAGE), a table of paths and labels, or a folder that tensorflow-datasets "
    "prepared"
)


def read_images(
    path: Path, evaluation: Path | None = None, *, path_column: str = "image", label_column: str = "label"
) -> Mapping[str, ImageSet]:
    """Read the splits of a data set: "train", and "dev" and "test" if it has them.

    Args:
        path: a folder, a zip archive, a table, or tfds:NAME; see `FORMATS`.
        evaluation: a second table, of "dev".
        path_column: column of a table that holds the images' paths, or feature of a data set that is the image.
        label_column: column of a table that holds the classes' names, or feature of a data set that is the class.

    Raises:
        DataError: it is none of these, or damaged.
    """
    prepared = str(path).startswith(TFDS_PREFIX)
    archive = path.suffix.lower() == ".zip"
    if evaluation is not None and (prepared or archive or not path.is_file()):
        raise DataError(f"{path}: not a table, so that {evaluation} cannot be its evaluation set.")
    if prepared:
        path = prepared_folder(str(path).removeprefix(TFDS_PREFIX))
    if path.is_file():
        if archive:
            return class_folders(zip_tree(path))
        tables = {"train": path} | ({} if evaluation is None else {"dev": evaluation})
        return table_images(tables, path_column, label_column)
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder or file. Expected {FORMATS}.")
    if is_tfds(path):
        return _with_train(prepared_images(path, path_column, label_column), path)
    idx = idx_files(path)
    if idx:
        return _with_train({split: read_idx_pair(*files) for split, files in idx.items()}, path)
    cifar = cifar_files(path)
    if cifar:
        return _with_train({split: read_cifar(files) for split, files in cifar.items()}, path)
    tables = table_files(path)
    if tables:
        return table_images(tables, path_column, label_column)
    return class_folders(folder_tree(path))


def _with_train(found: Mapping[str, ImageSet], path: Path) -> Mapping[str, ImageSet]:
    """Check that there is a training split, which has the classes of the others."""
    if "train" not in found:
        raise DataError(f"{path}: no training images; found the splits {', '.join(found)}.")
    known = len(found["train"].classes)
    for split, images in found.items():
        if len(images.classes) > known:
            raise DataError(f"{path}: {split} has labels up to {len(images.classes) - 1}, the training images only "
                            f"up to {known - 1}.")  # fmt: skip
    return found
