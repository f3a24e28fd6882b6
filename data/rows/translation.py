"""Pairs of sentences as rows for an encoder and a decoder: packed by lengths on both sides, addressed by number.

`TranslationRows` packs several pairs into a row, on both sides at once: a row of the encoder and the row of the
decoder of the same number hold the same pairs, so that segment ids keep encoder, decoder and cross attention to a pair.
An epoch shuffles the pairs and parts them into windows; a window is packed from its lengths alone, its rows are
shuffled and follow those of the window before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ..corpus.pair_store import PairStore
from ..errors import DataError
from ..packing import order_by_row, ranges
from ..random import RandomStream
from ..tokenizers.pairs import PairTokenizer, sample
from .rows import Batch, WindowedRows

_SHUFFLE, _PLAN = 1, 2  # what a random stream is for


# --- packing ----------------------------------------------------------------------------------------------------------


def pack_pairs(source: np.ndarray, target: np.ndarray, source_capacity: int, target_capacity: int) -> np.ndarray:
    """Best fit on two sides: each pair, the longest first, into the row where it leaves the least room.

    Args:
        source, target: [P] lengths, at most the capacities.
        source_capacity, target_capacity: positions of a row.

    Returns:
        [P] the row of each pair, from 0. No pair is split and none is left out.
    """
    rows = np.zeros(len(source), np.int64)
    size = np.maximum(source / source_capacity, target / target_capacity)
    # Open rows by the room they have left on the target side, and on the source side within it; in `rooms[t]` bit s
    # is set where there is a row with room s.
    open_rows: dict[tuple[int, int], list[int]] = {}
    rooms = [0] * (target_capacity + 1)
    count = 0
    for pair in np.argsort(-size, kind="stable").tolist():
        needs, need = int(source[pair]), int(target[pair])
        best, room = None, (0, 0)
        for left in range(need, target_capacity + 1):
            fitting = rooms[left] >> needs
            if fitting:
                spare = (fitting & -fitting).bit_length() - 1
                if best is None or left - need + spare < best:
                    best, room = left - need + spare, (needs + spare, left)
            if best is not None and left + 1 - need >= best:
                break
        if best is None:
            row, room = count, (source_capacity, target_capacity)
            count += 1
        else:
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms[room[1]] ^= 1 << room[0]
        rows[pair] = row
        room = (room[0] - needs, room[1] - need)
        if min(room) > 1:  # a pair takes at least two positions a side but for an empty text's one
            kept = open_rows.setdefault(room, [])
            kept.append(row)
            rooms[room[1]] |= 1 << room[0]
    return rows


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of a plan of pairs, as sums, so that those of several windows add up. Lengths are those of rows."""

    source_length: int
    target_length: int
    pairs: int = 0
    too_long: int = 0
    rows: int = 0
    source_tokens: int = 0
    target_tokens: int = 0

    def __add__(self, other: PairStatistics) -> PairStatistics:
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if not field.name.endswith("length")
        }
        return PairStatistics(self.source_length, self.target_length, **sums)

    def __str__(self) -> str:
        rows = max(1, self.rows)
        return (
            f"{self.pairs:,} pairs in {self.rows:,} rows of {self.source_length} + {self.target_length}, "
            f"{self.source_tokens / (rows * self.source_length):.1%} and "
            f"{self.target_tokens / (rows * self.target_length):.1%} full; {self.too_long:,} pairs too long for a row, "
            "left out"
        )


@dataclass(frozen=True)
class PairPlan:
    """The rows of one window. Pair arrays are ordered by row, then by place in the row; [P].

    `lengths` [2, P] count the ids, one special each included; `column` [2, P] is where each starts in its row; `slot`
    counts within the row from 0; `row_pairs` [R+1] is where each row's pairs start.
    """

    epoch: int
    window: int
    pairs: np.ndarray
    lengths: np.ndarray
    column: np.ndarray
    slot: np.ndarray
    row_pairs: np.ndarray
    statistics: PairStatistics
    sampled: tuple[np.ndarray, np.ndarray] | None  # ids of both sides, where they were sampled for this plan

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.row_pairs) - 1


class TranslationRows(WindowedRows[PairPlan]):
    """The rows that a translator is trained on. A batch (B rows, S and L positions of a source and a target row):

        input_ids, segment_ids, position_ids                          [B, S] int32   source, </s> after each
        decoder_input_ids, decoder_segment_ids, decoder_position_ids  [B, L] int32   the start token, then the target
        labels                                                        [B, L] int32   the target, then </s>
        label_weights                                                 [B, L] float32 1, and 0 in padding
        row_ids                                                       [B, 2] uint32  (epoch, row within the epoch)

    Args:
        store: the pairs; one that keeps text where `sampling` is given.
        tokenizer: that they were tokenised with.
        source_length, target_length: of a row.
        start_id: the decoder's first input.
        seed: of the order and of the sampling.
        sampling: alpha of a unigram model, or the dropout of BPE merges; 0 takes the one best segmentation.
        window_pairs: how many pairs are packed together.

    Raises:
        DataError: no pair fits into a row.
    """

    def __init__(
        self,
        store: PairStore,
        tokenizer: PairTokenizer,
        *,
        source_length: int,
        target_length: int,
        start_id: int,
        seed: int = 0,
        sampling: float = 0.0,
        window_pairs: int = 100_000,
    ):
        super().__init__()
        if bool(sampling) != store.as_text:
            raise DataError("Sampling pieces takes a store of texts, and no sampling one of ids.")
        self.store, self.tokenizer, self.start_id = store, tokenizer, start_id
        self.source_length, self.target_length = source_length, target_length
        self.seed, self.sampling, self.window_pairs = seed, sampling, window_pairs
        self._windows = max(1, round(len(store) / window_pairs))
        self._order: tuple[int, np.ndarray] | None = None
        if not self.rows_in_window(0, 0):
            raise DataError(
                f"No pair of sentences fits into rows of {source_length} source and {target_length} target tokens. "
                "Raise --row-tokens."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal: equal for two data sets with the same rows under the same numbers."""
        settings = [
            self.store.fingerprint,
            self.source_length,
            self.target_length,
            self.start_id,
            self.seed,
            self.sampling,
            self.window_pairs,
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    # --- planning -----------------------------------------------------------------------------------------------------

    def windows_in_epoch(self, epoch: int) -> int:
        """Number of windows per epoch, the same for every epoch."""
        return self._windows

    def _window_pairs(self, epoch: int, window: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, RandomStream(self.seed, _SHUFFLE, epoch).permutation(len(self.store)))
        bounds = np.linspace(0, len(self.store), self._windows + 1).astype(np.int64)
        return self._order[1][bounds[window] : bounds[window + 1]]

    def _make_plan(self, epoch: int, window: int) -> PairPlan:
        pairs = self._window_pairs(epoch, window)
        drawn: list[list[list[int]]] | None = None
        if self.sampling:
            drawn = self._sample(pairs, epoch)
            lengths = np.array([[len(ids) for ids in side] for side in drawn], np.int64) + 1
        else:
            lengths = self.store.lengths(pairs) + 1
        fits = (lengths[0] <= self.source_length) & (lengths[1] <= self.target_length)
        kept = np.flatnonzero(fits)
        lengths = lengths[:, kept]
        packed = pack_pairs(lengths[0], lengths[1], self.source_length, self.target_length)
        rows = int(packed.max()) + 1 if len(packed) else 0
        placed = order_by_row(RandomStream(self.seed, _PLAN, epoch, window).permutation(rows)[packed], rows)
        kept, lengths = kept[placed.examples], lengths[:, placed.examples]
        sampled = None
        if drawn is not None:
            source, target = (
                np.fromiter((token for i in kept for token in side[i]), np.int32, int((length - 1).sum()))
                for side, length in zip(drawn, lengths, strict=True)
            )
            sampled = (source, target)
        return PairPlan(
            epoch=epoch,
            window=window,
            pairs=pairs[kept],
            lengths=lengths,
            column=np.stack([placed.columns(side) for side in lengths]),
            slot=placed.slot,
            row_pairs=placed.row_examples,
            statistics=PairStatistics(
                self.source_length,
                self.target_length,
                pairs=len(kept),
                too_long=len(pairs) - len(kept),
                rows=rows,
                source_tokens=int(lengths[0].sum()),
                target_tokens=int(lengths[1].sum()),
            ),
            sampled=sampled,
        )

    def _sample(self, pairs: np.ndarray, epoch: int) -> list[list[list[int]]]:
        """The ids of both sides of these pairs, cut into pieces anew for this epoch."""
        key = {"seed": self.seed, "epoch": epoch, "indexes": pairs.tolist()}
        sides = (self.tokenizer.source, self.tokenizer.target)
        return [
            sample(of, texts, self.sampling, **key, role=role)
            for role, (of, texts) in enumerate(zip(sides, self.store.texts(pairs), strict=True))
        ]

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_tokens(self, plan: PairPlan, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a window's pairs, in the plan's order, of both sides. All of them, whatever `rows` asks for."""
        return plan.sampled or self.store.ids(plan.pairs)

    def assemble(
        self, plan: PairPlan, tokens: tuple[np.ndarray, np.ndarray], rows: np.ndarray, first_row: int
    ) -> Batch:
        """The batch of these rows of a window; `first_row` is the number within the epoch of its first one."""
        count = np.diff(plan.row_pairs)[rows]
        of = ranges(plan.row_pairs[rows], count)
        row = np.repeat(np.arange(len(rows)), count)
        batch = self.padding(len(rows))
        batch["row_ids"][:, 0] = plan.epoch
        batch["row_ids"][:, 1] = first_row + rows
        for side, prefix, width in ((0, "", self.source_length), (1, "decoder_", self.target_length)):
            lengths = plan.lengths[side, of]
            start = row * width + plan.column[side, of]
            places = ranges(start, lengths)
            batch[f"{prefix}segment_ids"].reshape(-1)[places] = np.repeat(plan.slot[of] + 1, lengths)
            batch[f"{prefix}position_ids"].reshape(-1)[places] = places - np.repeat(start, lengths)
            ends = np.cumsum(plan.lengths[side] - 1)
            ids = tokens[side][ranges((ends - plan.lengths[side] + 1)[of], lengths - 1)]
            if side == 0:
                batch["input_ids"].reshape(-1)[ranges(start, lengths - 1)] = ids
                batch["input_ids"].reshape(-1)[start + lengths - 1] = self.tokenizer.source.eos_id
            else:
                batch["decoder_input_ids"].reshape(-1)[start] = self.start_id
                batch["decoder_input_ids"].reshape(-1)[ranges(start + 1, lengths - 1)] = ids
                batch["labels"].reshape(-1)[ranges(start, lengths - 1)] = ids
                batch["labels"].reshape(-1)[start + lengths - 1] = self.tokenizer.target.eos_id
                batch["label_weights"].reshape(-1)[places] = 1.0
        return batch

    def padding(self, rows: int) -> Batch:
        """A batch of rows without a pair: all padding, all weights 0."""
        source, target = (rows, self.source_length), (rows, self.target_length)
        return {
            "input_ids": np.full(source, self.tokenizer.source.pad_id, np.int32),
            "segment_ids": np.zeros(source, np.int32),
            "position_ids": np.zeros(source, np.int32),
            "decoder_input_ids": np.full(target, self.tokenizer.target.pad_id, np.int32),
            "decoder_segment_ids": np.zeros(target, np.int32),
            "decoder_position_ids": np.zeros(target, np.int32),
            "labels": np.full(target, self.tokenizer.target.pad_id, np.int32),
            "label_weights": np.zeros(target, np.float32),
            "row_ids": np.zeros((rows, 2), np.uint32),
        }
