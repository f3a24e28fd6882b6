"""Rows made of a corpus's documents: an epoch shuffles them and parts them into windows of whole documents.

What is in memory is one window, some `window_tokens` tokens. What examples are made of its sentences, and what a row
looks like, is for sentence_pairs.py, full_sentences.py and their like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..packing import Statistics, ranges
from ..random import RandomStream
from ..tokenizers.tokenizer import Tokenizer
from .rows import WindowedRows

_SHUFFLE, _PLAN = 1, 2  # what a random stream is for
_RECORDS_AT_ONCE = 4096


class Window(NamedTuple):
    """The sentences of a window.

    Attributes:
        documents: [D] their numbers in the store, in the window's order.
        lengths: [S] int64 tokens of each sentence, document after document.
        document_sentences: [D+1] int64 where each document's sentences start in `lengths`.
    """

    documents: np.ndarray
    lengths: np.ndarray
    document_sentences: np.ndarray


@dataclass(frozen=True)
class DocumentPlan:
    """What the plans of documents' rows have in common.

    Attributes:
        epoch: of the window.
        window: its number within the epoch.
        documents: [D] the documents that are read for it, in this order.
        row_examples: [R+1] where each row's examples start among the window's, which are ordered by row.
        statistics: what the plan makes of the documents.
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
        tokenizer: that it was tokenised with.
        split: which documents, see `DocumentStore.documents`.
        sequence_length: positions of every row.
        seed: of everything random here.
        copies: plan the corpus this many times, and then over again with the same row ids. Masks that depend on row
            ids alone then repeat too: static masking, as the original with its `dupe_factor`. None plans every epoch
            anew.
        validation_fraction: the share of the documents that is held out.
        window_tokens: about how many of the corpus's tokens to plan and hold at once; 2 bytes each, and 50 more a
            sentence.
        least_documents: how many each split, and each window, must have.

    Raises:
        DataError: too few documents, a seed or number of copies that is none.
    """

    def __init__(
        self,
        store: DocumentStore,
        tokenizer: Tokenizer,
        split: Split,
        *,
        sequence_length: int,
        seed: int,
        copies: int | None,
        validation_fraction: float,
        window_tokens: int,
        least_documents: int,
    ):
        super().__init__()
        if copies is not None and copies < 1:
            raise DataError(f"{copies} copies of the corpus: expected at least 1, or none for dynamic masking.")
        if seed < 0:
            raise DataError(f"A seed of {seed}: expected 0 or more.")
        self.store, self.tokenizer, self.split, self.sequence_length = store, tokenizer, split, sequence_length
        self.seed, self.copies, self.window_tokens = seed, copies, window_tokens
        self.documents = store.documents(split, validation_fraction, least=least_documents)
        self.tokens = int(store.document_tokens[self.documents].sum())
        self._least_documents = least_documents
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def windows_in_epoch(self, epoch: int) -> int:
        """Number of windows of an epoch."""
        return len(self._windows(epoch)[1]) - 1

    def _planned_epoch(self, epoch: int) -> int:
        return epoch if self.copies is None else epoch % self.copies

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's documents in their order, and where its windows start in them, [W+1]."""
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
        """A window's sentences, and the random stream that its plan is drawn from."""
        order, starts = self._windows(epoch)
        documents = order[starts[window] : starts[window + 1]]
        first = self.store.document_sentences[documents]
        counts = self.store.document_sentences[documents + 1] - first
        lengths = self.store.sentence_lengths[ranges(first, counts)].astype(np.int64)
        sentences = Window(documents, lengths, np.concatenate([[0], np.cumsum(counts)]))
        return sentences, RandomStream(self.seed, _PLAN, epoch, window)

    def _parts(self, plan: P, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these rows are made of: where each part starts in the window's tokens, and how long it is (> 0)."""
        raise NotImplementedError

    def read_tokens(self, plan: P, rows: np.ndarray | None = None) -> np.ndarray:
        """A window's tokens end to end; [T] of the store's dtype.

        With `rows`, only the records that these rows need are read, and the other tokens are 0.
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
    """Which records the parts [starts, starts + lengths) lie in; `ends` is where each record ends in the window."""
    opened = np.bincount(np.searchsorted(ends, starts, side="right"), minlength=len(ends))
    closed = np.bincount(np.searchsorted(ends, starts + lengths - 1, side="right"), minlength=len(ends))
    return np.flatnonzero(np.cumsum(opened) - np.cumsum(closed) + closed)
