"""RoBERTa's rows: whole sentences up to the row's length, across the boundaries of documents or within them.

FULL-SENTENCES (Liu et al. 2019, 4.2): a row is `<s> sentences </s>`, with as many consecutive sentences as fit. It
continues across the end of a document, which is marked by an extra `</s>`, and is one segment, for attention and
positions.

DOC-SENTENCES: all sentences of an example are from one document, so that the last example of a document is shorter. The
paper enlarges the batch to keep its number of tokens; here short examples share a row, each as a segment of its own,
which keeps the number of tokens with a single shape.

A sentence longer than a row continues in the next one: no token is truncated, and such sentences are counted. fairseq's
blocks end every *line* with `</s>`, which is a paragraph in its corpora; here, as in the paper, only documents are
separated.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..packing import Statistics, order_by_row, pack, ranges
from ..tokenizers.tokenizer import Tokenizer
from .documents import DocumentPlan, DocumentRows, Window
from .rows import Batch


@dataclass(frozen=True)
class Spans:
    """E examples, each a range of a window's tokens, in the order of the tokens.

    Attributes:
        starts: [E] int64, start of each, counted from the window's first token.
        lengths: [E] int64, number of tokens of each, without special tokens.
        borders: [E] int64, number of document ends inside each.
        split_sentences: number of sentences that are in more than one example.
    """

    starts: np.ndarray
    lengths: np.ndarray
    borders: np.ndarray
    split_sentences: int


def plan_sentences(window: Window, most: int, cross_documents: bool) -> Spans:
    """Fill one example after another with as many whole sentences as fit, until the window ends.

    Args:
        window: lengths and documents of the sentences.
        most: maximum number of tokens of an example, without the two at its ends; a document boundary counts as one.
        cross_documents: whether an example continues across the end of a document.
    """
    ends = np.cumsum(window.lengths)  # end of each sentence
    document = np.repeat(np.arange(len(window.documents)), np.diff(window.document_sentences))
    # End of each sentence if every boundary takes one position; an example's room is measured in these positions.
    placed = (ends + document).tolist() if cross_documents else ends.tolist()
    token_ends, of_document = ends.tolist(), document.tolist()
    last_sentence = (window.document_sentences[1:] - 1).tolist()
    starts, lengths, borders, split = [], [], [], 0
    at, sentence = 0, 0  # the next token, and its sentence
    while sentence < len(token_ends):
        here = of_document[sentence]
        room = at + most + (here if cross_documents else 0)
        stop = len(token_ends) if cross_documents else last_sentence[here] + 1
        after = bisect_right(placed, room, sentence, stop)  # the first sentence that is not entirely in the example
        if after > sentence:
            end = token_ends[after - 1]
            inside = of_document[after - 1] - here
        else:
            end, inside = at + most, 0
            split += at == (token_ends[sentence - 1] if sentence else 0)  # counted with its first part
        starts.append(at)
        lengths.append(end - at)
        borders.append(inside)
        at, sentence = end, after
    return Spans(np.array(starts, np.int64), np.array(lengths, np.int64), np.array(borders, np.int64), split)


@dataclass(frozen=True)
class SentencePlan(DocumentPlan):
    """The rows of one window. Example arrays [E] are ordered by row, then by place in the row.

    Attributes:
        starts: start of each example in the window's tokens.
        tokens: number of tokens of each example, without special tokens.
        lengths: length of each example, including special tokens.
        column: start position of each example in its row.
        slot: index of each example in its row, from 0.
        document_starts: [D] start of each document in the window's tokens.
    """

    starts: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    column: np.ndarray
    slot: np.ndarray
    document_starts: np.ndarray


class FullSentenceRows(DocumentRows[SentencePlan]):
    """RoBERTa's pretraining rows, from a tokenised corpus. Tokens are not masked; the training step masks them.

    A batch of rows is a dictionary of arrays (B rows, L = `sequence_length`):

        input_ids       [B, L] int32   `<s> ... </s>`, then padding
        segment_ids     [B, L] int32   1, 2, ... for the examples, 0 for padding; one example per row if
                                       `cross_documents`
        position_ids    [B, L] int32   from 0 in each example
        token_type_ids  [B, L] int32   all 0
        row_ids         [B, 2] uint32  (epoch, row within the epoch), which repeat only if `copies` is set

    Args:
        store: see `build_documents`.
        tokenizer: tokenizer of the corpus; `cls_id` begins a row, `sep_id` ends it and separates documents.
        split: split of the documents, see `DocumentStore.documents`.
        sequence_length: length of every row, L.
        cross_documents: FULL-SENTENCES; otherwise DOC-SENTENCES.
        settings: seed, copies, validation_fraction and window_tokens of `DocumentRows`.

    Raises:
        DataError: there are fewer documents than two splits need, or the sequence length leaves no room for a token
            between two special ones.
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
        if sequence_length < 3:
            raise DataError(
                f"A sequence length of {sequence_length}: no room for a token between the two special ones."
            )
        self.cross_documents = cross_documents
        super().__init__(store, tokenizer, split, sequence_length=sequence_length, **settings)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two data sets with the same rows under the same numbers."""
        kind = "full sentences" if self.cross_documents else "document sentences"
        return self._fingerprint([kind, *self._settings])

    def _make_plan(self, epoch: int, window: int) -> SentencePlan:
        sentences, random = self._read_window(epoch, window)
        spans = plan_sentences(sentences, self.sequence_length - 2, self.cross_documents)
        lengths = spans.lengths + spans.borders + 2
        most = 1 if self.cross_documents else self.sequence_length
        packed, rows = pack(lengths, self.sequence_length, most)
        placed = order_by_row(random.permutation(rows)[packed], rows)
        order = placed.examples
        ends = np.concatenate([[0], np.cumsum(sentences.lengths)])
        return SentencePlan(
            epoch=epoch,
            window=window,
            documents=sentences.documents,
            row_examples=placed.row_examples,
            statistics=Statistics(
                sequence_length=self.sequence_length,
                windows=1,
                documents=len(sentences.documents),
                sentences=len(sentences.lengths),
                source_tokens=int(sentences.lengths.sum()),
                examples=len(lengths),
                split_sentences=spans.split_sentences,
                rows=rows,
                tokens=int(lengths.sum()),
            ),
            starts=spans.starts[order],
            tokens=spans.lengths[order],
            lengths=lengths[order],
            column=placed.columns(lengths[order]),
            slot=placed.slot,
            document_starts=ends[sentences.document_sentences[:-1]],
        )

    def _parts(self, plan: SentencePlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        examples = ranges(plan.row_examples[rows], np.diff(plan.row_examples)[rows])
        return plan.starts[examples], plan.tokens[examples]

    def assemble(self, plan: SentencePlan, tokens: np.ndarray, rows: np.ndarray, first_row: int) -> Batch:
        """Assemble a batch of these rows of a window, see `RowSource.assemble`."""
        count = np.diff(plan.row_examples)[rows]
        of = ranges(plan.row_examples[rows], count)
        batch = self.padding(len(rows))
        batch["row_ids"][:, 0] = plan.epoch
        batch["row_ids"][:, 1] = first_row + rows

        row = np.repeat(np.arange(len(rows)), count)
        lengths = plan.lengths[of]
        start = row * self.sequence_length + plan.column[of]  # of each example, in the flattened batch
        places = ranges(start, lengths)
        batch["segment_ids"].reshape(-1)[places] = np.repeat(plan.slot[of] + 1, lengths)
        batch["position_ids"].reshape(-1)[places] = places - np.repeat(start, lengths)

        source = ranges(plan.starts[of], plan.tokens[of])
        # A token moves one position to the right for each document that has begun in its example before it.
        begun = np.searchsorted(plan.document_starts, source, side="right")
        before = np.searchsorted(plan.document_starts, plan.starts[of], side="right")
        passed = begun - np.repeat(before, plan.tokens[of])
        ids = batch["input_ids"].reshape(-1)
        ids[places] = self.tokenizer.sep_id  # at the end and between documents; the rest is overwritten
        ids[start] = self.tokenizer.cls_id
        ids[ranges(start + 1, plan.tokens[of]) + passed] = tokens[source]
        return batch

    def padding(self, rows: int) -> Batch:
        """Return a batch of rows without examples: all padding."""
        shape = (rows, self.sequence_length)
        return {
            "input_ids": np.full(shape, self.tokenizer.pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "row_ids": np.zeros((rows, 2), np.uint32),
        }
