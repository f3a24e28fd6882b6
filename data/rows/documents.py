"""Rows from a corpus's documents: an epoch shuffles them and divides them into windows of whole documents.

Only one window of about `window_tokens` tokens is in memory. The objectives' files, such as sentence_pairs.py and
full_sentences.py, define the examples and the layout of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..packing import Statistics, ranges
from ..random import RandomStream
from ..tokenizers.tokenizer import Tokenizer
from .rows import WindowedRows

_SHUFFLE, _PLAN = 1, 2  # purposes of random streams
_RECORDS_AT_ONCE = 4096


class Window(NamedTuple):
    """The sentences of a window.

    Attributes:
        documents: [D] numbers of the documents in the store, in the window's order.
        lengths: [S] int64, length of each sentence in tokens, document after document.
        document_sentences: [D+1] int64, start of each document's sentences in `lengths`.
    """

    documents: np.ndarray
    lengths: np.ndarray
    document_sentences: np.ndarray


@dataclass(frozen=True)
class DocumentPlan:
    """Base of the plans of rows of documents.

    Attributes:
        epoch: epoch of the window.
        window: number of the window within the epoch.
        documents: [D] the documents to read for it, in this order.
        row_examples: [R+1] index of each row's first example among the window's, which are ordered by row.
        statistics: statistics of the plan.
    """

    epoch: int
    window: int
    documents: np.ndarray
    row_examples: np.ndarray
    statistics: Statistics

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_examples) - 1


class DocumentRows[P: DocumentPlan](WindowedRows[P]):
    """Rows of whole documents' windows; a subclass plans and assembles them.

    Args:
        store: the tokenised corpus.
        tokenizer: tokenizer of the corpus.
        split: split of the documents, see `DocumentStore.documents`.
        sequence_length: length of every row, in tokens.
        seed: random seed.
        copies: number of different plans of the corpus, which then repeat with the same row ids. Masks that depend
            only on row ids then repeat too: static masking, as in the original with its `dupe_factor`. None makes a new
            plan in every epoch.
        validation_fraction: fraction of the documents that is held out.
        window_tokens: approximate number of tokens to plan and hold in memory at once; 2 bytes per token and 50 per
            sentence.
        least_documents: minimum number of documents per split and per window.

    Raises:
        DataError: there are too few documents, or the sequence length, the seed or the number of copies is invalid.
    """

    def __init__(
        self,
        store: DocumentStore,
        tokenizer: Tokenizer,
        split: Split = "train",
        *,
        sequence_length: int,
        seed: int = 0,
        copies: int | None = None,
        validation_fraction: float = 0.05,
        window_tokens: int = 8_000_000,
        least_documents: int = 1,
    ):
        super().__init__()
        if sequence_length < 1:
            raise DataError(f"A sequence length of {sequence_length}: expected at least 1.")
        if copies is not None and copies < 1:
            raise DataError(f"{copies} copies of the corpus; expected at least 1, or none for dynamic masking.")
        if seed < 0:
            raise DataError(f"A seed of {seed}: expected 0 or more.")
        self.store, self.tokenizer, self.split, self.sequence_length = store, tokenizer, split, sequence_length
        self.seed, self.copies, self.window_tokens = seed, copies, window_tokens
        self.documents = store.documents(split, validation_fraction, least=least_documents)
        self.tokens = int(store.document_tokens[self.documents].sum())
        self._least_documents = least_documents
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def _settings(self) -> list[str | float | None]:
        """The settings that all data sets of rows have, for `_fingerprint`."""
        return [self.store.fingerprint, self.sequence_length, self.seed, self.copies, self.window_tokens]

    def _fingerprint(self, settings: Sequence[str | float | None]) -> str:
        """Return the hexadecimal hash of what decides the rows: a subclass's settings, and the documents."""
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.documents.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def windows_in_epoch(self, epoch: int) -> int:
        """Return the number of windows of an epoch."""
        return len(self._windows(epoch)[1]) - 1

    def _planned_epoch(self, epoch: int) -> int:
        return epoch if self.copies is None else epoch % self.copies

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's documents in order, and the start of each window among them, [W+1]."""
        epoch, found = self._planned_epoch(epoch), self._order
        if found is None or found[0] != epoch:
            order = self.documents[RandomStream(self.seed, _SHUFFLE, epoch).permutation(len(self.documents))]
            ends = np.cumsum(self.store.document_tokens[order])
            count = max(1, round(self.tokens / self.window_tokens))
            wanted = np.searchsorted(ends, np.arange(1, count) * (self.tokens / count)) + 1
            starts = [0]
            for start in wanted.tolist():
                if min(start - starts[-1], len(order) - start) >= self._least_documents:
                    starts.append(start)
            self._order = found = (epoch, order, np.array([*starts, len(order)]))
        return found[1], found[2]

    def _read_window(self, epoch: int, window: int) -> tuple[Window, RandomStream]:
        """Return a window's sentences, and the random stream for its plan."""
        order, starts = self._windows(epoch)
        documents = order[starts[window] : starts[window + 1]]
        first = self.store.document_sentences[documents]
        counts = self.store.document_sentences[documents + 1] - first
        lengths = self.store.sentence_lengths[ranges(first, counts)].astype(np.int64)
        sentences = Window(documents, lengths, np.concatenate([[0], np.cumsum(counts)]))
        return sentences, RandomStream(self.seed, _PLAN, epoch, window)

    def _parts(self, plan: P, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts of these rows: start of each in the window's tokens, and length (> 0)."""
        raise NotImplementedError

    def read_tokens(self, plan: P, rows: np.ndarray | None = None) -> np.ndarray:
        """Read a window's tokens, concatenated; [T] of the store's dtype.

        With `rows`, only the records that these rows need are read; the other tokens are 0.
        """
        first = self.store.document_records[plan.documents]
        records = ranges(first, self.store.document_records[plan.documents + 1] - first)
        ends = np.cumsum(self.store.record_tokens[records], dtype=np.int64)
        wanted = np.arange(len(records)) if rows is None else _touched(*self._parts(plan, rows), ends)
        tokens = np.zeros(int(ends[-1]), self.store.token_dtype)
        for some in np.array_split(wanted, 1 + len(wanted) // _RECORDS_AT_ONCE):
            for index, content in zip(some.tolist(), self.store.read_records(records[some]), strict=True):
                tokens[ends[index] - len(content) : ends[index]] = content
        return tokens


def _touched(starts: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the records that the parts [starts, starts + lengths) touch; `ends` is each record's end in the window."""
    opened = np.bincount(np.searchsorted(ends, starts, side="right"), minlength=len(ends))
    closed = np.bincount(np.searchsorted(ends, starts + lengths - 1, side="right"), minlength=len(ends))
    return np.flatnonzero(np.cumsum(opened) - np.cumsum(closed) + closed)
