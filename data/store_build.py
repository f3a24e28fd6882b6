"""Building a cache: one process reads, many split and tokenise, and whatever is finished survives a kill.

The reader deals the documents out in chunks of about equal size. A chunk becomes one file of records and one of
lengths, each written under a temporary name and renamed, the lengths last: where they are, the chunk is done. After a
kill the reader deals the same chunks again, and those done are passed over. When all are there, the lengths are put
together, tfds' metadata and `cache.json` written, and the folder renamed to its final name: a half-written cache
never carries that name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from . import store as cache
from .cores import usable_cores
from .corpus.corpus import Corpus, Document
from .corpus.fingerprint import corpus_fingerprint
from .corpus.sentences import split_sentences
from .errors import CorpusError, DataError
from .progress import ProgressCallback, Reporter
from .store import CacheCounts, CacheInfo, TokenCache
from .tokenizers.tokenizer import Tokenizer

SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 1 << 20, 64 << 20, 512
_SMALL_CORPUS = 32 << 20  # bytes on disk; below it, threads are done before processes have started
_SHARD = "shard-{:05d}.npz"  # the lengths and counts of one chunk


@dataclass(frozen=True)
class _Chunk:
    number: int
    first_document: int
    documents: list[Document]
    bytes_read: int


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    root: Path,
    language: str,
    processes: int | None,
    progress: ProgressCallback | None,
) -> TokenCache:
    """See `cache.build_cache`."""
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        corpus_key = corpus_fingerprint(corpus, root / "hashes.json")
        made_of = [cache.FORMAT_VERSION, corpus_key, tokenizer.fingerprint, language]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        final = root / key
        if not final.is_dir():
            with _one_builder(root, key, progress) as work:
                if not final.is_dir():
                    try:
                        shards = _tokenise(corpus, tokenizer, work, language, processes, progress)
                    except CorpusError:
                        shutil.rmtree(work, ignore_errors=True)  # once mended, the corpus will be another one
                        raise
                    info = _finish(work, shards, corpus, corpus_key, tokenizer, language, key)
                    _rename_folder(work, final)
                    _drop_leftovers(final, len(info.shard_bytes))
    return cache.open_cache(final)


# --- the one process that reads ---------------------------------------------------------------------------------------


def _tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    work: Path,
    language: str,
    processes: int | None,
    progress: ProgressCallback | None,
) -> int:
    """Do every chunk that is not done; returns how many chunks there are."""
    work.mkdir(exist_ok=True)
    for leftover in work.glob(".*"):
        leftover.unlink()
    total = corpus.bytes_total
    if processes is None:
        processes = 1 if total < _SMALL_CORPUS else usable_cores()
    report = Reporter("tokenising", "MB", progress)
    done = resumed = 0
    number = -1
    settings = (tokenizer, language, str(work))
    with _workers(processes, settings) as submit:
        running: dict[Future[None], int] = {}
        last_bytes = 0
        for chunk in _chunks(corpus, min(max(total // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)):
            number, size = chunk.number, chunk.bytes_read - last_bytes
            last_bytes = chunk.bytes_read
            if (work / _SHARD.format(number)).is_file():
                done, resumed = done + size, resumed + size
                continue
            while len(running) >= 2 * processes:
                done += _collect(running)
                report(done / 1e6, total / 1e6 or None, resumed=resumed / 1e6)
            running[submit(chunk)] = size
        while running:
            done += _collect(running)
            report(done / 1e6, total / 1e6 or None, resumed=resumed / 1e6)
    report(done / 1e6, done / 1e6, resumed=resumed / 1e6, final=True)
    return number + 1


def _chunks(corpus: Corpus, characters: int) -> Iterator[_Chunk]:
    """The corpus in runs of whole documents, each run the first to reach `characters`."""
    documents: list[Document] = []
    number = first = size = 0
    for document in corpus:
        documents.append(document)
        size += len(document.text)
        if size >= characters:
            yield _Chunk(number, first, documents, corpus.counts.bytes_read)
            number, first, size, documents = number + 1, first + len(documents), 0, []
    if documents:
        yield _Chunk(number, first, documents, corpus.counts.bytes_read)


def _collect(running: dict[Future[None], int]) -> int:
    """Wait for some chunk; returns the bytes that are now done."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        try:
            future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "A tokenising process died, most likely for want of memory. What was finished is kept: start again "
                "with fewer processes. (In a script of your own, the main part must stand under "
                "`if __name__ == '__main__':`, since the processes import it.)"
            ) from error
    return sum(running.pop(future) for future in finished)


# --- the many that tokenise -------------------------------------------------------------------------------------------

_worker: _Worker | None = None  # of this process, where it is one of the many


@contextmanager
def _workers(processes: int, settings: tuple) -> Iterator[Callable[[_Chunk], Future[None]]]:
    """Gives a function that has one chunk done, by a thread of this process or by one of many."""
    if processes <= 1:
        # Two: the library's threads tokenise one chunk on all cores while the other one is split, or written.
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
    # A worker waits for its next chunk on a pipe that it holds both ends of: it would not notice that its parent was
    # killed.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _Worker(*settings)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(chunk: _Chunk) -> None:
    assert _worker is not None
    _worker.do(chunk)


class _Worker:
    def __init__(self, tokenizer: Tokenizer, language: str, work: str):
        self.tokenizer, self.language, self.work = tokenizer, language, Path(work)
        self.dtype = cache.token_dtype(tokenizer.vocab_size)

    def do(self, chunk: _Chunk) -> None:
        """Tokenise one chunk and write its two files."""
        sentences: list[str] = []
        per_document = np.zeros(len(chunk.documents), np.int64)
        for number, document in enumerate(chunk.documents):
            before = len(sentences)
            for paragraph in document.paragraphs():
                sentences += split_sentences(paragraph, self.language)
            per_document[number] = len(sentences) - before
        tokens, lengths = self.tokenizer.encode_literally(sentences, self.dtype)
        with _disk_errors(self.work):
            self._write(chunk, tokens, *_sized(lengths, per_document))

    def _write(
        self, chunk: _Chunk, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray, cut_sentences: int
    ) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.work / shard_name(chunk.number)
        temporary = self.work / f".{path.name}.{os.getpid()}"
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        document_records: list[int] = []
        record_sentences: list[int] = []
        record_tokens: list[int] = []
        for number, (document, count) in enumerate(zip(chunk.documents, per_document.tolist(), strict=True)):
            runs = _runs(lengths[first : first + count])
            for run in runs:
                part = slice(offsets[first], offsets[first + run])
                sizes = lengths[first : first + run].astype("<u2")
                source = f"{document.source}, line {document.line}"
                record_tokens.append(int(part.stop - part.start))
                writer.write(cache.pack_record(tokens[part], sizes, chunk.first_document + number, source))
                first += run
            document_records.append(len(runs))
            record_sentences += runs
        writer.close()  # the library reports a full disk here
        _commit(temporary, path)

        kept = per_document > 0
        ends = np.cumsum(per_document)
        index = {
            "sentence_lengths": lengths.astype(np.uint16),
            "document_sentences": per_document[kept],
            "document_records": np.array(document_records, np.int64)[kept],
            "record_sentences": np.array(record_sentences, np.int64),
            "record_tokens": np.array(record_tokens, np.int64),
            "document_tokens": (offsets[ends] - offsets[ends - per_document])[kept],
            "document_hashes": np.array([_text_hash(document) for document in chunk.documents], np.uint64)[kept],
        }
        counts = CacheCounts(
            documents=int(kept.sum()),
            empty_documents=int((~kept).sum()),
            characters=sum(len(document.text) for document in chunk.documents),
            sentences=len(lengths),
            cut_sentences=cut_sentences,
            tokens=len(tokens),
            unknown_tokens=int(np.count_nonzero(tokens == self.tokenizer.special_ids.get("unk", -1))),
            records=len(record_sentences),
        )
        path = self.work / _SHARD.format(chunk.number)
        temporary = self.work / f".{path.name}.{os.getpid()}"
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, counts=np.array(json.dumps(asdict(counts))), **index)
        _commit(temporary, path)


def _sized(lengths: np.ndarray, per_document: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Sentences without a token left out, those longer than a record cut: (lengths, per_document, how many cut)."""
    pieces = -(-lengths // cache.RECORD_TOKENS)
    owner = np.repeat(np.arange(len(per_document)), per_document)
    per_document = np.bincount(owner, weights=pieces, minlength=len(per_document)).astype(np.int64)
    result = np.full(int(pieces.sum()), cache.RECORD_TOKENS, np.int64)
    last = np.cumsum(pieces)[pieces > 0] - 1
    result[last] = (lengths - (pieces - 1) * cache.RECORD_TOKENS)[pieces > 0]
    return result, per_document, int(np.count_nonzero(pieces > 1))


def _runs(lengths: np.ndarray) -> list[int]:
    """How many of a document's sentences go into each of its records: as many as fit."""
    ends = np.cumsum(lengths)
    runs, first, base = [], 0, 0
    while first < len(lengths):
        last = int(np.searchsorted(ends, base + cache.RECORD_TOKENS, side="right"))
        runs.append(last - first)
        first, base = last, int(ends[last - 1])
    return runs


def _text_hash(document: Document) -> int:
    text = document.text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# --- putting it together ----------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """The file of records of one chunk, named as tensorflow-datasets names it."""
    return f"{cache.DATASET}-{cache.SPLIT}.array_record-{number:05d}"


def _finish(
    work: Path, shards: int, corpus: Corpus, corpus_key: str, tokenizer: Tokenizer, language: str, key: str
) -> CacheInfo:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in cache.INDEX}
    counts, records = CacheCounts(), []
    for number in range(shards):
        with np.load(work / _SHARD.format(number), allow_pickle=False) as arrays:
            for name in cache.INDEX:
                parts[name].append(arrays[name])
            part = CacheCounts(**json.loads(str(arrays["counts"])))
        counts, records = counts + part, [*records, part.records]
    if not counts.tokens:
        raise CorpusError(
            f"{', '.join(map(str, corpus.paths))}: an empty corpus, its text gives not one token. Name files with text."
        )
    for name, arrays in parts.items():
        array = np.concatenate(arrays)
        if name in ("document_sentences", "document_records", "record_sentences"):
            array = np.concatenate([[0], np.cumsum(array)])
        np.save(work / f"{name}.npy", array)
    sizes = {shard_name(number): (work / shard_name(number)).stat().st_size for number in range(shards)}
    _write_tfds_metadata(work, tokenizer.vocab_size, records, sum(sizes.values()))
    info = CacheInfo(
        version=cache.FORMAT_VERSION,
        key=key,
        corpus=[str(path) for path in corpus.paths],
        corpus_fingerprint=corpus_key,
        tokenizer_fingerprint=tokenizer.fingerprint,
        language=language,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        counts=replace(counts, empty_documents=counts.empty_documents + corpus.counts.empty_documents),
        skipped_files=len(corpus.skipped_files),
        shard_bytes=sizes,
    )
    (work / "cache.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    for file in work.iterdir():
        _flush(file)
    return info


def _write_tfds_metadata(work: Path, vocab_size: int, records: list[int], size: int) -> None:
    import tensorflow_datasets as tfds

    lengths = tfds.features.Tensor(shape=(None,), dtype=np.uint16, encoding="bytes")
    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=cache.token_dtype(vocab_size).type, encoding="bytes"),
            "sentence_lengths": lengths,
            "document": np.int64,
            "source": tfds.features.Text(),
        }
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(work),
        template=cache.FILENAME_TEMPLATE,
        dataset_name=cache.DATASET,
        split=cache.SPLIT,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(name=cache.SPLIT, shard_lengths=records, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=features,
        split_infos=[split],
        filename_template=template,
        check_data=False,  # the check needs TensorFlow
        description="Tokenised documents, see cache.json.",
    )


def _drop_leftovers(final: Path, shards: int) -> None:
    """The parts of the index are no longer needed; where a kill leaves some of them, they do no harm."""
    for number in range(shards):
        (final / _SHARD.format(number)).unlink(missing_ok=True)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _one_builder(root: Path, key: str, progress: ProgressCallback | None) -> Iterator[Path]:
    """Gives the folder to build in, to one process at a time; a process that dies lets go of it.

    Where the file system has no locks, every builder gets a folder of its own: safe, but a killed build starts over.
    """
    path = root / f".{key}.lock"
    with path.open("w") as file:
        report = Reporter("waiting for another process that builds the same cache", "s", progress)
        start = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(time.monotonic() - start, None)
                time.sleep(0.2)
            except OSError:
                work = root / f"{key}.building-{socket.gethostname()}-{os.getpid()}"
                try:
                    yield work
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                return
            else:
                yield root / f"{key}.building"
                path.unlink(missing_ok=True)
                return


def _rename_folder(work: Path, final: Path) -> None:
    try:
        work.rename(final)
    except OSError as error:
        # Only without locks: another process was faster, and its cache is the same as this one.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _flush(final.parent)


def _commit(temporary: Path, path: Path) -> None:
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    """Onto the disk itself, so that a power cut cannot leave a name without its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk as a `DataError`. ArrayRecord raises RuntimeError with the system's words in it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code not in _FULL and not any(os.strerror(full) in str(error) for full in _FULL):
            raise
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        raise DataError(
            f"{folder}: no room to write the tokenised corpus ({free / 1e6:,.0f} MB free; {error}). What was finished "
            "is kept: make room, or name another folder for caches, and start again."
        ) from error
