"""The tokenised corpus on disk: written once, read randomly, never held in memory as a whole.

A cache is one folder, and a prepared tensorflow-datasets folder:
`tfds.builder_from_directory(folder).as_data_source("documents")` reads it, without TensorFlow. A record (ArrayRecord,
tf.train.Example) is a document, or a part of a long one, at most `RECORD_TOKENS` tokens of whole sentences, so that
reading an example never reads a whole book:

    tokens            [n] uint16 or uint32: the sentences' ids end to end, no special tokens
    sentence_lengths  [m] uint16: they add up to n
    document          int64: the document's number in the order of reading, from 0, empty documents counted too
    source            the file, the line where the document starts

Beside the records lie the lengths that planning needs, as plain .npy files that are mapped, not read:

    sentence_lengths.npy    [S] uint16, all documents' in their order
    document_sentences.npy  [D+1] int64: document d has the sentences from [d] up to [d+1]
    document_records.npy    [D+1] int64: likewise its records
    record_sentences.npy    [R+1] int64: likewise the records' sentences
    record_tokens.npy       [R] int64
    document_tokens.npy     [D] int64
    document_hashes.npy     [D] uint64, of the text: they decide which documents are held out

and `cache.json`: what it was made from and with, and the counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    from .corpus.corpus import Corpus
    from .progress import ProgressCallback
    from .tokenizers.tokenizer import Tokenizer

FORMAT_VERSION = 1  # of this layout, and of what readers, sentence splitter and tokeniser make of the same text
RECORD_TOKENS = 8192
DATASET, SPLIT = "bestiary", "documents"
FILENAME_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
INDEX = (
    "sentence_lengths",
    "document_sentences",
    "document_records",
    "record_sentences",
    "record_tokens",
    "document_tokens",
    "document_hashes",
)

Split = Literal["all", "train", "validation"]


@dataclass(frozen=True)
class CacheCounts:
    """Statistics of a cache. `cut_sentences` were longer than a record and were split; no token is lost."""

    documents: int = 0
    empty_documents: int = 0
    characters: int = 0
    sentences: int = 0
    cut_sentences: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    records: int = 0

    def __add__(self, other: CacheCounts) -> CacheCounts:
        mine, theirs = asdict(self), asdict(other)
        return CacheCounts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class CacheInfo:
    """The contents of `cache.json`. `corpus` names what was read, `shard_bytes` the size of every file of records."""

    version: int
    key: str
    corpus: list[str]
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    language: str
    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    counts: CacheCounts
    skipped_files: int
    shard_bytes: dict[str, int]


class TokenCache:
    """An open cache. The arrays of `INDEX` are attributes, mapped from disk."""

    sentence_lengths: np.ndarray
    document_sentences: np.ndarray
    document_records: np.ndarray
    record_sentences: np.ndarray
    record_tokens: np.ndarray
    document_tokens: np.ndarray
    document_hashes: np.ndarray

    def __init__(self, folder: Path, info: CacheInfo):
        self.folder, self.info = folder, info
        for name in INDEX:
            # A plain view of the mapping: indexing np.memmap itself makes an object of that class at every step.
            setattr(self, name, np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")).view(np.ndarray))

    @property
    def counts(self) -> CacheCounts:
        return self.info.counts

    @property
    def fingerprint(self) -> str:
        """Hexadecimal: equal for two caches with the same tokens in the same order."""
        return self.info.key

    @cached_property
    def token_dtype(self) -> np.dtype:
        return token_dtype(self.info.vocab_size)

    @cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self.folder)
        return builder.as_data_source(split=SPLIT, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def read_records(self, numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The tokens of the records of these numbers, in that order; each [n] of `token_dtype`, read-only."""
        raw = self._source.__getitems__([int(number) for number in numbers])
        return [unpack_tokens(record, self.token_dtype) for record in raw]

    def document(self, number: int) -> list[np.ndarray]:
        """The sentences of one document, each [n] of `token_dtype`."""
        first, last = self.document_records[number : number + 2]
        tokens = np.concatenate(self.read_records(range(first, last)))
        begin, end = self.document_sentences[number : number + 2]
        return np.split(tokens, np.cumsum(self.sentence_lengths[begin : end - 1], dtype=np.int64))

    def documents(self, split: Split = "all", validation_fraction: float = 0.05, least: int = 1) -> np.ndarray:
        """The numbers of a split's documents, ascending; [n] int64.

        "validation" holds `validation_fraction` of the documents (of their number, not of their length), those whose
        text hashes lowest, and "train" the others. Which ones is a function of the corpus alone, and two documents
        with the same text are always on the same side. `least` is how many each side must have, and gets.

        Raises:
            DataError: too few documents for that.
        """
        count = len(self.document_hashes)
        named = ", ".join(self.info.corpus)
        if split == "all":
            if count < least:
                raise DataError(f"{named}: {self._number(count)}, and pairs of sentences need {least}. {_MORE}")
            return np.arange(count)
        if split not in ("train", "validation"):
            raise DataError(f"No split {split!r}; there are 'train', 'validation' and 'all'.")
        if not 0 < validation_fraction < 1:
            raise DataError(f"A validation fraction of {validation_fraction}: expected one between 0 and 1.")
        held = min(max(round(validation_fraction * count), least), count - least)
        hashes = np.asarray(self.document_hashes)
        if held >= least:
            low = hashes <= np.partition(hashes, held - 1)[held - 1]
            if count - np.count_nonzero(low) >= least:
                return np.flatnonzero(low if split == "validation" else ~low)
        distinct = len(np.unique(hashes))
        apart = f", {distinct} of them different" if distinct < count else ""
        raise DataError(
            f"{named}: {self._number(count)}{apart}, and {2 * least} are needed: {least} to train on and {least} to "
            f"hold out. {_MORE}"
        )

    @staticmethod
    def _number(count: int) -> str:
        return f"{count} document{'' if count == 1 else 's'}"


_MORE = (
    "Name more files, tell where one document ends (--blank-line document, or JSON lines), "
    "or name held-out documents with --validation-corpus."
)


def open_cache(folder: str | Path) -> TokenCache:
    """Open a cache that `build_cache` has made.

    Raises:
        DataError: no cache there, one of another version, or one with files missing or cut short.
    """
    folder = Path(folder)
    path = folder / "cache.json"
    again = f"Delete the folder {folder}; it will be built again."
    if not path.is_file():
        raise DataError(f"{folder}: no tokenised cache (there is no cache.json). Build one with build_cache.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("version") != FORMAT_VERSION:
            raise DataError(f"{path}: version {content.get('version')}, expected {FORMAT_VERSION}. {again}")
        info = CacheInfo(**{**content, "counts": CacheCounts(**content["counts"])})
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a cache's description ({error}). {again}") from error
    for name, size in info.shard_bytes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise DataError(
                f"{folder / name}: {'missing' if found is None else f'{found} bytes'}, expected {size} bytes. {again}"
            )
    try:
        return TokenCache(folder, info)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder}: the index cannot be read ({error}). {again}") from error


def build_cache(
    corpus: Corpus,
    tokenizer: Tokenizer,
    root: str | Path,
    *,
    language: str = "en",
    processes: int | None = None,
    progress: ProgressCallback | None = None,
) -> TokenCache:
    """Split into sentences and tokenise a corpus, once; where `root` already holds that cache, just open it.

    The cache's folder is `root/KEY`, where KEY is a hash of the corpus (contents, order, how it is read), the
    tokenizer, the language and this format's version. It appears whole, by one renaming. A build that was killed
    continues after the parts it had finished; of two that run at once, the second waits for the first and opens what
    it made.

    Args:
        corpus: what to read.
        tokenizer: text to ids; special tokens written out in a text, such as "[SEP]", are taken as text.
        root: folder of caches; it is made if it is not there.
        language: ISO 639-1, of the sentence splitter's rules.
        processes: how many tokenise at once; by default one for each core this process may use, or 1 for a corpus of
            less than 32 MB. With 1 it is done in this process, by threads on all cores.
        progress: hears, at most once a second, how far the work is.

    Raises:
        DataError: what reading raises (see `Corpus`), and a full disk; what was finished by then is kept.
    """
    from .store_build import build

    return build(corpus, tokenizer, Path(root), language, processes, progress)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32).newbyteorder("<")


def pack_record(tokens: np.ndarray, sentence_lengths: np.ndarray, document: int, source: str) -> bytes:
    """One record, a serialised tf.train.Example. tfds' own serialiser gives the same bytes at ten times the cost."""
    example, feature = _messages()

    def of_bytes(value: bytes) -> Any:
        return feature.Feature(bytes_list=feature.BytesList(value=[value]))

    features = {
        "tokens": of_bytes(tokens.tobytes()),
        "sentence_lengths": of_bytes(sentence_lengths.tobytes()),
        "document": feature.Feature(int64_list=feature.Int64List(value=[document])),
        "source": of_bytes(source.encode("utf-8", "replace")),
    }
    return example.Example(features=feature.Features(feature=features)).SerializeToString(deterministic=True)


def unpack_tokens(record: bytes, dtype: np.dtype) -> np.ndarray:
    """The tokens of a record; [n], read-only."""
    features = _messages()[0].Example.FromString(record).features.feature
    return np.frombuffer(features["tokens"].bytes_list.value[0], dtype)


@cache
def _messages() -> tuple[Any, Any]:
    """The modules of tf.train.Example and of its features, whose classes are made when they are imported."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    return tf_example_pb2, tf_feature_pb2
