"""Rows of packed examples by their number: a pure function of (cache, seed, settings, number).

An epoch shuffles the documents and parts them into windows, some `window_tokens` tokens of whole documents each. A
window is planned from its sentence lengths (packing.py), its rows are shuffled, and they follow those of the window
before. Rows are numbered through all windows and epochs; a row's tokens are read only when it is asked for. What is
in memory is one window.

How many rows a window has is known when it is planned, so to find a row by its number alone all windows before it
must be planned (some 0.3 s each). A `Position` spares that: it names a row by number, epoch, window, and where these
began, so that a stream goes on, after a restart too, by planning one window.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import DataError
from ..packing import IS_NEXT, RANDOM, Examples, RandomStream, Statistics, pack, plan_pairs, plan_singles, ranges
from ..store import Split, TokenCache

Batch = dict[str, np.ndarray]
_SHUFFLE, _PLAN = 1, 2  # what a random stream is for
_PLANS_KEPT = 2
_RECORDS_AT_ONCE = 4096


@dataclass(frozen=True)
class Position:
    """Where a row is. All but `row` follow from it, and are carried to spare the planning of what lies before.

    `row` counts from the first row of epoch 0; `epoch_row` is the number of the epoch's first row, `window_row` of
    the window's.
    """

    row: int = 0
    epoch: int = 0
    epoch_row: int = 0
    window: int = 0
    window_row: int = 0


@dataclass(frozen=True)
class Plan:
    """The rows of one window. Example arrays are ordered by row, then by place in the row; [E].

    `documents` are those of the window; `row_examples` [R+1] is where each row's examples start; `slot` counts them
    within the row from 0 and `column` is where they start in it.
    """

    epoch: int
    window: int
    documents: np.ndarray
    examples: Examples
    lengths: np.ndarray
    slot: np.ndarray
    column: np.ndarray
    row_examples: np.ndarray
    statistics: Statistics

    @property
    def rows(self) -> int:
        return len(self.row_examples) - 1


class PretrainingDataset:
    """The rows that BERT is pretrained on, from a tokenised cache. Tokens are unmasked; masking is the step's.

    A batch of rows is a dictionary of arrays (B rows, L = `sequence_length`, X = `examples_per_row`):

        input_ids              [B, L] int32    [CLS] A [SEP] B [SEP], several examples one after another, then [PAD]
        segment_ids            [B, L] int32    1, 2, ... for the examples, 0 for padding position_ids           [B, L]
        int32    from 0 in each example token_type_ids         [B, L] int32    0 for [CLS] A [SEP], 1 for B [SEP]
        row_ids                [B, 2] uint32   (epoch, row within the epoch): never the same twice, except where
        `copies` says so cls_positions          [B, X] int32    where each example's [CLS] is next_sentence_labels
        [B, X] int32    0: B follows A, 1: B is random next_sentence_weights  [B, X] float32  1, and 0 where the row
        has no such example

    Args:
        cache: see `build_cache`. split: which documents, see `TokenCache.documents`. sequence_length: L, of every
        row. seed: of everything random here. copies: plan the corpus this many times, and then over again with the
        same row ids. Masks that depend on row ids alone
            then repeat too: static masking, as the original with its `dupe_factor`. None plans every epoch anew.
        examples_per_row: X; by default `sequence_length // 32`, at least 2. next_sentence: pairs of segments;
        otherwise one segment, and the next-sentence weights are all 0. short_fraction: of the examples, how many are
        made shorter at random. validation_fraction: of the documents, how many are held out. window_tokens: about how
        many of the corpus's tokens to plan and hold at once; 2 bytes each, and 50 more a sentence.

    Raises:
        DataError: fewer documents than pairs need (two on each side), a sequence length that holds no pair.
    """

    def __init__(
        self,
        cache: TokenCache,
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
        if copies is not None and copies < 1:
            raise DataError(f"{copies} copies of the corpus: expected at least 1, or none for dynamic masking.")
        if seed < 0:
            raise DataError(f"A seed of {seed}: expected 0 or more.")
        self.cache, self.split, self.sequence_length = cache, split, sequence_length
        self.seed, self.copies = seed, copies
        self.examples_per_row = max(2, sequence_length // 32) if examples_per_row is None else examples_per_row
        if self.examples_per_row < 1:
            raise DataError(f"{examples_per_row} examples a row: expected at least 1.")
        self.next_sentence, self.short_fraction, self.window_tokens = next_sentence, short_fraction, window_tokens
        self.documents = cache.documents(split, validation_fraction, least=2 if next_sentence else 1)
        self.tokens = int(cache.document_tokens[self.documents].sum())
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        self._plans: OrderedDict[tuple[int, int], Plan] = OrderedDict()
        self._statistics: dict[tuple[int, int], Statistics] = {}
        self._lock = threading.RLock()  # a prefetching thread plans too

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal: equal for two data sets with the same rows under the same numbers."""
        settings = [
            self.cache.fingerprint,
            self.sequence_length,
            self.seed,
            self.copies,
            self.examples_per_row,
            self.next_sentence,
            self.short_fraction,
            self.window_tokens,
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.documents.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    # --- planning -----------------------------------------------------------------------------------------------------

    def windows_in_epoch(self, epoch: int) -> int:
        return len(self._windows(epoch)[1]) - 1

    def plan(self, epoch: int, window: int) -> Plan:
        """The rows of one window. The last few plans are kept."""
        key = (self._planned_epoch(epoch), window)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
            else:
                self._plans[key] = self._plan(*key)
                self._statistics[key] = self._plans[key].statistics
                while len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return self._plans[key]

    def window_statistics(self, epoch: int, window: int) -> Statistics:
        """What the plan of a window makes of its documents. Those of all windows planned so far are kept."""
        found = self._statistics.get((self._planned_epoch(epoch), window))
        return self.plan(epoch, window).statistics if found is None else found

    def rows_in_window(self, epoch: int, window: int) -> int:
        return self.window_statistics(epoch, window).rows

    def rows_in_epoch(self, epoch: int = 0) -> int:
        """How many rows; plans every window of the epoch."""
        return sum(self.rows_in_window(epoch, window) for window in range(self.windows_in_epoch(epoch)))

    def statistics(self, epoch: int = 0, windows: int | None = 8) -> Statistics:
        """What the plan of an epoch makes of its documents: of its first `windows` windows, or of all with None.

        A window takes about half a second to plan; a corpus of less than `windows * window_tokens` tokens has no more.
        """
        count = self.windows_in_epoch(epoch)
        first = range(count if windows is None else min(windows, count))
        return sum((self.window_statistics(epoch, window) for window in first), Statistics(self.sequence_length))

    def statistics_so_far(self) -> Statistics:
        """The sum over every window that has been planned, by a stream of batches too."""
        with self._lock:
            return sum(self._statistics.values(), Statistics(self.sequence_length))

    def locate(self, row: int, start: Position | None = None) -> Position:
        """The position of a row, found from that of an earlier one by planning the windows between."""
        at = Position() if start is None or start.row > row else start
        while row >= (end := at.window_row + self.rows_in_window(at.epoch, at.window)):
            last = at.window + 1 == self.windows_in_epoch(at.epoch)
            if last:
                at = Position(end, at.epoch + 1, end, 0, end)
            else:
                at = replace(at, row=end, window=at.window + 1, window_row=end)
        return replace(at, row=row)

    def _planned_epoch(self, epoch: int) -> int:
        return epoch if self.copies is None else epoch % self.copies

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's documents in their order, and where its windows start in them, [W+1]."""
        epoch, found = self._planned_epoch(epoch), self._order
        if found is None or found[0] != epoch:
            order = self.documents[RandomStream(self.seed, _SHUFFLE, epoch).permutation(len(self.documents))]
            ends = np.cumsum(self.cache.document_tokens[order])
            count = max(1, round(self.tokens / self.window_tokens))
            wanted = np.searchsorted(ends, np.arange(1, count) * (self.tokens / count)) + 1
            least = 2 if self.next_sentence else 1
            starts = [0]
            for start in wanted.tolist():
                if start - starts[-1] >= least and len(order) - start >= least:
                    starts.append(start)
            self._order = found = (epoch, order, np.array([*starts, len(order)]))
        return found[1], found[2]

    def _plan(self, epoch: int, window: int) -> Plan:
        order, starts = self._windows(epoch)
        documents = order[starts[window] : starts[window + 1]]
        first = self.cache.document_sentences[documents]
        counts = self.cache.document_sentences[documents + 1] - first
        lengths = self.cache.sentence_lengths[ranges(first, counts)].astype(np.int64)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        random = RandomStream(self.seed, _PLAN, epoch, window)
        plan = plan_pairs if self.next_sentence else plan_singles
        examples = plan(lengths, bounds, self.sequence_length, self.short_fraction, random)

        packed, rows = pack(examples.lengths, self.sequence_length, self.examples_per_row)
        shuffled = random.permutation(rows)[packed]
        by_row = np.argsort(shuffled, kind="stable")
        examples = Examples(**{name: values[by_row] for name, values in vars(examples).items()})
        sizes = examples.lengths
        row_examples = np.concatenate([[0], np.cumsum(np.bincount(shuffled, minlength=rows))])
        held = np.diff(row_examples)
        starts_at = np.cumsum(sizes) - sizes
        statistics = Statistics(
            sequence_length=self.sequence_length,
            windows=1,
            documents=len(documents),
            sentences=len(lengths),
            source_tokens=int(lengths.sum()),
            examples=len(sizes),
            random_examples=int(examples.random.sum()),
            short_examples=int(examples.short.sum()),
            truncated_examples=int(np.count_nonzero(examples.truncated)),
            truncated_tokens=int(examples.truncated.sum()),
            dropped_examples=len(sizes) - int(held.sum()),
            rows=rows,
            tokens=int(sizes.sum()),
        )
        return Plan(
            epoch=epoch,
            window=window,
            documents=documents,
            examples=examples,
            lengths=sizes,
            slot=np.arange(len(sizes)) - np.repeat(row_examples[:-1], held),
            column=starts_at - np.repeat(starts_at[row_examples[:-1]], held),
            row_examples=row_examples,
            statistics=statistics,
        )

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_tokens(self, plan: Plan, rows: np.ndarray | None = None) -> np.ndarray:
        """A window's tokens end to end; [T] of the cache's dtype.

        With `rows`, only the records that these rows need are read, and the other tokens are 0.
        """
        first = self.cache.document_records[plan.documents]
        records = ranges(first, self.cache.document_records[plan.documents + 1] - first)
        ends = np.cumsum(self.cache.record_tokens[records], dtype=np.int64)
        wanted = np.arange(len(records)) if rows is None else self._records_of(plan, rows, ends)
        tokens = np.zeros(int(ends[-1]), self.cache.token_dtype)
        for some in np.array_split(wanted, 1 + len(wanted) // _RECORDS_AT_ONCE):
            for index, content in zip(some.tolist(), self.cache.read_records(records[some]), strict=True):
                tokens[ends[index] - len(content) : ends[index]] = content
        return tokens

    def _records_of(self, plan: Plan, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Which of a window's records the rows' examples lie in. `ends` is where each record ends in the window."""
        examples = ranges(plan.row_examples[rows], np.diff(plan.row_examples)[rows])
        of = plan.examples
        starts = np.concatenate([of.first_start[examples], of.second_start[examples]])
        lengths = np.concatenate([of.first_length[examples], of.second_length[examples]])
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        opened = np.bincount(np.searchsorted(ends, starts, side="right"), minlength=len(ends))
        closed = np.bincount(np.searchsorted(ends, starts + lengths - 1, side="right"), minlength=len(ends))
        return np.flatnonzero(np.cumsum(opened) - np.cumsum(closed) + closed)

    def assemble(self, plan: Plan, tokens: np.ndarray, rows: np.ndarray, first_row: int) -> Batch:
        """The batch of these rows of a window.

        Args:
            plan: of the window.
            tokens: of the window, see `read_tokens`.
            rows: [B] their numbers within the window.
            first_row: the number within the epoch of the window's first row.
        """
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
        start = row * self.sequence_length + column  # of each example, in the batch read as one line
        places = ranges(start, lengths)
        position = places - np.repeat(start, lengths)
        batch["segment_ids"].reshape(-1)[places] = np.repeat(slot + 1, lengths)
        batch["position_ids"].reshape(-1)[places] = position
        batch["token_type_ids"].reshape(-1)[places] = position >= np.repeat(first + 2, lengths)

        ids = batch["input_ids"].reshape(-1)
        ids[start] = self.cache.info.cls_id
        ids[start + 1 + first] = self.cache.info.sep_id
        ids[start + lengths - 1] = self.cache.info.sep_id
        sources = ranges(plan.examples.first_start[of], first), ranges(plan.examples.second_start[of], second)
        ids[ranges(start + 1, first)] = tokens[sources[0]]
        ids[ranges(start + 2 + first, second)] = tokens[sources[1]]
        return batch

    def padding(self, rows: int) -> Batch:
        """A batch of rows without an example: all padding, all weights 0."""
        shape, slots = (rows, self.sequence_length), (rows, self.examples_per_row)
        return {
            "input_ids": np.full(shape, self.cache.info.pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "row_ids": np.zeros((rows, 2), np.uint32),
            "cls_positions": np.zeros(slots, np.int32),
            "next_sentence_labels": np.zeros(slots, np.int32),
            "next_sentence_weights": np.zeros(slots, np.float32),
        }

    def row(self, number: int) -> Batch:
        """One row by its number, counted through all epochs; the arrays of a batch without their first axis.

        For looking at single rows: it reads a window for each. `batches` is the way to read many.
        """
        at = self.locate(number)
        plan = self.plan(at.epoch, at.window)
        rows = np.array([at.row - at.window_row])
        batch = self.assemble(plan, self.read_tokens(plan, rows), rows, at.window_row - at.epoch_row)
        return {name: values[0] for name, values in batch.items()}
