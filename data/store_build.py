"""Build a store: one process reads, several encode, and finished work survives a kill.

The reader distributes chunks. A chunk becomes one file of records and one part of the index, each written under a
temporary name and renamed, the index last: if it exists, the chunk is done. After a kill, the reader distributes the
same chunks again and skips those done. When all are done, the index is assembled, the metadata of tensorflow-datasets
and `cache.json` are written, and the folder is renamed to its final name, so that a half-written store never has that
name. One process builds, others wait for it.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from filelock import FileLock, Timeout

from .cloud.mirror import fetch, publish
from .errors import CorpusError, DataError
from .example import encode_example
from .files import replacing
from .progress import ProgressCallback, Reporter
from .store import FORMAT_VERSION, HEADER, DamagedStoreError, Header, Store, checksum_of

DATASET = "bestiary"
_FILENAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_PART = "shard-{:05d}.npz"  # part of the index, and counts, of a chunk


class Chunk(NamedTuple):
    """A part of the input, small enough to be held in memory and encoded at once.

    Attributes:
        number: number of the chunk, from 0.
        first: index of its first item among all items.
        items: the items of the chunk.
        read: amount read up to its end, in the unit of the progress.
    """

    number: int
    first: int
    items: Sequence[Any]
    read: float


@dataclass(frozen=True)
class Encoded:
    """An encoded chunk.

    Attributes:
        records: features of each record: bytes, or an integer.
        index: its part of each index array; for `Store.offsets`, the numbers of items instead of their starts.
        counts: statistics, an instance of the builder's `counts`.
    """

    records: Iterable[Mapping[str, bytes | int]]
    index: dict[str, np.ndarray]
    counts: Any


class Encoder(Protocol):
    """A function from items to records. It is pickled for every worker process."""

    def __call__(self, items: Sequence[Any], first: int) -> Encoded:
        """Encode the items of a chunk; the first one has the number `first`."""
        ...


@dataclass(frozen=True)
class Builder[S: Store]:
    """Instructions for building a store of one kind.

    Attributes:
        store: class of the store.
        features: features of a record, for tensorflow-datasets: the dtype of an array, `int`, or `str` for text.
        chunks: the input, the same chunks each time.
        encode: converts items to records.
        counts: class of the counts, a dataclass of integers; those of two chunks add up.
        finish: called with the total counts when everything is read; returns the counts of the store, and the
            description of its inputs to save. Raises `CorpusError` for unusable input.
        unit: unit of the progress.
        total: total of the progress; None if it is unknown.
    """

    store: type[S]
    features: Mapping[str, Any]
    chunks: Callable[[], Iterator[Chunk]]
    encode: Encoder
    counts: type
    finish: Callable[[Any], tuple[Any, dict[str, Any]]]
    unit: str
    total: float | None = None


def open_or_build[S: Store](
    builder: Builder[S], root: Path, key: str, *, processes: int, progress: ProgressCallback | None
) -> S:
    """Open the store `root/key`, after building it if it is missing or damaged.

    Args:
        builder: instructions for building it.
        root: folder of stores; created if needed. Stores of a cache in an object store are fetched from there, and
            published once they are built.
        key: hexadecimal hash of everything that the contents depend on.
        processes: number of worker processes; 1 encodes in this process, by threads.
        progress: called at most once a second with the progress.

    Raises:
        DataError: reading failed, there is a store of another version, or the disk is full; finished work is kept.
    """
    final = root / key
    damage = ""
    if not final.is_dir():
        fetch(final, missing=True)
    if final.is_dir():
        try:
            return builder.store(final, verify=True)
        except DamagedStoreError as error:
            damage = str(error)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with _one_builder(root, key, progress) as work:
            if not _usable(builder.store, final):
                try:
                    shards = _encode(builder, work, processes, progress, damage)
                    _finish(builder, work, shards, key)
                except CorpusError:
                    shutil.rmtree(work, ignore_errors=True)  # the corrected corpus will have another key
                    raise
                if final.is_dir():
                    shutil.rmtree(final)
                _rename_folder(work, final)
                _drop_leftovers(final, shards)
    publish(final)
    return builder.store(final)


def _usable(store: type[Store], folder: Path) -> bool:
    """Tell whether there is a complete store, which another process may have built by now."""
    try:
        return folder.is_dir() and bool(store(folder, verify=True))
    except DamagedStoreError:
        return False


# --- the one process that reads ---------------------------------------------------------------------------------------


def _encode(builder: Builder, work: Path, processes: int, progress: ProgressCallback | None, damage: str) -> int:
    """Process every chunk that is not done; return the number of chunks."""
    work.mkdir(exist_ok=True)
    for leftover in work.glob(".*"):
        leftover.unlink()
    report = Reporter("tokenising", builder.unit, progress)
    detail = f"once more: {damage}" if damage else ""
    done = resumed = before = 0.0
    number = -1
    with _workers(processes, (builder.encode, builder.store.kind, str(work))) as submit:
        running: dict[Future[None], float] = {}
        for chunk in builder.chunks():
            number, size, before = chunk.number, chunk.read - before, chunk.read
            if (work / _PART.format(number)).is_file():
                done, resumed = done + size, resumed + size
                continue
            while len(running) >= 2 * processes:
                done += _collect(running)
                report(done, builder.total, resumed=resumed, detail=detail)
            running[submit(chunk)] = size
        while running:
            done += _collect(running)
            report(done, builder.total, resumed=resumed, detail=detail)
    report(done, done, resumed=resumed, detail=detail, final=True)
    return number + 1


def _collect(running: dict[Future[None], float]) -> float:
    """Wait for some chunk; return the amount done."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        try:
            future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "A tokenising process died, most likely for lack of memory. Finished parts are kept: start again with "
                "fewer processes. (In your own script, the main part must be under `if __name__ == '__main__':`, since "
                "the processes import it.)"
            ) from error
    return sum(running.pop(future) for future in finished)


# --- the many that encode ---------------------------------------------------------------------------------------------

_worker: _Worker | None = None  # of this process, if it is a worker


@contextmanager
def _workers(processes: int, settings: tuple) -> Iterator[Callable[[Chunk], Future[None]]]:
    """Yield a function that submits a chunk to a thread of this process or to a worker process."""
    if processes <= 1:
        # Two threads: the library tokenises one chunk on all cores while the other one is split or written.
        pool, do = ThreadPoolExecutor(2), _Worker(*settings).do
    else:
        # Spawned, not forked: this process may have threads (JAX's, Rust's) that do not survive a fork.
        context, do = multiprocessing.get_context("spawn"), _do
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=settings)
    try:
        yield lambda chunk: pool.submit(do, chunk)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(*settings) -> None:
    global _worker
    # A worker waits for its next chunk on a pipe of which it holds both ends, so it would not notice that its parent
    # was killed.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _Worker(*settings)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(chunk: Chunk) -> None:
    assert _worker is not None
    _worker.do(chunk)


class _Worker:
    def __init__(self, encode: Encoder, kind: str, work: str):
        self.encode, self.kind, self.work = encode, kind, Path(work)

    def do(self, chunk: Chunk) -> None:
        """Encode one chunk and write its two files."""
        encoded = self.encode(chunk.items, chunk.first)
        with disk_errors(self.work):
            self._write(chunk.number, encoded)

    def _write(self, number: int, encoded: Encoded) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        with replacing(self.work / shard_name(self.kind, number)) as temporary:
            # Grain reads single records at random, and warns of larger groups.
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            records = 0
            for features in encoded.records:
                writer.write(encode_example(features))
                records += 1
            writer.close()  # the library reports a full disk here
        arrays: dict[str, Any] = {**encoded.index, "counts": np.array(json.dumps(asdict(encoded.counts)))}
        with replacing(self.work / _PART.format(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, records=records, **arrays)


# --- putting it together ----------------------------------------------------------------------------------------------


def shard_name(kind: str, number: int) -> str:
    """Return the name of a chunk's file of records, as tensorflow-datasets names it."""
    return f"{DATASET}-{kind}.array_record-{number:05d}"


def _finish(builder: Builder, work: Path, shards: int, key: str) -> None:
    kind = builder.store
    parts: dict[str, list[np.ndarray]] = {name: [] for name in kind.index}
    counts, records = builder.counts(), []
    for number in range(shards):
        with np.load(work / _PART.format(number), allow_pickle=False) as arrays:
            for name in kind.index:
                parts[name].append(arrays[name])
            counts += builder.counts(**json.loads(str(arrays["counts"])))
            records.append(int(arrays["records"]))
    counts, made_from = builder.finish(counts)
    for name, arrays in parts.items():
        array = np.concatenate(arrays)
        if name in kind.offsets:
            array = np.concatenate([[0], np.cumsum(array, dtype=np.int64)])
        np.save(work / f"{name}.npy", array)
    names = [shard_name(kind.kind, number) for number in range(shards)]
    _write_tfds_metadata(work, kind.kind, builder.features, records, sum((work / n).stat().st_size for n in names))
    names += [f"{name}.npy" for name in kind.index]
    files = {name: ((work / name).stat().st_size, checksum_of(work / name)) for name in names}
    header = Header(FORMAT_VERSION, kind.kind, key, asdict(counts), files, made_from)
    (work / HEADER).write_text(json.dumps(asdict(header), indent=2) + "\n", encoding="utf-8")
    for file in work.iterdir():
        _flush(file)


def _write_tfds_metadata(work: Path, kind: str, features: Mapping[str, Any], records: list[int], size: int) -> None:
    import tensorflow_datasets as tfds

    def feature(of: Any) -> Any:
        if of is str:
            return tfds.features.Text()
        if of is int:
            return np.int64
        return tfds.features.Tensor(shape=(None,), dtype=np.dtype(of).type, encoding="bytes")

    template = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(work),
        template=_FILENAMES,
        dataset_name=DATASET,
        split=kind,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(name=kind, shard_lengths=records, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=tfds.features.FeaturesDict({name: feature(of) for name, of in features.items()}),
        split_infos=[split],
        filename_template=template,
        check_data=False,  # the check needs TensorFlow
        description=f"Tokenised {kind}, see {HEADER}.",
    )


def _drop_leftovers(final: Path, shards: int) -> None:
    """Delete the parts of the index, which are no longer needed; leftovers of an interruption do no harm."""
    for number in range(shards):
        (final / _PART.format(number)).unlink(missing_ok=True)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _one_builder(root: Path, key: str, progress: ProgressCallback | None) -> Iterator[Path]:
    """Provide the folder to build in, to one process at a time; a process that dies releases it.

    Where the file system has no locks, every builder gets a folder of its own: safe, but a killed build starts over.
    """
    lock = FileLock(root / f".{key}.lock")
    report = Reporter("waiting for another process that builds the same cache", "s", progress)
    start, work = time.monotonic(), root / f"{key}.building"
    while not lock.is_locked:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            report(time.monotonic() - start, None)
            time.sleep(0.2)
        except (NotImplementedError, OSError):
            work = root / f"{key}.building-{socket.gethostname()}-{os.getpid()}"
            break
    try:
        yield work
    finally:
        if lock.is_locked:
            lock.release()
        else:
            shutil.rmtree(work, ignore_errors=True)


def _rename_folder(work: Path, final: Path) -> None:
    try:
        work.rename(final)
    except OSError as error:
        # Only without locks: another process was faster, and its store is the same as this one.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Flush to disk, so that a power failure cannot leave a name without its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a `DataError`. ArrayRecord raises RuntimeError with the system's message in it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code not in _FULL and not any(os.strerror(full) in str(error) for full in _FULL):
            raise
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        raise DataError(
            f"{folder}: no room to write the tokenised corpus ({free / 1e6:,.0f} MB free; {error}). Finished parts are "
            "kept: free some space, or choose another folder for caches, and start again."
        ) from error
