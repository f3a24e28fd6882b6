"""A language model's rows: documents one after the other, each after an end-of-text token, cut into rows of one length.

The text of a window is `<eos> document <eos> document ...`; row r is its tokens r·L up to r·L + L, and the labels are
the same text one token later. So every token is predicted once, the first of a document from `<eos>`, and `<eos>` from
the last; only the window's last row is padded.

Attention may cross the boundaries of documents, as in GPT-3 (Brown et al. 2020, appendix B: "sequences with multiple
documents are not masked in any special way"): then a row is one segment. Otherwise each document in a row is a segment
of its own, which begins with its `<eos>`, and positions start anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..packing import Statistics, ranges
from ..tokenizers.tokenizer import Tokenizer
from .documents import DocumentPlan, DocumentRows
from .rows import Batch


@dataclass(frozen=True)
class RunningTextPlan(DocumentPlan):
    """The rows of one window.

    Attributes:
        order: [R] the part of the text in each row: part p begins at token p·L of the text.
        starts: [D] position of each document's end-of-text token in the text, ascending.
        length: number of tokens of the text.
    """

    order: np.ndarray
    starts: np.ndarray
    length: int


class RunningTextRows(DocumentRows[RunningTextPlan]):
    """Rows of running text, from a tokenised corpus.

    A batch of rows is a dictionary of arrays (B rows, L = `sequence_length`):

        input_ids       [B, L] int32    then padding
        labels          [B, L] int32    the next tokens
        label_weights   [B, L] float32  1, or 0 for padding
        segment_ids     [B, L] int32    1, 2, ... for the documents of a row, all 1 if `cross_documents`; 0 for padding
        position_ids    [B, L] int32    from 0 in each segment
        row_ids         [B, 2] uint32   (epoch, row within the epoch), which repeat only if `copies` is set

    Args:
        store: see `build_documents`.
        tokenizer: tokenizer of the corpus; `eos_id` separates documents.
        split: split of the documents, see `DocumentStore.documents`.
        sequence_length: length of every row, L.
        cross_documents: whether attention crosses the boundaries of documents.
        settings: seed, copies, validation_fraction and window_tokens of `DocumentRows`.

    Raises:
        DataError: there are fewer documents than two splits need, or the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        store: DocumentStore,
        tokenizer: Tokenizer,
        split: Split = "train",
        *,
        sequence_length: int,
        cross_documents: bool = True,
        **settings: Any,
    ):
        self.cross_documents, self._end = cross_documents, tokenizer.eos_id
        super().__init__(store, tokenizer, split, sequence_length=sequence_length, **settings)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two data sets with the same rows under the same numbers."""
        kind = f"running text {'across' if self.cross_documents else 'within'} documents"
        return self._fingerprint([kind, *self._settings, self._end])

    def _make_plan(self, epoch: int, window: int) -> RunningTextPlan:
        sentences, random = self._read_window(epoch, window)
        ends = np.concatenate([[0], np.cumsum(sentences.lengths)])
        tokens = np.diff(ends[sentences.document_sentences])  # of each document
        sizes = tokens + 1
        length = int(sizes.sum())
        order = self._order_of_parts(length, random)
        rows = len(order)
        return RunningTextPlan(
            epoch=epoch,
            window=window,
            documents=sentences.documents,
            row_examples=np.arange(rows + 1),
            statistics=Statistics(
                sequence_length=self.sequence_length,
                windows=1,
                documents=len(tokens),
                sentences=len(sentences.lengths),
                source_tokens=int(tokens.sum()),
                examples=rows,
                rows=rows,
                tokens=length,
            ),
            order=order,
            starts=np.cumsum(sizes) - sizes,
            length=length,
        )

    def _order_of_parts(self, length: int, random: Any) -> np.ndarray:
        """Return the order of the parts of a text of `length` tokens."""
        return random.permutation(-(-length // self.sequence_length))

    def _spans(self, plan: RunningTextPlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first position in the text and the number of tokens of each row, its last label not included."""
        first = plan.order[rows] * self.sequence_length
        return first, np.minimum(self.sequence_length, plan.length - first)

    def _parts(self, plan: RunningTextPlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, count = self._spans(plan, rows)
        last = np.minimum(first + count, plan.length - 1)
        # Without end-of-text tokens, of which one precedes each document.
        begin = first - np.searchsorted(plan.starts, first, side="left")
        end = last + 1 - np.searchsorted(plan.starts, last + 1, side="left")
        kept = end > begin
        return begin[kept], (end - begin)[kept]

    def assemble(self, plan: RunningTextPlan, tokens: np.ndarray, rows: np.ndarray, first_row: int) -> Batch:
        """Assemble a batch of these rows of a window, see `RowSource.assemble`."""
        first, count = self._spans(plan, rows)
        batch = self.padding(len(rows))
        batch["row_ids"][:, 0] = plan.epoch
        batch["row_ids"][:, 1] = first_row + rows
        places = ranges(np.arange(len(rows)) * self.sequence_length, count)  # in the flattened batch
        text = ranges(first, count)
        begun, begun_next = (np.searchsorted(plan.starts, at, side="right") for at in (text, text + 1))
        batch["input_ids"].reshape(-1)[places] = self._read(plan, tokens, text, begun)
        batch["labels"].reshape(-1)[places] = self._read(plan, tokens, text + 1, begun_next)
        batch["label_weights"].reshape(-1)[places] = 1
        batch["segment_ids"].reshape(-1)[places] = self._segments(plan, first, count, begun)
        begin = np.repeat(first, count)
        begin = begin if self.cross_documents else np.maximum(plan.starts[begun - 1], begin)
        batch["position_ids"].reshape(-1)[places] = text - begin
        return batch

    def _segments(
        self, plan: RunningTextPlan, first: np.ndarray, count: np.ndarray, begun: np.ndarray
    ) -> np.ndarray | int:
        """Return the segment of each token of rows of `count` tokens from `first`; `begun`: documents up to each."""
        if self.cross_documents:
            return 1
        return begun - np.repeat(np.searchsorted(plan.starts, first, side="right"), count) + 1

    def _read(self, plan: RunningTextPlan, tokens: np.ndarray, text: np.ndarray, begun: np.ndarray) -> np.ndarray:
        """Return the tokens at positions of the text; the one after its end is the end-of-text token too."""
        ends = (plan.starts[begun - 1] == text) | (text == plan.length)
        return np.where(ends, self._end, tokens[np.where(ends, 0, text - begun)])

    def padding(self, rows: int) -> Batch:
        """Return a batch of empty rows."""
        shape = (rows, self.sequence_length)
        arrays: dict[str, Any] = {
            "input_ids": np.full(shape, self.tokenizer.pad_id, np.int32),
            "labels": np.zeros(shape, np.int32),
            "label_weights": np.zeros(shape, np.float32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
            "row_ids": np.zeros((rows, 2), np.uint32),
        }
        return arrays
