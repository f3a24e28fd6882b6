"""Pairs of sentences as rows for an encoder and a decoder: tokenised once, packed by lengths, addressed by number.

`build_pairs` writes a folder of flat arrays that are mapped, not read:

    source.bin, target.bin                ids of all sentences, one after another, without special ones; or, where the
                                          pieces are sampled anew in each epoch, the prepared texts (UTF-8)
    source_starts.npy, target_starts.npy  [P+1] int64: where each begins
    pairs.json                            what it was made from, and the counts

`TranslationRows` packs several pairs into a row, on both sides at once: a row of the encoder and the row of the
decoder of the same number hold the same pairs, so that segment ids keep encoder, decoder and cross attention to a pair.
An epoch shuffles the pairs and parts them into windows; a window is packed from its lengths alone, its rows are
shuffled and follow those of the window before. It is what `batches` and `evaluation_batches` of stream.py read from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.parallel import Pair
from ..errors import DataError
from ..packing import order_by_row, ranges
from ..progress import ProgressCallback, Reporter
from ..random import RandomStream
from ..tokenizers.pairs import PairTokenizer, sample
from .rows import Batch, WindowedRows

FORMAT_VERSION = 1
_PAIRS_AT_ONCE = 4096
_SHUFFLE, _PLAN = 1, 2  # what a random stream is for


@dataclass(frozen=True)
class PairCounts:
    """Statistics of a text. Tokens are those of the pairs that were kept, without special tokens."""

    pairs: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    unknown_tokens: int = 0
    longest_source: int = 0
    longest_target: int = 0


class PairStore:
    """Tokenised pairs on disk, see `build_pairs`."""

    def __init__(self, folder: Path):
        content = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
        self.folder, self.fingerprint, self.as_text = folder, content["fingerprint"], content["as_text"]
        self.counts = PairCounts(**content["counts"])
        self.notes: list[str] = content["notes"]
        kind = np.uint8 if self.as_text else np.dtype(content["dtype"])
        self._ids, self._starts = [], []
        for side in ("source", "target"):
            starts = np.load(folder / f"{side}_starts.npy", mmap_mode="r")
            flat = np.fromfile(folder / f"{side}.bin", kind) if not starts[-1] else None
            self._ids.append(np.memmap(folder / f"{side}.bin", kind, "r") if flat is None else flat)
            self._starts.append(np.asarray(starts))

    def __len__(self) -> int:
        return len(self._starts[0]) - 1

    def lengths(self, side: int, pairs: np.ndarray) -> np.ndarray:
        """[n] how many ids, or bytes of text, the side (0 source, 1 target) of each pair has."""
        starts = self._starts[side]
        return starts[pairs + 1] - starts[pairs]

    def read(self, side: int, pairs: np.ndarray) -> np.ndarray:
        """The ids or bytes of these pairs' side, one after another."""
        return self._ids[side][ranges(self._starts[side][pairs], self.lengths(side, pairs))]

    def texts(self, side: int, pairs: np.ndarray) -> list[str]:
        """The prepared texts of these pairs' side; only of a store that keeps text."""
        flat, ends = self.read(side, pairs).tobytes(), np.cumsum(self.lengths(side, pairs)).tolist()
        return [flat[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def build_pairs(
    text: Callable[[], Iterable[Pair]],
    tokenizer: PairTokenizer,
    root: str | Path,
    *,
    fingerprint: str,
    as_text: bool = False,
    notes: Callable[[], list[str]] = list,
    progress: ProgressCallback | None = None,
) -> PairStore:
    """Tokenise pairs into a folder below `root`, or open the one that holds them already.

    Args:
        text: gives the pairs.
        tokenizer: of both sides.
        root: folder of such folders.
        fingerprint: of the text.
        as_text: keep prepared texts, to be cut into pieces anew in each epoch.
        notes: what is to be said of the text, asked once it was read; kept with the pairs.
        progress: hears how far it is.
    """
    key = f"{FORMAT_VERSION} {fingerprint} {tokenizer.fingerprint} {as_text}"
    folder = Path(root) / hashlib.sha256(key.encode()).hexdigest()[:16]
    if (folder / "pairs.json").is_file():
        return PairStore(folder)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if max(tokenizer.source.size, tokenizer.target.size) <= 1 << 16 else np.uint32)
    report = Reporter("tokenising", "thousand pairs", progress)
    totals, longest, unknown, pairs = [0, 0], [0, 0], 0, 0
    lengths: list[list[np.ndarray]] = [[], []]
    sides = (tokenizer.source, tokenizer.target)
    with (unfinished / "source.bin").open("wb") as source, (unfinished / "target.bin").open("wb") as target:
        for some in _chunks(text()):
            for side, out in enumerate((source, target)):
                texts = [tokenizer.form.prepare(pair.target if side else pair.source, bool(side)) for pair in some]
                ids = sides[side].encode(texts)
                counts = np.array([len(tokens) for tokens in ids])
                totals[side] += int(counts.sum())
                longest[side] = max(longest[side], int(counts.max()))
                flat = np.fromiter((token for tokens in ids for token in tokens), dtype, int(counts.sum()))
                unknown += int((flat == sides[side].unk_id).sum())
                if as_text:
                    encoded = [prepared.encode() for prepared in texts]
                    out.write(b"".join(encoded))
                    counts = np.array([len(content) for content in encoded])
                else:
                    flat.tofile(out)
                lengths[side].append(counts)
            pairs += len(some)
            report(pairs / 1000, None)
    report(pairs / 1000, None, final=True)
    for name, parts in zip(("source", "target"), lengths, strict=True):
        counts = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        np.save(unfinished / f"{name}_starts.npy", np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
    content = {
        "fingerprint": hashlib.sha256(key.encode()).hexdigest()[:32],
        "as_text": as_text,
        "dtype": dtype.name,
        "counts": asdict(PairCounts(pairs, totals[0], totals[1], unknown, longest[0], longest[1])),
        "notes": notes(),
    }
    (unfinished / "pairs.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "pairs.json").is_file():  # else another run has just made the same one
            raise
        shutil.rmtree(unfinished)
    return PairStore(folder)


def _chunks(pairs: Iterable[Pair]) -> Iterable[list[Pair]]:
    some: list[Pair] = []
    for pair in pairs:
        some.append(pair)
        if len(some) == _PAIRS_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


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
            drawn = [self._sample(side, pairs, epoch) for side in (0, 1)]
            lengths = np.array([[len(ids) for ids in side] for side in drawn], np.int64) + 1
        else:
            lengths = np.stack([self.store.lengths(side, pairs) for side in (0, 1)]) + 1
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

    def _sample(self, side: int, pairs: np.ndarray, epoch: int) -> list[list[int]]:
        of = self.tokenizer.target if side else self.tokenizer.source
        texts = self.store.texts(side, pairs)
        return sample(of, texts, self.sampling, seed=self.seed, epoch=epoch, indexes=pairs.tolist(), role=side)

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_tokens(self, plan: PairPlan, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a window's pairs, in the plan's order, of both sides. All of them, whatever `rows` asks for."""
        return plan.sampled or (self.store.read(0, plan.pairs), self.store.read(1, plan.pairs))

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


def describe_pairs(store: PairStore, name: str) -> list[str]:
    """Describe a text that was read."""
    counts: Any = store.counts
    return [
        f"{name}: {counts.pairs:,} pairs, {counts.source_tokens:,} source and {counts.target_tokens:,} target tokens, "
        f"{counts.unknown_tokens:,} of them unknown; the longest {counts.longest_source} and {counts.longest_target}",
        *(f"{name}: {note}" for note in store.notes),
    ]
