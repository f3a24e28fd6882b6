"""Read images in files: a folder or zip archive with a folder for each class, or a table of paths and labels."""

from __future__ import annotations

import lzma
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..tasks.tables import field_of, label_text, labels_of, read_table, text_of
from .decode import MOST_BYTES
from .sets import EncodedImages

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("dev", "val", "valid", "validation"), "dev")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


class Tree(NamedTuple):
    """Files of a folder or an archive."""

    names: list[str]  # of the images, as POSIX paths
    read: Callable[[str], bytes]
    source: str


def is_image_name(name: str) -> bool:
    """Tell whether a file's name ends as that of an image; hidden files are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def folder_tree(folder: Path) -> Tree:
    """List the images of a folder and its subfolders."""
    found = []
    for at, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        inside = Path(at).relative_to(folder)
        found += [(inside / name).as_posix() for name in files]
    return Tree(sorted(filter(is_image_name, found)), lambda name: (folder / name).read_bytes(), str(folder))


def zip_tree(path: Path) -> Tree:
    """List the images of a zip archive.

    Raises:
        DataError: it is no zip archive, has an encrypted or enormous member, two of one name, or one whose name leads
            out of the archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a zip archive ({error}).") from None
    names: list[str] = []
    for member in archive.infolist():
        parts = PurePosixPath(member.filename).parts
        if member.filename.startswith("/") or "\\" in member.filename or ".." in parts or ":" in member.filename:
            raise DataError(f"{path}: the unsafe name {member.filename!r}, which leads out of the archive.")
        if member.is_dir() or not is_image_name(member.filename):
            continue
        if member.flag_bits & 1:
            raise DataError(f"{path}: {member.filename} is encrypted.")
        if member.file_size > MOST_BYTES:
            raise DataError(f"{path}: {member.filename} has {member.file_size:,} bytes, beyond {MOST_BYTES:,}.")
        names.append(member.filename)
    if len(set(names)) < len(names):
        raise DataError(f"{path}: several members are called {next(n for n in names if names.count(n) > 1)!r}.")
    lock = threading.Lock()

    def read(name: str) -> bytes:
        try:
            with lock, archive.open(name) as member:
                return member.read()
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError) as error:
            raise DataError(f"{path}: {name} is damaged ({error}).") from None

    return Tree(sorted(names), read, str(path))


def class_folders(tree: Tree) -> dict[str, EncodedImages]:
    """Read a tree of class folders: split -> images; the split is "train" if there are no folders of splits.

    A single folder around everything is passed over.

    Raises:
        DataError: images lie outside of class folders, a split has classes that the training split lacks, or there are
            no images.
    """
    paths = [PurePosixPath(name).parts for name in tree.names]
    if not paths:
        raise DataError(f"{tree.source}: no images in it (files ending in {', '.join(SUFFIXES)}).")
    depth = 0
    while min(map(len, paths)) > depth + 2 and len({parts[depth] for parts in paths}) == 1:
        if paths[0][depth].lower() in SPLITS:
            break
        depth += 1
    splits: dict[str, dict[str, str]] = {}
    tops = {parts[depth].lower() for parts in paths}
    has_splits = tops <= set(SPLITS)
    for name, parts in zip(tree.names, paths, strict=True):
        rest = parts[depth + has_splits :]
        if len(rest) != 2:
            form = "SPLIT/CLASS/IMAGE" if has_splits else "CLASS/IMAGE"
            raise DataError(f"{tree.source}/{name}: expected images as {form}, found one at another depth.")
        split = SPLITS[parts[depth].lower()] if has_splits else "train"
        splits.setdefault(split, {})[name] = rest[0]
    return labelled(splits, tree)


def labelled(splits: Mapping[str, Mapping[str, str]], tree: Tree) -> dict[str, EncodedImages]:
    """Number the classes, those of the training split in order of their names.

    Args:
        splits: split -> name of an image -> name of its class.
        tree: where the images are.

    Raises:
        DataError: there is no training split, or another one has classes that it lacks.
    """
    if "train" not in splits:
        raise DataError(f"{tree.source}: no training images; found the splits {', '.join(splits)}.")
    classes = labels_of(splits["train"].values(), tree.source)
    numbers = {name: number for number, name in enumerate(classes)}
    found = {}
    for split, images in splits.items():
        more = sorted(set(images.values()) - set(classes))
        if more:
            raise DataError(f"{tree.source}: {split} has classes that the training images lack: {', '.join(more[:10])}")
        labels = np.array([numbers[label] for label in images.values()], np.int32)
        found[split] = EncodedImages(list(images), labels, classes, tree.read, tree.source)
    return found


def table_images(tables: Mapping[str, Path], path_column: str, label_column: str) -> dict[str, EncodedImages]:
    """Read tables of paths and labels: split -> images. Paths are relative to the table's folder.

    Raises:
        DataError: a column or an image is missing, a path leads out of the folder, or classes do not fit; with line.
    """
    splits: dict[str, dict[str, str]] = {}
    files: dict[str, Path] = {}
    for split, table in tables.items():
        rows: dict[str, str] = {}
        for row in read_table(table):
            given = text_of(row, path_column)
            file = table.parent / given
            if Path(given).is_absolute() or ".." in Path(given).parts:
                raise DataError(f"{row.where}: {given}: expected a path within {table.parent}.")
            if not file.is_file():
                raise DataError(f"{row.where}: there is no file {file}.")
            name = str(file)
            if name in rows:
                raise DataError(f"{row.where}: {given} occurs twice in the table.")
            rows[name] = label_text(field_of(row, label_column), row.where)
            files[name] = file
        if not rows:
            raise DataError(f"{table}: no rows in it.")
        splits[split] = rows
    tree = Tree(list(files), lambda name: files[name].read_bytes(), str(next(iter(tables.values()))))
    return {split: replace(images, source="") for split, images in labelled(splits, tree).items()}


def table_files(folder: Path) -> dict[str, Path]:
    """Find tables of splits in a folder, such as train.csv and dev.tsv: split -> file."""
    found: dict[str, Path] = {}
    for path in _files(folder):
        split = SPLITS.get(path.name.partition(".")[0].lower())
        if split is not None and path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
            if split in found:
                raise DataError(f"{folder}: {found[split].name} and {path.name} are both tables of {split}.")
            found[split] = path
    return found if "train" in found else {}


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def any_images(paths: Iterable[Any]) -> list[Path]:
    """Return the files to predict: those given, and all images in the folders given.

    Raises:
        DataError: a path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [path / name for name in folder_tree(path).names]
            if not inside:
                raise DataError(f"{path}: no images in it (files ending in {', '.join(SUFFIXES)}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file.")
    return found
