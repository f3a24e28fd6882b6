"""Blocks of running text of one length, without special tokens: documents follow one another, and are cut anywhere.

The rows of T5's pretraining before its noise (`concatenate_tokens` and `split_tokens` in the original's
preprocessors.py): nothing marks where a document ends. Only the last block of a window is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..packing import Statistics, ranges
from .documents import DocumentPlan, DocumentRows
from .rows import Batch


@dataclass(frozen=True)
class BlockPlan(DocumentPlan):
    """The rows of one window: `blocks` [R] is the block in each, of the window's tokens; `length` their number."""

    blocks: np.ndarray
    length: int


class TokenBlocks(DocumentRows[BlockPlan]):
    """Blocks of running text, from a tokenised corpus. A batch of rows (B rows, L = `sequence_length`):

        input_ids    [B, L] int32
        segment_ids  [B, L] int32   1, or 0 for padding
        row_ids      [B, 2] uint32  (epoch, row within the epoch), which repeat only if `copies` is set

    Args:
        sequence_length: length of a block, L; the other arguments are those of `DocumentRows`.

    Raises:
        DataError: there are fewer documents than two splits need.
    """

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two data sets with the same rows under the same numbers."""
        return self._fingerprint(["blocks", *self._settings])

    def _make_plan(self, epoch: int, window: int) -> BlockPlan:
        sentences, random = self._read_window(epoch, window)
        length = int(sentences.lengths.sum())
        rows = -(-length // self.sequence_length)
        return BlockPlan(
            epoch=epoch,
            window=window,
            documents=sentences.documents,
            row_examples=np.arange(rows + 1),
            statistics=Statistics(
                sequence_length=self.sequence_length,
                windows=1,
                documents=len(sentences.documents),
                sentences=len(sentences.lengths),
                source_tokens=length,
                examples=rows,
                rows=rows,
                tokens=length,
            ),
            blocks=random.permutation(rows),
            length=length,
        )

    def _parts(self, plan: BlockPlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = plan.blocks[rows] * self.sequence_length
        return first, np.minimum(self.sequence_length, plan.length - first)

    def assemble(self, plan: BlockPlan, tokens: np.ndarray, rows: np.ndarray, first_row: int) -> Batch:
        """Assemble a batch of these rows of a window, see `RowSource.assemble`."""
        first, count = self._parts(plan, rows)
        batch = self.padding(len(rows))
        batch["row_ids"][:, 0] = plan.epoch
        batch["row_ids"][:, 1] = first_row + rows
        places = ranges(np.arange(len(rows)) * self.sequence_length, count)  # in the flattened batch
        batch["input_ids"].reshape(-1)[places] = tokens[ranges(first, count)]
        batch["segment_ids"].reshape(-1)[places] = 1
        return batch

    def padding(self, rows: int) -> Batch:
        """Return a batch of empty rows."""
        shape = (rows, self.sequence_length)
        return {
            "input_ids": np.full(shape, self.tokenizer.pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "row_ids": np.zeros((rows, 2), np.uint32),
        }
