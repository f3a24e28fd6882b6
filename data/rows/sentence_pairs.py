"""BERT's and ALBERT's rows: pairs of segments, planned from sentence lengths alone, and packed several per row.

Pairs are made as in BERT (Devlin et al. 2018, A.2) and its `create_pretraining_data.py`: whole sentences of one
document are collected up to a target length, and split at a random sentence boundary into A and B. Half of the time B
is replaced by sentences from a random place in another document, and the sentences left over start the next example.
Pairs that are too long for the row are truncated, token by token, in the longer segment, at a random end. The target
length is the full length, but random for `short_fraction` of the examples. There are two deliberate differences:

- the target length is drawn for each example; the script draws it once per document, which would cut a whole book into
  short examples;
- the other document is always a different one; the script tries ten times and may end up with the same one.

For sentence order (Lan et al. 2019, 3.1) B always follows A in the text, and half of the time the two are swapped. An
example of a single sentence, the last of its document or one as long as a row, has no order: it stays alone, without a
prediction. ALBERT's script gives it a B from another document and the label of swapped ones, a topic to recognise
instead of an order.

A plan is a list of references: start and length of the two segments of each example, in a window of documents. No
tokens are read for it, so that a plan is cheap and a pure function of its arguments.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np

from ..corpus.document_store import DocumentStore, Split
from ..errors import DataError
from ..packing import Statistics, order_by_row, pack, ranges
from ..random import RandomStream
from ..tokenizers.tokenizer import Tokenizer
from .documents import DocumentPlan, DocumentRows
from .rows import Batch

# What a pair's label says: whether B is random, or whether the two are swapped. Without a label: B always follows A, or
# there is only one segment.
Pairs = Literal["next", "order", "consecutive", "none"]
LABELS: dict[Pairs, str] = dict.fromkeys(("next", "consecutive", "none"), "next_sentence")
LABELS["order"] = "sentence_order"


@dataclass(frozen=True)
class Examples:
    """References of E examples, in the order of their first segments. Starts count tokens of the window.

    `second_length` is 0 for an example with one segment. `label` is true for a random B, or for swapped segments.
    `truncated` counts the tokens cut off both segments.
    """

    first_start: np.ndarray
    first_length: np.ndarray
    second_start: np.ndarray
    second_length: np.ndarray
    label: np.ndarray
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


def plan_ordered_pairs(
    lengths: np.ndarray,
    document_sentences: np.ndarray,
    most: int,
    short_fraction: float,
    random: RandomStream,
    swapped_fraction: float = 0.5,
) -> Examples:
    """Plan pairs of consecutive segments, some of them swapped. Arguments as for `plan_pairs`; D >= 1."""
    ends = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    bounds = document_sentences.tolist()
    starts, middles, stops, is_swapped, is_short = [], [], [], [], []
    draw = random.tuples(4)
    for document in range(len(bounds) - 1):
        sentence, stop = bounds[document], bounds[document + 1]
        while sentence < stop:
            short, short_target, part, coin = next(draw)
            target = 2 + int(short_target * (most - 1)) if short < short_fraction else most
            chunk = min(bisect_left(ends, ends[sentence] + target, sentence + 1, stop + 1), stop)
            count = chunk - sentence
            starts.append(ends[sentence])
            middles.append(ends[sentence + 1 + int(part * (count - 1))])
            stops.append(ends[chunk])
            is_swapped.append(count > 1 and coin < swapped_fraction)
            is_short.append(short < short_fraction)
            sentence = chunk
    start, middle, end = (np.array(some, np.int64) for some in (starts, middles, stops))
    swapped = np.array(is_swapped, np.bool_)
    return _truncated(
        np.where(swapped, middle, start),
        np.where(swapped, end - middle, middle - start),
        np.where(swapped, start, middle),
        np.where(swapped, middle - start, end - middle),
        swapped,
        np.array(is_short, np.bool_),
        most,
        random,
    )


def _truncated(
    first_start: np.ndarray,
    first_length: np.ndarray,
    second_start: np.ndarray,
    second_length: np.ndarray,
    label: np.ndarray,
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
        label,
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


PLANS = {
    "next": plan_pairs,
    "order": plan_ordered_pairs,
    "consecutive": partial(plan_ordered_pairs, swapped_fraction=0.0),
    "none": plan_singles,
}


def most_examples(sequence_length: int) -> int:
    """Return the maximum number of examples per row."""
    return max(2, sequence_length // 32)


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
        next_sentence_weights  [B, X] float32  1, or 0 if the row has no such example or it is no pair

    For sentence order, the last two are `sentence_order_labels` (0: in order, 1: swapped) and `sentence_order_weights`.

    Args:
        store: see `build_documents`.
        tokenizer: tokenizer of the corpus.
        split: split of the documents, see `DocumentStore.documents`.
        sequence_length: length of every row, L.
        seed: random seed.
        copies: number of different plans of the corpus, which then repeat with the same row ids. Masks that depend
            only on row ids then repeat too: static masking, as in the original with its `dupe_factor`. None makes a new
            plan in every epoch.
        examples_per_row: maximum number of examples per row, X; see `most_examples`.
        pairs: "next", pairs of segments for next sentence prediction; "order", pairs for sentence order prediction;
            "consecutive", pairs whose B always follows A, and all weights are 0; or "none", single segments, the same.
        short_fraction: fraction of the examples with a random, shorter target length.
        validation_fraction: fraction of the documents that is held out.
        window_tokens: approximate number of tokens to plan and hold in memory at once; 2 bytes per token and 50 per
            sentence.

    Raises:
        DataError: there are fewer documents than pairs need (two per split), no document has an order of sentences, or
            the sequence length is too short for a pair.
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
        pairs: Pairs = "next",
        short_fraction: float = 0.1,
        validation_fraction: float = 0.05,
        window_tokens: int = 8_000_000,
    ):
        if sequence_length < 8:
            raise DataError(
                f"A sequence length of {sequence_length}: too short for two sentences and three special tokens; take 8 "
                "or more."
            )
        self.examples_per_row = most_examples(sequence_length) if examples_per_row is None else examples_per_row
        if self.examples_per_row < 1:
            raise DataError(f"{examples_per_row} examples a row: expected at least 1.")
        self.pairs: Pairs = pairs
        self.short_fraction = short_fraction
        super().__init__(
            store,
            tokenizer,
            split,
            sequence_length=sequence_length,
            seed=seed,
            copies=copies,
            validation_fraction=validation_fraction,
            window_tokens=window_tokens,
            least_documents=2 if pairs == "next" else 1,
        )
        if pairs == "order" and np.diff(store.document_sentences)[self.documents].max() < 2:
            named = ", ".join(store.header.made_from["corpus"])
            raise DataError(
                f"{named}: each of the {len(self.documents)} documents of the {split} split has a single sentence, and "
                "the order of sentences needs two. Tell where one document ends (--blank-line), or learn without it "
                "(--objective mlm)."
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
            # As in stores of positions that know only the first two.
            {"next": True, "none": False}.get(self.pairs, self.pairs),
            self.short_fraction,
            self.window_tokens,
        ]
        return self._fingerprint(settings)

    def _make_plan(self, epoch: int, window: int) -> PairPlan:
        sentences, random = self._read_window(epoch, window)
        plan = PLANS[self.pairs]
        cost = self.tokenizer.template.cost
        most = self.sequence_length - cost(self.pairs != "none")
        examples = plan(sentences.lengths, sentences.document_sentences, most, self.short_fraction, random)
        lengths = examples.tokens + np.where(examples.second_length > 0, cost(True), cost(False))
        packed, rows = pack(lengths, self.sequence_length, self.examples_per_row)
        placed = order_by_row(random.permutation(rows)[packed], rows)
        examples = Examples(**{name: values[placed.examples] for name, values in vars(examples).items()})
        lengths = lengths[placed.examples]
        labelled = int(examples.label.sum())
        statistics = Statistics(
            sequence_length=self.sequence_length,
            windows=1,
            documents=len(sentences.documents),
            sentences=len(sentences.lengths),
            source_tokens=int(sentences.lengths.sum()),
            examples=len(lengths),
            random_examples=labelled if self.pairs == "next" else 0,
            swapped_examples=labelled if self.pairs == "order" else 0,
            lone_examples=int(np.count_nonzero(examples.second_length == 0)) if self.pairs == "order" else 0,
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
        first, second, lengths = plan.examples.first_length[of], plan.examples.second_length[of], plan.lengths[of]
        paired = second > 0
        batch[f"{LABELS[self.pairs]}_labels"][row, slot] = plan.examples.label[of]
        batch[f"{LABELS[self.pairs]}_weights"][row, slot] = paired & (self.pairs in ("next", "order"))

        start = row * self.sequence_length + column  # of each example, in the flattened batch
        places = ranges(start, lengths)
        batch["segment_ids"].reshape(-1)[places] = np.repeat(slot + 1, lengths)
        batch["position_ids"].reshape(-1)[places] = places - np.repeat(start, lengths)

        template = self.tokenizer.template
        first_at = start + len(template.before)
        between_at = first_at + first
        second_at = between_at + len(template.between) * paired
        if template.second_type:
            of_second = places >= np.repeat(np.where(paired, second_at, start + lengths), lengths)
            batch["token_type_ids"].reshape(-1)[places[of_second]] = template.second_type
        ids = batch["input_ids"].reshape(-1)
        ids[ranges(first_at, first)] = tokens[ranges(plan.examples.first_start[of], first)]
        ids[ranges(second_at, second)] = tokens[ranges(plan.examples.second_start[of], second)]
        special = [
            (start, template.before),
            (between_at[paired], template.between),
            (second_at + second, template.after),
        ]
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
            f"{LABELS[self.pairs]}_labels": np.zeros(slots, np.int32),
            f"{LABELS[self.pairs]}_weights": np.zeros(slots, np.float32),
        }
