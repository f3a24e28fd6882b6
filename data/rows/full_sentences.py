"""RoBERTa's rows: whole sentences up to the row's length, over the borders of documents or within them.

FULL-SENTENCES (Liu et al. 2019, 4.2): a row is `<s> sentences </s>`, as many sentences in a row as fit. It goes on
over the end of a document, where an extra `</s>` stands, and is one segment: attention and positions run through it.

DOC-SENTENCES: a row's sentences are of one document, so that the last example of a document is shorter. The paper
enlarges the batch to keep its number of tokens; here short examples share a row, each a segment of its own, which
keeps the tokens of a batch with one shape.

A sentence longer than a row goes on in the next one: no token is truncated, and such sentences are counted. fairseq's
own blocks end every *line* with `</s>`, which is a paragraph in its corpora; here, as in the paper, only documents are
parted.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..packing import Statistics, order_by_row, pack, ranges
from ..tokenizers.tokenizer import Tokenizer
from .documents import DocumentPlan, DocumentRows, Window
from .rows import Batch


@dataclass(frozen=True)
class Spans:
    """E examples, each a run of a window's tokens, in the order of the tokens.

    Attributes:
        starts: [E] int64 where each starts, counted from the window's first token.
        lengths: [E] int64 its tokens, special ones left out.
        borders: [E] int64 the ends of documents inside of it.
        split_sentences: sentences that are in more than one example.
    """

    starts: np.ndarray
    lengths: np.ndarray
    borders: np.ndarray
    split_sentences: int


def plan_sentences(window: Window, most: int, cross_documents: bool) -> Spans:
    """As many whole sentences as fit, one example after another, until the window ends.

    Args:
        window: the sentences' lengths and documents.
        most: tokens of an example, without the two at its ends; a border of documents in it takes one of them.
        cross_documents: whether an example goes on over the end of a document.
    """
    ends = np.cumsum(window.lengths)  # where each sentence ends
    document = np.repeat(np.arange(len(window.documents)), np.diff(window.document_sentences))
    # Where each sentence ends if every border takes a place, which is what an example's room is measured in.
    placed = (ends + document).tolist() if cross_documents else ends.tolist()
    token_ends, of_document = ends.tolist(), document.tolist()
    last_sentence = (window.document_sentences[1:] - 1).tolist()
    starts, lengths, borders, split = [], [], [], 0
    at, sentence = 0, 0  # the next token, and the sentence that it is of
    while sentence < len(token_ends):
        here = of_document[sentence]
        room = at + most + (here if cross_documents else 0)
        stop = len(token_ends) if cross_documents else last_sentence[here] + 1
        after = bisect_right(placed, room, sentence, stop)  # the first sentence that is not in the example whole
        if after > sentence:
            end = token_ends[after - 1]
            inside = of_document[after - 1] - here
        else:
            end, inside = at + most, 0
            split += at == (token_ends[sentence - 1] if sentence else 0)  # counted where its first part is
        starts.append(at)
        lengths.append(end - at)
        borders.append(inside)
        at, sentence = end, after
    return Spans(np.array(starts, np.int64), np.array(lengths, np.int64), np.array(borders, np.int64), split)


@dataclass(frozen=True)
class SentencePlan(DocumentPlan):
    """The rows of one window. Example arrays are ordered by row, then by place in the row; [E].

    Attributes:
        starts, tokens: where each example starts in the window's tokens, and how many it has of them.
        lengths: positions that it takes, special tokens included.
        column: the position in the row at which it starts.
        slot: its place in the row, from 0.
        document_starts: [D] where each document starts in the window's tokens.
    """

    starts: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    column: np.ndarray
    slot: np.ndarray
    document_starts: np.ndarray


class FullSentenceRows(DocumentRows[SentencePlan]):
    """The rows that RoBERTa is pretrained on, from a tokenised corpus. Tokens are unmasked; masking is the step's.

    A batch of rows is a dictionary of arrays (B rows, L = `sequence_length`):

        input_ids       [B, L] int32   `<s> ... </s>`, then padding
        segment_ids     [B, L] int32   1, 2, ... for the examples, 0 for padding; one example a row where
                                       `cross_documents`
        position_ids    [B, L] int32   from 0 in each example
        token_type_ids  [B, L] int32   all 0
        row_ids         [B, 2] uint32  (epoch, row within the epoch): never the same twice, except where `copies`
                                       says so

    Args:
        store: see `build_documents`.
        tokenizer: that it was tokenised with; its `cls_id` begins a row, its `sep_id` ends one and parts documents.
        split: which documents, see `DocumentStore.documents`.
        sequence_length: L, of every row.
        cross_documents: FULL-SENTENCES, else DOC-SENTENCES.
        seed: of the order of documents and rows.
        copies: plan the corpus this many times, and then over again with the same row ids. None plans every epoch
            anew.
        validation_fraction: the share of the documents that is held out.
        window_tokens: about how many of the corpus's tokens to plan and hold at once; 2 bytes each, and 50 more a
            sentence.

    Raises:
        DataError: fewer documents than two splits need, a sequence length that holds no token between two special
            ones.
    """

    def __init__(
        self,
        store: DocumentStore,
        tokenizer: Tokenizer,
        split: Split = "train",
        *,
        sequence_length: int,
        cross_documents: bool = True,
        seed: int = 0,
        copies: int | None = None,
        validation_fraction: float = 0.05,
        window_tokens: int = 8_000_000,
    ):
        if sequence_length < 3:
            raise DataError(
                f"A sequence length of {sequence_length}: no room for a token between the two special ones."
            )
        self.cross_documents = cross_documents
        super().__init__(
            store,
            tokenizer,
            split,
            sequence_length=sequence_length,
            seed=seed,
            copies=copies,
            validation_fraction=validation_fraction,
            window_tokens=window_tokens,
            least_documents=1,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal: equal for two data sets with the same rows under the same numbers."""
        settings = [
            "full sentences" if self.cross_documents else "document sentences",
            self.store.fingerprint,
            self.sequence_length,
            self.seed,
            self.copies,
            self.window_tokens,
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.documents.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

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
        """The batch of these rows of a window, see `RowSource.assemble`."""
        count = np.diff(plan.row_examples)[rows]
        of = ranges(plan.row_examples[rows], count)
        batch = self.padding(len(rows))
        batch["row_ids"][:, 0] = plan.epoch
        batch["row_ids"][:, 1] = first_row + rows

        row = np.repeat(np.arange(len(rows)), count)
        lengths = plan.lengths[of]
        start = row * self.sequence_length + plan.column[of]  # of each example, in the batch read as one line
        places = ranges(start, lengths)
        batch["segment_ids"].reshape(-1)[places] = np.repeat(plan.slot[of] + 1, lengths)
        batch["position_ids"].reshape(-1)[places] = places - np.repeat(start, lengths)

        source = ranges(plan.starts[of], plan.tokens[of])
        # A token stands one place further right for each document that has begun in its example before it.
        begun = np.searchsorted(plan.document_starts, source, side="right")
        before = np.searchsorted(plan.document_starts, plan.starts[of], side="right")
        passed = begun - np.repeat(before, plan.tokens[of])
        ids = batch["input_ids"].reshape(-1)
        ids[places] = self.tokenizer.sep_id  # at the end and between documents; the rest is written over
        ids[start] = self.tokenizer.cls_id
        ids[ranges(start + 1, plan.tokens[of]) + passed] = tokens[source]
        return batch

    def padding(self, rows: int) -> Batch:
        """A batch of rows without an example: all padding."""
        shape = (rows, self.sequence_length)
        return {
            "input_ids": np.full(shape, self.tokenizer.pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "row_ids": np.zeros((rows, 2), np.uint32),
        }
