"""A language model's rows as streams: each row of a batch goes on where the same row of the batch before it stopped.

The text of a window is that of running_text.py. It is cut into as many columns as a batch has rows, of one length;
batch t of the window holds the t-th row of every column (Dai et al. 2019, 3.2). So a memory of what was read before a
row can be kept from batch to batch. Nothing is left out: the last row of a column is padded, and the last columns may
be shorter.

Segments tell what belongs together, in rows and memories alike: the documents of a window, or all of it if attention
crosses their boundaries. Windows that follow each other have different ones, so that nothing is seen of the windows
before, unless a memory reaches beyond three of them, or beyond fifteen if each is an epoch.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..tokenizers.tokenizer import Tokenizer
from .running_text import RunningTextPlan, RunningTextRows

# What is added to the segments of a window is a multiple of _STEP, by the remainders of its epoch and its number. They
# are int32, and a window has fewer documents than that.
_EPOCHS, _WINDOWS = 16, 4
_STEP = (1 << 31) // (_EPOCHS * _WINDOWS)


class StreamRows(RunningTextRows):
    """Rows of consecutive text, from a tokenised corpus; the arrays of a batch are those of `RunningTextRows`.

    `segment_ids` are numbers of documents, or all the same if `cross_documents`, as above.

    Args:
        store: see `build_documents`.
        tokenizer: tokenizer of the corpus; `eos_id` separates documents.
        split: split of the documents, see `DocumentStore.documents`.
        columns: number of rows of a batch.
        sequence_length: length of every row, L.
        settings: those of `RunningTextRows`.

    Raises:
        DataError: as `RunningTextRows`, or there are no columns.
    """

    def __init__(
        self,
        store: DocumentStore,
        tokenizer: Tokenizer,
        split: Split = "train",
        *,
        columns: int,
        sequence_length: int,
        **settings: Any,
    ):
        if columns < 1:
            raise DataError(f"{columns} columns: expected at least 1.")
        self.columns = columns
        super().__init__(store, tokenizer, split, sequence_length=sequence_length, **settings)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two data sets with the same rows under the same numbers."""
        return self._fingerprint(["streams of windows apart", self.columns, super().fingerprint])

    def _order_of_parts(self, length: int, random: Any) -> np.ndarray:
        del random  # the order is that of the text
        return np.arange(-(-self._column(length) // self.sequence_length) * self.columns)

    def _column(self, length: int) -> int:
        """Return the length of a column of a text of `length` tokens."""
        return -(-length // self.columns)

    def _spans(self, plan: RunningTextPlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column = self._column(plan.length)
        into = rows // self.columns * self.sequence_length
        first = rows % self.columns * column + into
        count = np.minimum(np.minimum(self.sequence_length, column - into), plan.length - first)
        return np.minimum(first, plan.length), np.maximum(count, 0)

    def _segments(
        self, plan: RunningTextPlan, first: np.ndarray, count: np.ndarray, begun: np.ndarray
    ) -> np.ndarray | int:
        del first, count  # segments go on from row to row
        before = (plan.epoch % _EPOCHS * _WINDOWS + plan.window % _WINDOWS) * _STEP
        return (1 if self.cross_documents else begun) + before
