"""Fine-tuning's examples: encoded features, and batches of a fixed number of them in packed rows of few shapes.

A *feature* is what gets a [CLS] of its own: a sentence or a pair, a window of a long text, one choice of a question. A
*unit* is what is drawn: one feature, or the `unit_size` features of a question that must stand in one row.

A batch always holds the same number of units. Which ones is drawn as in stratified sampling: an epoch's units, in
random order, are sorted by length and cut into as many strata as a batch has units, and every batch takes one unit of
each stratum at random. So every batch has its share of the long and of the short ones, the number of tokens hardly
varies, and one compiled shape with little padding serves the whole run. Everything is a pure function of (lengths,
seed, epoch): the state of an iterator is the number of batches done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError
from .packing import pack
from .random import RandomStream

Batch = dict[str, np.ndarray]

ATTENTION_SHARE = 1024
"""Row length at which attention costs as much as everything else: what the choice of a row length weighs."""
COMPILATION = 16
"""Steps that compiling one more shape is worth."""
TRIED = 256
"""Batches that a row length is chosen by."""
PREDICTION_ROWS = 32
"""Rows of a batch for prediction, at most."""
SHORTEST_ROW = 64
"""Tokens of a row for prediction, at least."""


@dataclass(frozen=True)
class Features:
    """F encoded features, T tokens together.

    Attributes:
        input_ids: [T] int32 one feature after the other, special tokens included.
        token_type_ids: [T] int32.
        starts: [F + 1] int64 where each feature begins.
        example: [F] int64 the number of the example that each was made of.
        segment_fields: name -> values of each feature, [F, ...].
        token_fields: name -> values of each token, [T, ...].
        unit_size: features that stay together.
        truncated: tokens that were cut off.
        note: what else is to be said of them.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    starts: np.ndarray
    example: np.ndarray
    segment_fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    unit_size: int = 1
    truncated: int = 0
    note: str = ""

    @property
    def count(self) -> int:
        """F."""
        return len(self.starts) - 1

    @property
    def units(self) -> int:
        """Number of units."""
        return self.count // self.unit_size

    @cached_property
    def lengths(self) -> np.ndarray:
        """[F] tokens of each feature."""
        return np.diff(self.starts)

    @cached_property
    def unit_lengths(self) -> np.ndarray:
        """[units] tokens of each unit."""
        return self.lengths.reshape(-1, self.unit_size).sum(axis=1)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; another one for other tokens, labels or units."""
        digest = hashlib.sha256(str(self.unit_size).encode())
        arrays = {"": self.input_ids, "types": self.token_type_ids, "starts": self.starts}
        for name, values in {**arrays, **self.segment_fields, **self.token_fields}.items():
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:32]


def pack_features(
    ids: Sequence[Sequence[int] | np.ndarray],
    types: Sequence[Sequence[int] | np.ndarray],
    *,
    example: Sequence[int] | np.ndarray | None = None,
    segment_fields: Mapping[str, Any] | None = None,
    token_fields: Mapping[str, Any] | None = None,
    unit_size: int = 1,
    truncated: int = 0,
) -> Features:
    """Features from lists, one entry a feature.

    Args:
        ids, types: tokens and token types of each feature.
        example: number of the example that each was made of; None for one feature an example.
        segment_fields: name -> a value a feature.
        token_fields: name -> the values of each feature's tokens, as many as it has tokens.
        unit_size: features that share a row and stand next to each other.
        truncated: tokens that were cut off.
    """
    starts = np.concatenate([[0], np.cumsum([len(some) for some in ids], dtype=np.int64)])
    if len(ids) % unit_size:
        raise ValueError(f"{len(ids)} features do not make units of {unit_size}")
    return Features(
        _joined(ids, np.int32),
        _joined(types, np.int32),
        starts,
        np.arange(len(ids)) if example is None else np.asarray(example, np.int64),
        {name: np.asarray(values) for name, values in (segment_fields or {}).items()},
        {name: _joined(values, None) for name, values in (token_fields or {}).items()},
        unit_size,
        truncated,
    )


def _joined(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype) for part in parts]) if len(parts) else np.zeros(0, dtype or np.int32)


# --- which units make a batch -----------------------------------------------------------------------------------------


def batches_in_epoch(units: int, batch: int) -> int:
    """Batches that `units` units make; the last one may be smaller."""
    return -(-units // batch)


def epoch_batches(unit_lengths: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """The units of every batch of an epoch, each exactly once.

    Args:
        unit_lengths: [U] tokens of each unit.
        batch: units of a batch.
        seed, epoch: what decides.

    Returns:
        [S, batch] int64; -1 fills up the smaller batch, which is as likely to be any of the epoch.
    """
    units = len(unit_lengths)
    count = batches_in_epoch(units, batch)
    random = RandomStream(seed, epoch)
    order = random.permutation(units)
    order = order[np.argsort(unit_lengths[order], kind="stable")]
    # What is missing comes out of strata spread over all lengths, so that the smaller batch is no batch of short ones.
    missing = count * batch - units
    gaps = np.zeros(batch, bool)
    gaps[(np.arange(missing) * batch) // max(missing, 1)] = True
    stratum_sizes = count - gaps.astype(np.int64)
    table = np.full((batch, count), -1, np.int64)
    at = 0
    for stratum, size in enumerate(stratum_sizes.tolist()):
        table[stratum, :size] = order[at : at + size][random.permutation(size)]
        at += size
    return table.T[random.permutation(count)]


class Shapes(NamedTuple):
    """The shapes of a run's batches."""

    length: int  # L, of every row
    slots: int  # X, features of a row at most, a multiple of the unit size
    rows: tuple[int, ...]  # B, ascending: a batch has the least of these that holds it


def plan_shapes(
    unit_lengths: np.ndarray,
    unit_size: int,
    *,
    batch: int,
    seed: int,
    epochs: int,
    positions: int,
    divisor: int = 1,
    multiple: int = 8,
) -> Shapes:
    """The row length and the few numbers of rows that a run computes least with.

    Every batch of the run is packed in each candidate length; what counts is the area, attention's share in it, which
    grows with the row's length, and a price for every shape that has to be compiled. Beside it, rows of the longest
    unit's length in one shape compute 4 % more on MRPC, 12 % on CoLA, 7 % on STS-B and 11 % on SQuAD.

    Args:
        unit_lengths, batch, seed: as in `epoch_batches`.
        epochs: of the run.
        positions: longest row that the model takes.
        divisor: what the number of rows must be a multiple of.
        multiple: what the row length must be a multiple of, where the model takes rows that long.

    Raises:
        DataError: a unit is longer than a row can be.
    """
    longest = _longest(unit_lengths, positions)
    most = max(1, 256 // unit_size)
    plans = [units for epoch in range(epochs) for units in epoch_batches(unit_lengths, batch, seed, epoch)]
    whole = int(unit_lengths.sum()) * batch // len(unit_lengths)  # tokens of a usual batch
    tried = plans[:: -(-len(plans) // TRIED)]

    def price(length: int) -> float:
        counts, _ = _rows_needed(unit_lengths, tried, batch, length, most)
        return _menu(counts, divisor, len(plans) / len(tried))[1] * length * (1 + length / ATTENTION_SHARE)

    length = min(_candidate_lengths(longest, whole, positions, multiple), key=price)
    counts, filled = _rows_needed(unit_lengths, plans, batch, length, most)
    return Shapes(length, filled * unit_size, _menu(counts, divisor, 1.0)[0])


def _rows_needed(
    unit_lengths: np.ndarray, plans: list[np.ndarray], batch: int, length: int, most: int
) -> tuple[np.ndarray, int]:
    """[batch + 1] how many batches need so many rows, and how many units the fullest row has."""
    counts = np.zeros(batch + 1, np.int64)
    filled = 1
    for units in plans:
        rows, needed = pack(unit_lengths[units[units >= 0]], length, most)
        counts[needed] += 1
        filled = max(filled, int(np.bincount(rows).max()))
    return counts, filled


def _candidate_lengths(longest: int, whole: int, positions: int, multiple: int) -> list[int]:
    """From the longest unit up, to a whole batch in a row or the model's limit."""
    first = min(_round_up(longest, multiple), positions)
    last = max(first, min(positions, _round_up(whole, multiple), 4 * first))
    return [*range(first, last, multiple), last]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _menu(counts: np.ndarray, divisor: int, share: float) -> tuple[tuple[int, ...], float]:
    """The sizes to compile for batches of which counts[r] need r rows, and the rows computed in all, as a price.

    Each of the batches stands for `share` of them.
    """
    needed = np.flatnonzero(counts)
    sizes = sorted({_round_up(int(size), divisor) for size in needed})
    per_size = [int(counts[[n for n in needed if _round_up(int(n), divisor) == size]].sum()) for size in sizes]
    # Best menu that ends with each size: the sizes between two neighbours of the menu are rounded up to the larger.
    price = COMPILATION / share
    best: list[tuple[float, tuple[int, ...]]] = []
    for end, size in enumerate(sizes):
        options = []
        for before in range(-1, end):
            total, menu = best[before] if before >= 0 else (0.0, ())
            options.append((total + size * (sum(per_size[before + 1 : end + 1]) + price), (*menu, size)))
        best.append(min(options))
    return best[-1][1], best[-1][0]


# --- batches ----------------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """Features in rows."""

    batch: Batch
    features: np.ndarray  # [B, X] int64, the feature in each slot, -1 for none


def assemble(
    features: Features,
    units: np.ndarray,
    row_of: np.ndarray,
    rows: range,
    *,
    length: int,
    slots: int,
    pad_id: int,
) -> Placed:
    """The arrays of some rows of a batch.

    Args:
        features: all of them.
        units: [n] the batch's units.
        row_of: [n] the row of each.
        rows: the rows wanted; those that no unit is in come out as padding.
        length: L.
        slots: X.
        pad_id: the token that fills up.

    Returns:
        input_ids, segment_ids, position_ids, token_type_ids [B, L] int32; cls_positions [B, X] int32, segment_weights
        [B, X] float32, the segment fields [B, X, ...] and the token fields [B, L, ...].
    """
    size = features.unit_size
    mine = np.flatnonzero((row_of >= rows.start) & (row_of < rows.stop))
    mine = mine[np.argsort(row_of[mine], kind="stable")]
    numbers = (units[mine, None] * size + np.arange(size)).reshape(-1)  # features, row after row
    row = np.repeat(row_of[mine] - rows.start, size)
    first = np.searchsorted(row, np.arange(len(rows)))  # where each row begins in `numbers`
    slot = np.arange(len(numbers)) - first[row]
    lengths = features.lengths[numbers]
    ends = np.cumsum(lengths)
    base = np.concatenate([[0], ends])[first]  # tokens before each row
    column = ends - lengths - base[row]  # where in its row each feature begins
    token_row, token_slot = np.repeat(row, lengths), np.repeat(slot, lengths)
    within = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
    at = token_row, np.repeat(column, lengths) + within
    source = np.repeat(features.starts[numbers], lengths) + within

    shape, slotted = (len(rows), length), (len(rows), slots)
    batch: Batch = {"input_ids": np.full(shape, pad_id, np.int32)}
    batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "position_ids", "token_type_ids")}
    batch["input_ids"][at] = features.input_ids[source]
    batch["segment_ids"][at] = token_slot + 1
    batch["position_ids"][at] = within
    batch["token_type_ids"][at] = features.token_type_ids[source]
    batch["cls_positions"] = np.zeros(slotted, np.int32)
    batch["cls_positions"][row, slot] = column
    batch["segment_weights"] = np.zeros(slotted, np.float32)
    batch["segment_weights"][row, slot] = 1
    for name, values in features.segment_fields.items():
        batch[name] = np.zeros((*slotted, *values.shape[1:]), values.dtype)
        batch[name][row, slot] = values[numbers]
    for name, values in features.token_fields.items():
        batch[name] = np.zeros((*shape, *values.shape[1:]), values.dtype)
        batch[name][at] = values[source]
    placed = np.full(slotted, -1, np.int64)
    placed[row, slot] = numbers
    return Placed(batch, placed)


class TrainingBatches:
    """Batches without end, epoch after epoch; the state is the number of batches done, as JSON.

    Args:
        features: what is drawn from.
        batch: units of a batch.
        shapes: from `plan_shapes`, for the same features, batch and seed.
        seed: of the order.
        pad_id: the token that fills up.
        index, count: this process's share of the rows.
    """

    def __init__(
        self,
        features: Features,
        *,
        batch: int,
        shapes: Shapes,
        seed: int,
        pad_id: int,
        index: int = 0,
        count: int = 1,
    ):
        self._features, self._batch, self._shapes, self._seed, self._pad_id = features, batch, shapes, seed, pad_id
        self._index, self._count = index, count
        self._done = 0
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return batches_in_epoch(self._features.units, self._batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, number = divmod(self._done, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, epoch_batches(self._features.unit_lengths, self._batch, self._seed, epoch)
        units = self._epoch[1][number]
        units = units[units >= 0]
        length, slots, sizes = self._shapes
        row_of, needed = pack(self._features.unit_lengths[units], length, slots // self._features.unit_size)
        share = next(size for size in sizes if size >= needed) // self._count
        rows = range(self._index * share, (self._index + 1) * share)
        self._done += 1
        return assemble(self._features, units, row_of, rows, length=length, slots=slots, pad_id=self._pad_id).batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs."""
        return {"features": self._features.fingerprint, "done": self._done}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was.

        Raises:
            DataError: it read other data.
        """
        if state["features"] != self._features.fingerprint:
            raise DataError(
                "The saved position belongs to other data: the training file, its labels, the tokenizer or the "
                "length has changed. Start a new run, or put them back."
            )
        self._done = int(state["done"])


def prediction_batches(features: Features, *, pad_id: int, positions: int, divisor: int = 1) -> Iterator[Placed]:
    """All features once, in few shapes: rows of a power of two tokens, and a power of two rows a batch.

    Args:
        features: to be predicted.
        pad_id: the token that fills up.
        positions: longest row that the model takes.
        divisor: what the number of rows must be a multiple of.

    Raises:
        DataError: a unit is longer than a row can be.
    """
    if not features.count:
        return
    longest = _longest(features.unit_lengths, positions)
    length = min(positions, max(SHORTEST_ROW, 1 << (longest - 1).bit_length()))
    most = max(1, length // 8 // features.unit_size)
    row_of, needed = pack(features.unit_lengths, length, most)
    batch = _round_up(min(PREDICTION_ROWS, 1 << (needed - 1).bit_length()), divisor)
    order = np.argsort(row_of, kind="stable")
    for first in range(0, needed, batch):
        here = order[np.searchsorted(row_of[order], first) : np.searchsorted(row_of[order], first + batch)]
        yield assemble(
            features,
            here,
            row_of[here],
            range(first, first + batch),
            length=length,
            slots=most * features.unit_size,
            pad_id=pad_id,
        )


def _longest(unit_lengths: np.ndarray, positions: int) -> int:
    longest = int(unit_lengths.max())
    if longest > positions:
        raise DataError(
            f"An example has {longest} tokens, and a row of this model at most {positions}. Lower --max-length."
        )
    return longest
