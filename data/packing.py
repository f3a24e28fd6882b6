"""BERT's examples, planned from sentence lengths alone, and packed several a row.

What is planned is a list of references: where in a window of documents the two segments of an example start, and how
long they are. No token is read for it, so a plan is cheap and a pure function of its arguments.

Pairs are made as in BERT (Devlin et al. 2018, A.2) and its `create_pretraining_data.py`: whole sentences of one
document are gathered up to a target length, and parted at a random sentence boundary into A and B. Half of the time B
is given up for sentences from a random place of another document, and the sentences so left over start the next
example. What is too long for the row is cut, token by token, from the longer segment, at a random end. The target is
the full length, but for `short_fraction` of the examples a random one. Two things differ, both with reason:

- the target is drawn for each example; the script draws it once a document, which would cut whole books to shreds;
- the other document is another one for certain; the script tries ten times and may end up in the same one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

IS_NEXT, RANDOM = 0, 1  # next_sentence_labels, as in the released checkpoints


@dataclass(frozen=True)
class Statistics:
    """What a plan made of its documents. Sums, so that those of several windows add up.

    `source_tokens` is what the documents hold, `tokens` what the rows hold, special tokens included: the random
    segments come on top of the documents, the truncated tokens go off. `dropped_examples` is there to be seen to be
    0.
    """

    sequence_length: int
    windows: int = 0
    documents: int = 0
    sentences: int = 0
    source_tokens: int = 0
    examples: int = 0
    random_examples: int = 0
    short_examples: int = 0
    truncated_examples: int = 0
    truncated_tokens: int = 0
    dropped_examples: int = 0
    rows: int = 0
    tokens: int = 0

    @property
    def packing_efficiency(self) -> float:
        """The share of the rows' positions that hold a real token."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0

    @property
    def truncated_fraction(self) -> float:
        """Of the tokens chosen for examples, the share that was cut off again."""
        return self.truncated_tokens / (self.tokens + self.truncated_tokens) if self.tokens else 0.0

    def __add__(self, other: Statistics) -> Statistics:
        if self.sequence_length != other.sequence_length:
            raise ValueError(
                f"Statistics of rows of {self.sequence_length} and of {other.sequence_length} do not add up."
            )
        names = [field.name for field in fields(self) if field.name != "sequence_length"]
        return Statistics(self.sequence_length, **{name: getattr(self, name) + getattr(other, name) for name in names})

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.source_tokens:,} tokens: {self.examples:,} examples in {self.rows:,} "
            f"rows of {self.sequence_length}, {self.packing_efficiency:.1%} full; "
            f"{self.random_examples / max(1, self.examples):.1%} with a random second segment; "
            f"{self.truncated_tokens:,} tokens ({self.truncated_fraction:.2%}) truncated, "
            f"{self.dropped_examples} examples dropped"
        )


@dataclass(frozen=True)
class Examples:
    """References of E examples, in the order of their first segments. Starts count tokens from the window's first one.

    `second_length` is 0 for an example of one segment. `truncated` counts the tokens cut off both segments.
    """

    first_start: np.ndarray
    first_length: np.ndarray
    second_start: np.ndarray
    second_length: np.ndarray
    random: np.ndarray
    short: np.ndarray
    truncated: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[E] tokens of each example, [CLS] and [SEP] included."""
        return self.first_length + self.second_length + np.where(self.second_length > 0, 3, 2)


class RandomStream:
    """Random numbers that are the same on every machine and in every version of NumPy.

    `Generator`'s methods may change between versions; a bit generator's raw output, which is all that is used here,
    may not.
    """

    def __init__(self, *key: int):
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def words(self, count: int) -> np.ndarray:
        """[count] uint64."""
        return self._bits.random_raw(count)

    def uniforms(self, count: int) -> np.ndarray:
        """[count] float64 in [0, 1)."""
        return (self.words(count) >> np.uint64(11)) * 2.0**-53

    def permutation(self, count: int) -> np.ndarray:
        """[count] int64."""
        return np.argsort(self.words(count), kind="stable")

    def tuples(self, size: int) -> Iterator[list[float]]:
        """Without end: `size` numbers in [0, 1) at a time."""
        while True:
            yield from self.uniforms(1024 * size).reshape(1024, size).tolist()

    def coins(self, counts: np.ndarray) -> np.ndarray:
        """How many heads in counts[i] tosses; [n] int64. Every toss is a bit: the distribution is exactly binomial."""
        result = np.zeros(len(counts), np.int64)
        tossed = np.flatnonzero(counts)
        if tossed.size:
            words_each = -(-counts[tossed] // 64)
            words = self.words(int(words_each.sum()))
            starts = np.cumsum(words_each) - words_each
            spare = (words_each * 64 - counts[tossed]).astype(np.uint64)
            words[starts] >>= spare
            result[tossed] = np.add.reduceat(np.bitwise_count(words), starts, dtype=np.int64)
        return result


def plan_pairs(
    lengths: np.ndarray,
    document_sentences: np.ndarray,
    sequence_length: int,
    short_fraction: float,
    random: RandomStream,
) -> Examples:
    """Pairs of segments for predicting the next sentence.

    Args:
        lengths: [S] tokens of each sentence, at least 1, document after document. document_sentences: [D+1] where
        each document's sentences start in `lengths`, and where the last one's end. D >= 2. sequence_length: of a row;
        an example has at most so many tokens, three special ones included. short_fraction: of the examples, how many
        aim at a random length from 2 up. random: what decides.
    """
    most = sequence_length - 3
    ends = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]  # ends[i] is where sentence i starts
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
    """Cut every pair to `most` tokens.

    The script's loop takes one token from the longer segment (from the second one if they are equal), at the front or
    the back by a coin's toss, until the pair fits. Here its outcome, with the same distribution.
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
    sequence_length: int,
    short_fraction: float,
    random: RandomStream,
) -> Examples:
    """Examples of one segment, without a next sentence to predict: as many whole sentences of a document as fit.

    A sentence longer than a row goes on in the next example, so that nothing is truncated. Arguments as in
    `plan_pairs`; D >= 1.
    """
    most = sequence_length - 2
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


def pack(lengths: np.ndarray, capacity: int, most: int) -> tuple[np.ndarray, int]:
    """Best fit, longest first: each example into the row that it leaves the least room in.

    Args:
        lengths: [E] of the examples, each at most `capacity`.
        capacity: positions in a row.
        most: examples in a row.

    Returns:
        [E] the row of each example, and the number of rows. No example is split and none is left out.
    """
    rows = np.zeros(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have left
    rooms = 0  # bit r is set where there is a row with room r
    held: list[int] = []
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(held)
            held.append(0)
        rows[example] = row
        held[row] += 1
        if held[row] < most and room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows, len(held)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + 1, ... lengths[0] of them, starts[1], ...]."""
    starts = np.asarray(starts, np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)
