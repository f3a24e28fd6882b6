"""Sentence pairs as rows for an encoder and a decoder: packed by the lengths of both sides, addressed by number.

`TranslationRows` packs several pairs per row, on both sides at once: the encoder's row and the decoder's row with the
same number contain the same pairs, so that segment ids restrict encoder, decoder and cross attention to a pair. An
epoch shuffles the pairs and divides them into windows; a window is packed from its lengths alone, and its rows are
shuffled and follow those of the previous window.
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

_SHUFFLE, _PLAN = 1, 2  # purposes of random streams


# --- packing ----------------------------------------------------------------------------------------------------------


def pack_pairs(source: np.ndarray, target: np.ndarray, source_capacity: int, target_capacity: int) -> np.ndarray:
    """Assign pairs to rows by best fit on both sides, longest first: each goes where it leaves the least room.

    Args:
        source: [P] lengths of the sources, at most the capacity.
        target: [P] lengths of the targets, at most the capacity.
        source_capacity: length of a source row.
        target_capacity: length of a target row.

    Returns:
        [P] row of each pair, from 0. No pair is split or left out.
    """
    rows = np.zeros(len(source), np.int64)
    size = np.maximum(source / source_capacity, target / target_capacity)
    # Open rows by their remaining room on the target side, and within that on the source side; in `rooms[t]` bit s
    # is set if there is a row with room s.
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
        if min(room) > 1:  # a pair takes at least two positions per side, or one for an empty text
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
    cut: int = 0
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
            f"left out{f'; {self.cut:,} cut' if self.cut else ''}"
        )


@dataclass(frozen=True)
class PairPlan:
    """The rows of one window. Pair arrays [P] are ordered by row, then by place in the row.

    `lengths` [2, P] count the ids, including one special token each, and `stored` [2, P] those of the store, of which a
    cut pair has only the first; `column` [2, P] is the start position of each in
    its row; `slot` counts within the row from 0; `row_pairs` [R+1] is the index of each row's first pair.
    """

    epoch: int
    window: int
    pairs: np.ndarray
    lengths: np.ndarray
    stored: np.ndarray
    column: np.ndarray
    slot: np.ndarray
    row_pairs: np.ndarray
    statistics: PairStatistics
    sampled: tuple[np.ndarray, np.ndarray] | None  # ids of both sides, if they were sampled for this plan

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_pairs) - 1


class TranslationRows(WindowedRows[PairPlan]):
    """Training rows of a translator. A batch (B rows; S and L, lengths of a source and a target row):

        input_ids, segment_ids, position_ids                          [B, S] int32   source, </s> after each
        decoder_input_ids, decoder_segment_ids, decoder_position_ids  [B, L] int32   the start token, then the target
        labels                                                        [B, L] int32   the target, then </s>
        label_weights                                                 [B, L] float32 1, or 0 for padding
        row_ids                                                       [B, 2] uint32  (epoch, row within the epoch)

    Args:
        store: the pairs; a store of texts if `sampling` is set.
        tokenizer: tokenizer of the pairs.
        source_length: length of a source row, S.
        target_length: length of a target row, L.
        start_id: first input of the decoder.
        seed: random seed of the order and of sampling.
        sampling: alpha of a unigram model, or the dropout rate of BPE merges; 0 for the single best segmentation.
        cut: whether to cut texts that are longer than a row, and count them, instead of leaving their pairs out.
        window_pairs: number of pairs that are packed together.

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
        cut: bool = False,
        window_pairs: int = 100_000,
    ):
        super().__init__()
        if bool(sampling) != store.as_text:
            raise DataError("Sampling pieces takes a store of texts, and no sampling one of ids.")
        self.store, self.tokenizer, self.start_id = store, tokenizer, start_id
        self.source_length, self.target_length = source_length, target_length
        self.seed, self.sampling, self.cut, self.window_pairs = seed, sampling, cut, window_pairs
        self._windows = max(1, round(len(store) / window_pairs))
        self._order: tuple[int, np.ndarray] | None = None
        if not self.rows_in_window(0, 0):
            raise DataError(
                f"No pair of sentences fits into rows of {source_length} source and {target_length} target tokens. "
                "Raise the lengths of the rows."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two data sets with the same rows under the same numbers."""
        settings = [
            self.store.fingerprint,
            self.source_length,
            self.target_length,
            self.start_id,
            self.seed,
            self.sampling,
            self.window_pairs,
            *(["cut"] if self.cut else []),
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    # --- planning -----------------------------------------------------------------------------------------------------

    def windows_in_epoch(self, epoch: int) -> int:
        """Return the number of windows per epoch, which is the same for every epoch."""
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
        stored, limits = lengths, np.array([[self.source_length], [self.target_length]])
        lengths = np.minimum(lengths, limits) if self.cut else lengths
        fits = (lengths[0] <= self.source_length) & (lengths[1] <= self.target_length)
        kept = np.flatnonzero(fits)
        lengths = lengths[:, kept]
        packed = pack_pairs(lengths[0], lengths[1], self.source_length, self.target_length)
        rows = int(packed.max()) + 1 if len(packed) else 0
        placed = order_by_row(RandomStream(self.seed, _PLAN, epoch, window).permutation(rows)[packed], rows)
        kept, lengths = kept[placed.examples], lengths[:, placed.examples]
        stored = stored[:, kept]
        sampled = None
        if drawn is not None:
            source, target = (
                np.fromiter((token for i in kept for token in side[i]), np.int32, int((length - 1).sum()))
                for side, length in zip(drawn, stored, strict=True)
            )
            sampled = (source, target)
        return PairPlan(
            epoch=epoch,
            window=window,
            pairs=pairs[kept],
            lengths=lengths,
            stored=stored,
            column=np.stack([placed.columns(side) for side in lengths]),
            slot=placed.slot,
            row_pairs=placed.row_examples,
            statistics=PairStatistics(
                self.source_length,
                self.target_length,
                pairs=len(kept),
                too_long=len(pairs) - len(kept),
                cut=int((stored > lengths).any(axis=0).sum()),
                rows=rows,
                source_tokens=int(lengths[0].sum()),
                target_tokens=int(lengths[1].sum()),
            ),
            sampled=sampled,
        )

    def _sample(self, pairs: np.ndarray, epoch: int) -> list[list[list[int]]]:
        """Sample a segmentation of both sides of these pairs for this epoch; return the ids."""
        key = {"seed": self.seed, "epoch": epoch, "indexes": pairs.tolist()}
        sides = (self.tokenizer.source, self.tokenizer.target)
        return [
            sample(of, texts, self.sampling, **key, role=role)
            for role, (of, texts) in enumerate(zip(sides, self.store.texts(pairs), strict=True))
        ]

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_tokens(self, plan: PairPlan, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read the ids of a window's pairs, in the plan's order, of both sides; always all of them, ignoring `rows`."""
        return plan.sampled or self.store.ids(plan.pairs)

    def assemble(
        self, plan: PairPlan, tokens: tuple[np.ndarray, np.ndarray], rows: np.ndarray, first_row: int
    ) -> Batch:
        """Assemble a batch of these rows of a window; `first_row` is the number of its first row within the epoch."""
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
            ends = np.cumsum(plan.stored[side] - 1)
            ids = tokens[side][ranges((ends - plan.stored[side] + 1)[of], lengths - 1)]
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
        """Return a batch of rows without pairs: all padding, all weights 0."""
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
