"""The store: tokenised text on disk, written once (store_build.py), read at random, never loaded as a whole.

A store is one folder, and also a prepared tensorflow-datasets folder:
`tfds.builder_from_directory(folder).as_data_source(KIND)` reads it, without TensorFlow. It contains

    bestiary-KIND.array_record-*  the records: ArrayRecord files of tf.train.Example
    NAME.npy                      the index for planning: lengths, offsets and hashes; memory-mapped, not read
    cache.json                    the inputs of the build, the counts, and the size and checksum of each file

The kinds are subclasses: documents (corpus/document_store.py) and pairs of sentences (corpus/pair_store.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import DataError
from .example import decode_bytes
from .json_files import expect, read_object, value_of

FORMAT_VERSION = 2
HEADER = "cache.json"
_READ_BYTES = 1 << 24


class DamagedStoreError(DataError):
    """Raised for a store with missing, truncated or modified files. Rebuilding it repairs it."""


@dataclass(frozen=True)
class Header:
    """The contents of `cache.json`.

    Attributes:
        version: version of the folder's layout.
        kind: kind of the store.
        key: hexadecimal; equal for two stores with the same contents in the same order.
        counts: statistics of the contents.
        files: size in bytes and CRC-32 of every file; a store of version 1 has only sizes of its records.
        made_from: the inputs of the build.
    """

    version: int
    kind: str
    key: str
    counts: dict[str, int]
    files: Mapping[str, tuple[int, int | None]]
    made_from: dict[str, Any]

    @staticmethod
    def read(path: Path) -> Header:
        """Read a header of this version or the previous one.

        Raises:
            DataError: there is no header, or it has another version.
            DamagedStoreError: the header cannot be read.
        """
        if not path.is_file():
            raise DataError(f"{path.parent}: no tokenised cache (there is no {path.name}).")
        where = str(path)
        try:
            content = read_object(path)
            version = value_of(content, "version", int, where)
            known = version in (1, FORMAT_VERSION)
            header = (_from_version_1 if version == 1 else _described)(content, where) if known else None
        except (KeyError, ValueError) as error:  # a DataError too
            raise DamagedStoreError(f"{path}: not a cache's description ({error}). {_remedy(path.parent)}") from error
        if header is None:
            raise DataError(f"{path}: version {version}, expected {FORMAT_VERSION}. {_remedy(path.parent)}")
        return header


def _described(content: dict[str, Any], where: str) -> Header:
    files = {
        name: (expect(size, int, where), expect(checksum, int | None, where))
        for name, (size, checksum) in value_of(content, "files", dict[str, list], where).items()
    }
    kinds = {"version": int, "kind": str, "key": str, "counts": dict[str, int], "made_from": dict}
    return Header(files=files, **{name: value_of(content, name, kind, where) for name, kind in kinds.items()})


def _from_version_1(content: dict[str, Any], where: str) -> Header:
    """Read a header of version 1: only documents, and one flat object; records and index have not changed."""
    made_from = {key: content[key] for key in content.keys() - {"version", "key", "counts", "shard_bytes"}}
    files = {name: [size, None] for name, size in value_of(content, "shard_bytes", dict[str, int], where).items()}
    kept = {name: content[name] for name in ("version", "key", "counts")}
    return _described({**kept, "kind": "documents", "files": files, "made_from": made_from}, where)


def _remedy(folder: Path) -> str:
    return f"Delete the folder {folder}; it will be built again."


class Store:
    """An open store. The arrays of the index are attributes, memory-mapped.

    Args:
        folder: folder of the store.
        verify: read every file to check its checksum, not only its size.

    Raises:
        DataError: there is no store, or it has another version or kind.
        DamagedStoreError: files are missing, truncated or modified.
    """

    kind: ClassVar[str]
    """Kind of the store, which is also the name of the split for tensorflow-datasets."""
    index: ClassVar[tuple[str, ...]]
    """Names of the index arrays."""
    offsets: ClassVar[frozenset[str]] = frozenset()
    """Names of the index arrays that are offsets, with one entry more than there are items."""

    def __init__(self, folder: str | Path, *, verify: bool = False):
        self.folder = Path(folder)
        self.header = Header.read(self.folder / HEADER)
        if self.header.kind != self.kind:
            raise DataError(f"{self.folder}: a store of {self.header.kind}, expected {self.kind}.")
        for name, (size, checksum) in self.header.files.items():
            self._check(self.folder / name, size, checksum if verify else None)
        try:
            for name in self.index:
                # A plain view of the mapping: indexing np.memmap itself creates an object of that class every time.
                array = np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r")).view(np.ndarray)
                setattr(self, name, array)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedStoreError(
                f"{self.folder}: the index cannot be read ({error}). {_remedy(self.folder)}"
            ) from error

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two stores with the same contents in the same order."""
        return self.header.key

    def _check(self, path: Path, size: int, checksum: int | None) -> None:
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DamagedStoreError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, expected {size} bytes. "
                f"{_remedy(self.folder)}"
            )
        if checksum is not None and checksum_of(path) != checksum:
            raise DamagedStoreError(f"{path}: the contents have changed since it was written. {_remedy(self.folder)}")

    @cached_property
    def _records(self) -> Any:
        import grain

        paths = [str(self.folder / name) for name in sorted(self.header.files) if ".array_record-" in name]
        return grain.sources.ArrayRecordDataSource(paths)

    def read(self, numbers: Sequence[int] | np.ndarray, *features: str) -> Iterable[tuple[bytes, ...]]:
        """Return features of the records with these numbers, in that order.

        Raises:
            DamagedStoreError: a record is not as it was written.
        """
        try:
            raw = self._records.__getitems__([int(number) for number in numbers])
        except RuntimeError as error:  # how the library reports a checksum error
            raise DamagedStoreError(f"{self.folder}: {error}. {_remedy(self.folder)}") from error
        return (decode_bytes(record, *features) for record in raw)


def checksum_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and uint32 that fits every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32).newbyteorder("<")
