"""BERT's rows: pairs of segments, planned from sentence lengths alone, and packed several per row.

Pairs are made as in BERT (Devlin et al. 2018, A.2) and its `create_pretraining_data.py`: whole sentences of one
document are collected up to a target length, and split at a random sentence boundary into A and B. Half of the time B
is replaced by sentences from a random place in another document, and the sentences left over start the next example.
Pairs that are too long for the row are truncated, token by token, in the longer segment, at a random end. The target
length is the full length, but random for `short_fraction` of the examples. There are two deliberate differences:

- the target length is drawn for each example; the script draws it once per document, which would cut a whole book into
  short examples;
- the other document is always a different one; the script tries ten times and may end up with the same one.

A plan is a list of references: start and length of the two segments of each example, in a window of documents. No
tokens are read for it, so that a plan is cheap and a pure function of its arguments.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..packing import Statistics, order_by_row, pack, ranges
from ..random import RandomStream
from ..tokenizers.tokenizer import Tokenizer
from .documents import DocumentPlan, DocumentRows
from .rows import Batch

IS_NEXT, RANDOM = 0, 1  # next_sentence_labels, as in the released checkpoints


@dataclass(frozen=True)
class Examples:
    """References of E examples, in the order of their first segments. Starts count tokens of the window.

    `second_length` is 0 for an example with one segment. `truncated` counts the tokens cut off both segments.
    """

    first_start: np.ndarray
    first_length: np.ndarray
    second_start: np.ndarray
    second_length: np.ndarray
    random: np.ndarray
    short: np.ndarray
    truncated: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Number of tokens of each example, without special tokens: [E]."""
        return self.first_length + self.second_length


def plan_pairs(
    lengths: np.ndarray,
    document_sentences: np.ndarray,
    most: int,
    short_fraction: float,
    random: RandomStream,
) -> Examples:
    """Plan pairs of segments for next sentence prediction.

    Args:
        lengths: [S] length of each sentence in tokens, at least 1, document after document.
        document_sentences: [D+1] start of each document's sentences in `lengths`, and the end of the last one's;
            D >= 2.
        most: maximum number of tokens of an example, without special tokens.
        short_fraction: fraction of the examples with a random target length of at least 2.
        random: source of random numbers.
    """
    ends = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]  # ends[i] is the start of sentence i
    bounds = document_sentences.tolist()
    documents = len(bounds) - 1
    first_start, first_length, second_start, second_length, is_random, is_short = [], [], [], [], [], []
    draw = random.tuples(6)
    for document in range(documents):
        sentence, stop = bounds[document], bounds[document + 1]
        while sentence < stop:
            short, short_target, part, coin, other, other_sentence = next(draw)
            target = 2 + int(short_target * (most - 1)) if short < short_fraction else most
            start = ends[sentence]
            chunk = min(bisect_left(ends, start + target, sentence + 1, stop + 1), stop)
            count = chunk - sentence
            middle = sentence + 1 + (int(part * (count - 1)) if count > 1 else 0)
            first_start.append(start)
            first_length.append(ends[middle] - start)
            if count == 1 or coin < 0.5:
                wanted = max(target - (ends[middle] - start), 1)
                elsewhere = int(other * (documents - 1))
                elsewhere += elsewhere >= document
                low, high = bounds[elsewhere], bounds[elsewhere + 1]
                begin = low + int(other_sentence * (high - low))
                end = min(bisect_left(ends, ends[begin] + wanted, begin + 1, high + 1), high)
                second_start.append(ends[begin])
                second_length.append(ends[end] - ends[begin])
                is_random.append(True)
                sentence = middle
            else:
                second_start.append(ends[middle])
                second_length.append(ends[chunk] - ends[middle])
                is_random.append(False)
                sentence = chunk
            is_short.append(short < short_fraction)
    return _truncated(
        np.array(first_start, np.int64),
        np.array(first_length, np.int64),
        np.array(second_start, np.int64),
        np.array(second_length, np.int64),
        np.array(is_random, np.bool_),
        np.array(is_short, np.bool_),
        most,
        random,
    )


def _truncated(
    first_start: np.ndarray,
    first_length: np.ndarray,
    second_start: np.ndarray,
    second_length: np.ndarray,
    is_random: np.ndarray,
    is_short: np.ndarray,
    most: int,
    random: RandomStream,
) -> Examples:
    """Truncate every pair to `most` tokens.

    The script's loop removes one token from the longer segment (from the second one if they are equal), at the front or
    the back by a coin toss, until the pair fits. This computes its outcome, with the same distribution.
    """
    excess = np.maximum(first_length + second_length - most, 0)
    gap = np.abs(first_length - second_length)
    levelling = np.minimum(excess, gap)
    alternating = excess - levelling
    longer_first = first_length > second_length
    first_cut = alternating // 2 + np.where(longer_first, levelling, 0)
    second_cut = excess - first_cut
    return Examples(
        first_start + random.coins(first_cut),
        first_length - first_cut,
        second_start + random.coins(second_cut),
        second_length - second_cut,
        is_random,
        is_short,
        excess,
    )


def plan_singles(
    lengths: np.ndarray,
    document_sentences: np.ndarray,
    most: int,
    short_fraction: float,
    random: RandomStream,
) -> Examples:
    """Plan examples of one segment, without next sentence prediction: as many whole sentences of a document as fit.

    A sentence longer than a row continues in the next example, so that nothing is truncated. Arguments as for
    `plan_pairs`; D >= 1.
    """
    ends = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    bounds = document_sentences.tolist()
    starts, sizes, is_short = [], [], []
    draw = random.tuples(2)
    for document in range(len(bounds) - 1):
        sentence, last = bounds[document], bounds[document + 1]
        at, stop = ends[sentence], ends[last]
        while at < stop:
            short, short_target = next(draw)
            target = 1 + int(short_target * most) if short < short_fraction else most
            # The last sentence end that the target reaches; where it reaches none, one sentence, or as much of it as
            # fits.
            sentence = bisect_right(ends, at + target, sentence, last + 1) - 1
            if ends[sentence] <= at:
                sentence += 1
            end = min(ends[sentence], at + most)
            starts.append(at)
            sizes.append(end - at)
            is_short.append(short < short_fraction)
            at = end
            if ends[sentence] > at:
                sentence -= 1
    count = len(starts)
    nothing = np.zeros(count, np.int64)
    return Examples(
        np.array(starts, np.int64),
        np.array(sizes, np.int64),
        nothing,
        nothing,
        np.zeros(count, np.bool_),
        np.array(is_short, np.bool_),
        nothing,
    )


@dataclass(frozen=True)
class PairPlan(DocumentPlan):
    """The rows of one window. Example arrays [E] are ordered by row, then by place in the row.

    Attributes:
        examples: references of the examples' segments.
        lengths: length of each example, including special tokens.
        slot: index of each example in its row, from 0.
        column: start position of each example in its row.
    """

    examples: Examples
    lengths: np.ndarray
    slot: np.ndarray
    column: np.ndarray


class SentencePairRows(DocumentRows[PairPlan]):
    """BERT's pretraining rows, from a tokenised corpus. Tokens are not masked; the training step masks them.

    A batch of rows is a dictionary of arrays (B rows, L = `sequence_length`, X = `examples_per_row`):

        input_ids              [B, L] int32    [CLS] A [SEP] B [SEP], or the tokenizer's own template, for one
                                               example after another, then padding
        segment_ids            [B, L] int32    1, 2, ... for the examples, 0 for padding
        position_ids           [B, L] int32    from 0 in each example
        token_type_ids         [B, L] int32    0 for [CLS] A [SEP], 1 for B [SEP]
        row_ids                [B, 2] uint32   (epoch, row within the epoch), which repeat only if `copies` is set
        cls_positions          [B, X] int32    position of each example's [CLS]
        next_sentence_labels   [B, X] int32    0: B follows A, 1: B is random
        next_sentence_weights  [B, X] float32  1, or 0 if the row has no such example

    Args:
        store: see `build_documents`.
        tokenizer: tokenizer of the corpus.
        split: split of the documents, see `DocumentStore.documents`.
        sequence_length: length of every row, L.
        seed: random seed.
        copies: number of different plans of the corpus, which then repeat with the same row ids. Masks that depend
            only on row ids then repeat too: static masking, as in the original with its `dupe_factor`. None makes a new
            plan in every epoch.
        examples_per_row: maximum number of examples per row, X; by default `sequence_length // 32`, at least 2.
        next_sentence: make pairs of segments; otherwise single segments, and all next-sentence weights are 0.
        short_fraction: fraction of the examples with a random, shorter target length.
        validation_fraction: fraction of the documents that is held out.
        window_tokens: approximate number of tokens to plan and hold in memory at once; 2 bytes per token and 50 per
            sentence.

    Raises:
        DataError: there are fewer documents than pairs need (two per split), or the sequence length is too short for a
            pair.
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
        examples_per_row: int | None = None,
        next_sentence: bool = True,
        short_fraction: float = 0.1,
        validation_fraction: float = 0.05,
        window_tokens: int = 8_000_000,
    ):
        if sequence_length < 8:
            raise DataError(
                f"A sequence length of {sequence_length}: too short for two sentences and three special tokens; take 8 "
                "or more."
            )
        self.examples_per_row = max(2, sequence_length // 32) if examples_per_row is None else examples_per_row
        if self.examples_per_row < 1:
            raise DataError(f"{examples_per_row} examples a row: expected at least 1.")
        self.next_sentence, self.short_fraction = next_sentence, short_fraction
        super().__init__(
            store,
            tokenizer,
            split,
            sequence_length=sequence_length,
            seed=seed,
            copies=copies,
            validation_fraction=validation_fraction,
            window_tokens=window_tokens,
            least_documents=2 if next_sentence else 1,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two data sets with the same rows under the same numbers."""
        settings = [
            self.store.fingerprint,
            self.sequence_length,
            self.seed,
            self.copies,
            self.examples_per_row,
            self.next_sentence,
            self.short_fraction,
            self.window_tokens,
        ]
        return self._fingerprint(settings)

    def _make_plan(self, epoch: int, window: int) -> PairPlan:
        sentences, random = self._read_window(epoch, window)
        plan = plan_pairs if self.next_sentence else plan_singles
        special = self.tokenizer.template.cost(self.next_sentence)
        most = self.sequence_length - special
        examples = plan(sentences.lengths, sentences.document_sentences, most, self.short_fraction, random)
        packed, rows = pack(examples.tokens + special, self.sequence_length, self.examples_per_row)
        placed = order_by_row(random.permutation(rows)[packed], rows)
        examples = Examples(**{name: values[placed.examples] for name, values in vars(examples).items()})
        lengths = examples.tokens + special
        statistics = Statistics(
            sequence_length=self.sequence_length,
            windows=1,
            documents=len(sentences.documents),
            sentences=len(sentences.lengths),
            source_tokens=int(sentences.lengths.sum()),
            examples=len(lengths),
            random_examples=int(examples.random.sum()),
            short_examples=int(examples.short.sum()),
            truncated_examples=int(np.count_nonzero(examples.truncated)),
            truncated_tokens=int(examples.truncated.sum()),
            dropped_examples=len(lengths) - int(placed.row_examples[-1]),
            rows=rows,
            tokens=int(lengths.sum()),
        )
        return PairPlan(
            epoch=epoch,
            window=window,
            documents=sentences.documents,
            examples=examples,
            lengths=lengths,
            slot=placed.slot,
            column=placed.columns(lengths),
            row_examples=placed.row_examples,
            statistics=statistics,
        )

    def _parts(self, plan: PairPlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        examples = ranges(plan.row_examples[rows], np.diff(plan.row_examples)[rows])
        of = plan.examples
        starts = np.concatenate([of.first_start[examples], of.second_start[examples]])
        lengths = np.concatenate([of.first_length[examples], of.second_length[examples]])
        return starts[lengths > 0], lengths[lengths > 0]

    def assemble(self, plan: PairPlan, tokens: np.ndarray, rows: np.ndarray, first_row: int) -> Batch:
        """Assemble a batch of these rows of a window, see `RowSource.assemble`."""
        count = np.diff(plan.row_examples)[rows]
        of = ranges(plan.row_examples[rows], count)
        batch = self.padding(len(rows))
        batch["row_ids"][:, 0] = plan.epoch
        batch["row_ids"][:, 1] = first_row + rows

        row = np.repeat(np.arange(len(rows)), count)
        slot, column = plan.slot[of], plan.column[of]
        batch["cls_positions"][row, slot] = column
        batch["next_sentence_labels"][row, slot] = np.where(plan.examples.random[of], RANDOM, IS_NEXT)
        batch["next_sentence_weights"][row, slot] = 1.0 if self.next_sentence else 0.0

        first, second, lengths = plan.examples.first_length[of], plan.examples.second_length[of], plan.lengths[of]
        start = row * self.sequence_length + column  # of each example, in the flattened batch
        places = ranges(start, lengths)
        batch["segment_ids"].reshape(-1)[places] = np.repeat(slot + 1, lengths)
        batch["position_ids"].reshape(-1)[places] = places - np.repeat(start, lengths)

        template = self.tokenizer.template
        first_at = start + len(template.before)
        between_at = first_at + first
        second_at = between_at + len(template.between) * self.next_sentence
        if template.second_type and self.next_sentence:
            of_second = places >= np.repeat(second_at, lengths)
            batch["token_type_ids"].reshape(-1)[places[of_second]] = template.second_type
        ids = batch["input_ids"].reshape(-1)
        ids[ranges(first_at, first)] = tokens[ranges(plan.examples.first_start[of], first)]
        ids[ranges(second_at, second)] = tokens[ranges(plan.examples.second_start[of], second)]
        special = [(start, template.before), (second_at + second, template.after)]
        if self.next_sentence:
            special.append((between_at, template.between))
        for where, some in special:
            for offset, token in enumerate(some):
                ids[where + offset] = token
        return batch

    def padding(self, rows: int) -> Batch:
        """Return a batch of rows without examples: all padding, all weights 0."""
        shape, slots = (rows, self.sequence_length), (rows, self.examples_per_row)
        return {
            "input_ids": np.full(shape, self.tokenizer.pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "row_ids": np.zeros((rows, 2), np.uint32),
            "cls_positions": np.zeros(slots, np.int32),
            "next_sentence_labels": np.zeros(slots, np.int32),
            "next_sentence_weights": np.zeros(slots, np.float32),
        }
