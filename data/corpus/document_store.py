"""A store of tokenised documents, sentence by sentence.

A record is a document, or a part of a long one: whole sentences of at most `RECORD_TOKENS` tokens, so that reading an
example never reads a whole book:

    tokens            [n] uint16 or uint32: the sentences' ids, concatenated, without special tokens
    sentence_lengths  [m] uint16: they add up to n
    document          int64: number of the document in reading order, from 0, including empty documents
    source            the file and line where the document starts

The index:

    sentence_lengths.npy    [S] uint16, of all documents in order
    document_sentences.npy  [D+1] int64: document d has sentences [d] up to [d+1]
    document_records.npy    [D+1] int64: likewise, the records of each document
    record_sentences.npy    [R+1] int64: likewise, the sentences of each record
    record_tokens.npy       [R] int64
    document_tokens.npy     [D] int64
    document_hashes.npy     [D] uint64, of the text: they determine which documents are held out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..cores import usable_cores
from ..errors import CorpusError, DataError
from ..progress import ProgressCallback
from ..store import Store, token_dtype
from ..store_build import Builder, Chunk, Encoded, disk_errors, open_or_build
from ..tokenizers.tokenizer import Tokenizer
from .corpus import Corpus, Document
from .fingerprint import corpus_fingerprint
from .sentences import split_sentences

TEXT_VERSION = 1  # increased when readers, sentence splitter or tokenizers change their results
RECORD_TOKENS = 8192
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 1 << 20, 64 << 20, 512
_SMALL_CORPUS = 32 << 20  # bytes on disk; below it, threads finish before processes have started

Split = Literal["all", "train", "validation"]
Unit = Literal["sentences", "paragraphs"]


@dataclass(frozen=True)
class DocumentCounts:
    """Statistics of a store. `cut_sentences` were longer than a record and are stored as several; no token is lost."""

    documents: int = 0
    empty_documents: int = 0
    characters: int = 0
    sentences: int = 0
    cut_sentences: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    records: int = 0

    def __add__(self, other: DocumentCounts) -> DocumentCounts:
        mine, theirs = asdict(self), asdict(other)
        return DocumentCounts(**{name: mine[name] + theirs[name] for name in mine})


class DocumentStore(Store):
    """An open store of documents, see `build_documents`."""

    kind = "documents"
    index = (
        "sentence_lengths",
        "document_sentences",
        "document_records",
        "record_sentences",
        "record_tokens",
        "document_tokens",
        "document_hashes",
    )
    offsets = frozenset({"document_sentences", "document_records", "record_sentences"})

    sentence_lengths: np.ndarray
    document_sentences: np.ndarray
    document_records: np.ndarray
    record_sentences: np.ndarray
    record_tokens: np.ndarray
    document_tokens: np.ndarray
    document_hashes: np.ndarray

    @cached_property
    def counts(self) -> DocumentCounts:
        """Statistics of the contents."""
        return DocumentCounts(**self.header.counts)

    @cached_property
    def token_dtype(self) -> np.dtype:
        """Dtype of the ids."""
        return token_dtype(self.header.made_from["vocab_size"])

    def read_records(self, numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the tokens of the records with these numbers, in order; each [n] of `token_dtype`, read-only."""
        return [np.frombuffer(tokens, self.token_dtype) for (tokens,) in self.read(numbers, "tokens")]

    def document(self, number: int) -> list[np.ndarray]:
        """Return the sentences of one document, each [n] of `token_dtype`."""
        first, last = self.document_records[number : number + 2]
        tokens = np.concatenate(self.read_records(range(first, last)))
        begin, end = self.document_sentences[number : number + 2]
        return np.split(tokens, np.cumsum(self.sentence_lengths[begin : end - 1], dtype=np.int64))

    def documents(self, split: Split = "all", validation_fraction: float = 0.05, least: int = 1) -> np.ndarray:
        """Return the numbers of a split's documents, ascending; [n] int64.

        "validation" is the `validation_fraction` of the documents (by number, not by length) with the lowest text
        hashes, and "train" the others. The split depends only on the corpus, and documents with the same text are
        always in the same split. Each split gets at least `least` documents.

        Raises:
            DataError: there are too few documents.
        """
        count = len(self.document_hashes)
        named = ", ".join(self.header.made_from["corpus"])
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


def build_documents(
    corpus: Corpus,
    tokenizer: Tokenizer,
    root: str | Path,
    *,
    language: str = "en",
    unit: Unit = "sentences",
    processes: int | None = None,
    progress: ProgressCallback | None = None,
) -> DocumentStore:
    """Split a corpus into sentences and tokenise it into a store, or open the store if `root` already has it.

    The store's folder is `root/KEY`, where KEY is a hash of the corpus (contents, order, reading options), the
    tokenizer, the language and `TEXT_VERSION`. It appears by one renaming, when it is complete. A killed build resumes
    after the parts it had finished; of two concurrent builds, the second waits for the first and opens its store. A
    store with modified files is rebuilt.

    Args:
        corpus: the corpus to read.
        tokenizer: the tokenizer; special tokens that occur in a text, such as "[SEP]", are treated as text.
        root: folder of stores; created if needed.
        language: ISO 639-1 code, for the rules of the sentence splitter.
        unit: what to divide documents into. Paragraphs are stored as if they were sentences, each but the first with
            the line feed before it, so that the text is whole.
        processes: number of worker processes; by default one per usable core, or 1 for a corpus of less than 32 MB.
            1 tokenises in this process, by threads on all cores.
        progress: called at most once a second with the progress.

    Raises:
        DataError: reading failed (see `Corpus`), or the disk is full; finished work is kept.
    """
    root = Path(root)
    with disk_errors(root):
        corpus_key = corpus_fingerprint(corpus, root / "hashes.json")
    made_of = [TEXT_VERSION, corpus_key, tokenizer.fingerprint, unit if unit == "paragraphs" else language]
    total = corpus.bytes_total
    if processes is None:
        processes = 1 if total < _SMALL_CORPUS else usable_cores()

    def finish(counts: DocumentCounts) -> tuple[DocumentCounts, dict[str, Any]]:
        if not counts.tokens:
            raise CorpusError(f"{', '.join(map(str, corpus.paths))}: the corpus is empty: its text has no tokens.")
        made_from = {
            "corpus": [str(path) for path in corpus.paths],
            "corpus_fingerprint": corpus_key,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "language": language,
            "vocab_size": tokenizer.vocab_size,
            "skipped_files": len(corpus.skipped_files),
        }
        return replace(counts, empty_documents=counts.empty_documents + corpus.counts.empty_documents), made_from

    builder = Builder(
        store=DocumentStore,
        features={
            "tokens": token_dtype(tokenizer.vocab_size),
            "sentence_lengths": np.uint16,
            "document": int,
            "source": str,
        },
        chunks=lambda: _chunks(corpus, min(max(total // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)),
        encode=_Encoder(tokenizer, language, unit),
        counts=DocumentCounts,
        finish=finish,
        unit="MB",
        total=total / 1e6 or None,
    )
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    return open_or_build(builder, root, key, processes=processes, progress=progress)


def _chunks(corpus: Corpus, characters: int) -> Iterator[Chunk]:
    """Cut the corpus into runs of whole documents of at least `characters` characters."""
    documents: list[Document] = []
    number = first = size = 0
    for document in corpus:
        documents.append(document)
        size += len(document.text)
        if size >= characters:
            yield Chunk(number, first, documents, corpus.counts.bytes_read / 1e6)
            number, first, size, documents = number + 1, first + len(documents), 0, []
    if documents:
        yield Chunk(number, first, documents, corpus.counts.bytes_read / 1e6)


def _with_spaces(paragraph: str, sentences: Sequence[str]) -> Iterator[str]:
    """Yield the sentences of a paragraph, each with the space before it: byte-level BPE encodes it with the word."""
    end = 0
    for sentence in sentences:
        start = paragraph.find(sentence, end)
        yield f" {sentence}" if 0 < end < start else sentence
        end = max(start, 0) + len(sentence)


@dataclass(frozen=True)
class _Encoder:
    """Split documents into sentences, tokenise them and divide long ones into records."""

    tokenizer: Tokenizer
    language: str
    unit: Unit

    def _parts(self, paragraphs: Sequence[str]) -> Iterator[str]:
        """Yield a document's sentences, or its paragraphs."""
        for number, paragraph in enumerate(paragraphs):
            if self.unit == "paragraphs":
                yield f"\n{paragraph}" if number else paragraph
            else:
                yield from _with_spaces(paragraph, split_sentences(paragraph, self.language))

    def __call__(self, items: Sequence[Document], first: int) -> Encoded:
        sentences: list[str] = []
        per_document = np.zeros(len(items), np.int64)
        for number, document in enumerate(items):
            before = len(sentences)
            sentences += self._parts(document.paragraphs())
            per_document[number] = len(sentences) - before
        tokens, lengths = self.tokenizer.encode_literally(sentences, token_dtype(self.tokenizer.vocab_size))
        lengths, per_document, cut_sentences = _sized(lengths, per_document)

        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.cumsum(per_document) - per_document
        runs = [_runs(lengths[start : start + count]) for start, count in zip(starts, per_document, strict=True)]
        record_sentences = np.array([run for some in runs for run in some], np.int64)
        bounds = np.concatenate([[0], np.cumsum(record_sentences)])
        document_records = np.array([len(some) for some in runs], np.int64)
        of_record = np.repeat(np.arange(len(items)), document_records)

        def records() -> Iterator[dict[str, bytes | int]]:
            for number, begin, end in zip(of_record.tolist(), bounds[:-1], bounds[1:], strict=True):
                source = f"{items[number].source}, line {items[number].line}"
                yield {
                    "tokens": tokens[offsets[begin] : offsets[end]].tobytes(),
                    "sentence_lengths": lengths[begin:end].astype("<u2").tobytes(),
                    "document": first + number,
                    "source": source.encode("utf-8", "replace"),
                }

        kept = per_document > 0
        index = {
            "sentence_lengths": lengths.astype(np.uint16),
            "document_sentences": per_document[kept],
            "document_records": document_records[kept],
            "record_sentences": record_sentences,
            "record_tokens": np.diff(offsets[bounds]),
            "document_tokens": (offsets[starts + per_document] - offsets[starts])[kept],
            "document_hashes": np.array([_text_hash(document) for document in items], np.uint64)[kept],
        }
        counts = DocumentCounts(
            documents=int(kept.sum()),
            empty_documents=int((~kept).sum()),
            characters=sum(len(document.text) for document in items),
            sentences=len(lengths),
            cut_sentences=cut_sentences,
            tokens=len(tokens),
            unknown_tokens=int(np.count_nonzero(tokens == self.tokenizer.special_ids.get("unk", -1))),
            records=len(record_sentences),
        )
        return Encoded(records(), index, counts)


def _sized(lengths: np.ndarray, per_document: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Drop sentences without tokens and split those longer than a record: (lengths, per_document, number split)."""
    pieces = -(-lengths // RECORD_TOKENS)
    owner = np.repeat(np.arange(len(per_document)), per_document)
    per_document = np.bincount(owner, weights=pieces, minlength=len(per_document)).astype(np.int64)
    result = np.full(int(pieces.sum()), RECORD_TOKENS, np.int64)
    last = np.cumsum(pieces)[pieces > 0] - 1
    result[last] = (lengths - (pieces - 1) * RECORD_TOKENS)[pieces > 0]
    return result, per_document, int(np.count_nonzero(pieces > 1))


def _runs(lengths: np.ndarray) -> list[int]:
    """Return the number of a document's sentences per record: as many as fit."""
    ends = np.cumsum(lengths)
    runs, first, base = [], 0, 0
    while first < len(lengths):
        last = int(np.searchsorted(ends, base + RECORD_TOKENS, side="right"))
        runs.append(last - first)
        first, base = last, int(ends[last - 1])
    return runs


def _text_hash(document: Document) -> int:
    text = document.text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
