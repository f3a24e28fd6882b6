"""Features for fine-tuning, and batches of a fixed number of them in packed rows of few shapes.

A *feature* is one encoded input with its own [CLS]: a sentence or a pair, a window of a long text, one choice of a
question. A *unit* is what is sampled: one feature, or the `unit_size` features of a question, which share a row.

Every batch has the same number of units, chosen by stratified sampling: an epoch's units, in random order, are sorted
by length and cut into as many strata as a batch has units, and every batch takes one random unit of each stratum. Every
batch thus has a similar mix of long and short units, the number of tokens hardly varies, and one compiled shape with
little padding serves the whole run. If the units do not divide, the last batch of an epoch has fewer. Everything is a
pure function of (lengths, seed, epoch): the state of an iterator is the number of units done.
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
"""Row length at which attention costs as much as everything else; used for choosing the row length."""
COMPILATION = 16
"""Cost of compiling one more shape, in steps."""
TRIED = 256
"""Number of batches to try when choosing the row length."""
PREDICTION_ROWS = 32
"""Maximum number of rows per batch for prediction."""
SHORTEST_ROW = 64
"""Minimum row length for prediction, in tokens."""


@dataclass(frozen=True)
class Features:
    """F encoded features with T tokens in total.

    Attributes:
        input_ids: [T] int32, the features' tokens, concatenated, special tokens included.
        token_type_ids: [T] int32.
        starts: [F + 1] int64, start of each feature.
        example: [F] int64, number of the example that each feature was made from.
        segment_fields: name -> values of each feature, [F, ...].
        token_fields: name -> values of each token, [T, ...].
        unit_size: features that stay together.
        truncated: number of truncated tokens.
        note: a remark for the user.
        computed: name of a token field that another model computes -> what determines it. The fingerprint is of this,
            since the values may differ in their last bits on another machine.
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
    computed: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of features, F."""
        return len(self.starts) - 1

    @property
    def units(self) -> int:
        """Number of units."""
        return self.count // self.unit_size

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each feature, in tokens: [F]."""
        return np.diff(self.starts)

    @cached_property
    def unit_lengths(self) -> np.ndarray:
        """Length of each unit, in tokens: [units]."""
        return self.lengths.reshape(-1, self.unit_size).sum(axis=1)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; it differs if tokens, labels or units differ."""
        digest = hashlib.sha256(str(self.unit_size).encode())
        arrays = {"": self.input_ids, "types": self.token_type_ids, "starts": self.starts}
        for name, values in {**arrays, **self.segment_fields, **self.token_fields}.items():
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(self.computed[name].encode() if name in self.computed else np.ascontiguousarray(values).data)
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
    """Build features from lists with one entry per feature.

    Args:
        ids: token ids of each feature.
        types: token types of each feature.
        example: number of each feature's example; None for one feature per example.
        segment_fields: name -> one value per feature.
        token_fields: name -> for each feature, one value per token.
        unit_size: number of adjacent features that share a row.
        truncated: number of truncated tokens.
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
    """Return the number of batches for `units` units; one of them may be smaller."""
    return -(-units // batch)


def epoch_batches(
    unit_lengths: np.ndarray, batch: int, seed: int, epoch: int, *, smaller_last: bool = True
) -> np.ndarray:
    """Assign the units of an epoch to batches, each exactly once.

    Args:
        unit_lengths: [U] length of each unit, in tokens.
        batch: units per batch.
        seed: random seed.
        epoch: number of the epoch.
        smaller_last: whether the smaller batch is the last one; else any, as in earlier versions.

    Returns:
        [S, batch] int64; the smaller batch is filled up with -1.
    """
    units = len(unit_lengths)
    count = batches_in_epoch(units, batch)
    random = RandomStream(seed, epoch)
    order = random.permutation(units)
    order = order[np.argsort(unit_lengths[order], kind="stable")]
    # Leave gaps in strata of all lengths, so that the smaller batch does not consist of short units only.
    missing = count * batch - units
    gaps = np.zeros(batch, bool)
    gaps[(np.arange(missing) * batch) // max(missing, 1)] = True
    stratum_sizes = count - gaps.astype(np.int64)
    table = np.full((batch, count), -1, np.int64)
    at = 0
    for stratum, size in enumerate(stratum_sizes.tolist()):
        table[stratum, :size] = order[at : at + size][random.permutation(size)]
        at += size
    if missing and smaller_last:  # all gaps are in the table's last column
        return table.T[[*random.permutation(count - 1), count - 1]]
    return table.T[random.permutation(count)]


class Shapes(NamedTuple):
    """Shapes of a run's batches."""

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
    """Choose the row length, and the few numbers of rows, with which a run computes least.

    Batches of the run are packed at each candidate length. The cost is the area, plus attention's part, which grows
    with the row length, plus the cost of every shape that has to be compiled. Beside it, rows of the longest unit's
    length in one shape compute 4 % more on MRPC, 12 % on CoLA, 7 % on STS-B and 11 % on SQuAD.

    Args:
        unit_lengths: as in `epoch_batches`.
        batch: as in `epoch_batches`.
        seed: as in `epoch_batches`.
        epochs: number of epochs of the run.
        positions: longest row that the model supports.
        divisor: number of which the number of rows must be a multiple.
        multiple: number of which the row length must be a multiple, as far as the model supports it.

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
    """Return the number of batches that need 0, 1, ... rows, [batch + 1], and the most units in a row."""
    counts = np.zeros(batch + 1, np.int64)
    filled = 1
    for units in plans:
        rows, needed = pack(unit_lengths[units[units >= 0]], length, most)
        counts[needed] += 1
        filled = max(filled, int(np.bincount(rows).max()))
    return counts, filled


def _candidate_lengths(longest: int, whole: int, positions: int, multiple: int) -> list[int]:
    """Return candidate lengths, from the longest unit up to a whole batch in one row or the model's limit."""
    first = min(_round_up(longest, multiple), positions)
    last = max(first, min(positions, _round_up(whole, multiple), 4 * first))
    return [*range(first, last, multiple), last]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _menu(counts: np.ndarray, divisor: int, share: float) -> tuple[tuple[int, ...], float]:
    """Choose the batch sizes to compile, where counts[r] batches need r rows; also return the cost in rows.

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
    """Features placed in rows."""

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
    """Assemble the arrays of some rows of a batch.

    Args:
        features: all features.
        units: [n] units of the batch.
        row_of: [n] row of each unit.
        rows: the rows to assemble; rows without units become padding.
        length: row length, L.
        slots: number of segment slots per row, X.
        pad_id: id of the padding token.

    Returns:
        input_ids, segment_ids, position_ids, token_type_ids and feature_ids, the number of each token's feature, [B, L]
        int32; cls_positions [B, X] int32, segment_weights [B, X] float32, the segment fields [B, X, ...] and the token
        fields [B, L, ...].
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
    names = ("segment_ids", "position_ids", "token_type_ids", "feature_ids")
    batch |= {name: np.zeros(shape, np.int32) for name in names}
    batch["input_ids"][at] = features.input_ids[source]
    batch["segment_ids"][at] = token_slot + 1
    batch["position_ids"][at] = within
    batch["token_type_ids"][at] = features.token_type_ids[source]
    batch["feature_ids"][at] = np.repeat(numbers, lengths)
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
    """Iterate over batches endlessly, epoch after epoch; the state is the number of units done, as JSON.

    Args:
        features: the features.
        batch: units per batch.
        shapes: from `plan_shapes`, for the same features, batch and seed.
        seed: seed of the order.
        pad_id: id of the padding token.
        index: index of this process's part of the rows.
        count: number of parts.
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
        self._done = 0  # batches
        self._smaller_last = True
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        """Number of batches per epoch."""
        return batches_in_epoch(self._features.units, self._batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, number = divmod(self._done, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            order = epoch_batches(
                self._features.unit_lengths, self._batch, self._seed, epoch, smaller_last=self._smaller_last
            )
            self._epoch = epoch, order
        units = self._epoch[1][number]
        units = units[units >= 0]
        length, slots, sizes = self._shapes
        row_of, needed = pack(self._features.unit_lengths[units], length, slots // self._features.unit_size)
        share = next(size for size in sizes if size >= needed) // self._count
        rows = range(self._index * share, (self._index + 1) * share)
        self._done += 1
        return assemble(self._features, units, row_of, rows, length=length, slots=slots, pad_id=self._pad_id).batch

    def get_state(self) -> dict[str, Any]:
        """Return the state for `set_state`."""
        state: dict[str, Any] = {"features": self._features.fingerprint, "dropout": "by example"}
        if not self._smaller_last:
            return {**state, "done": self._done}
        epoch, number = divmod(self._done, self.per_epoch)
        done = epoch * self._features.units + number * self._batch
        return {**state, "examples": done, "batch": self._batch, "seed": self._seed}

    def set_state(self, state: Mapping[str, Any]) -> str | None:
        """Continue from a saved state; return a remark for the user, if there is one.

        Raises:
            DataError: the state belongs to other data, or to batches of another size or seed.
        """
        if state["features"] != self._features.fingerprint:
            raise DataError(
                "The saved position belongs to other data: the training file, its labels, the tokenizer or the "
                "length has changed. Start a new run, or put them back."
            )
        if "examples" in state:
            if (state["batch"], state["seed"]) != (self._batch, self._seed):
                raise DataError(
                    f"The saved position is in batches of {state['batch']} examples in the order of seed "
                    f"{state['seed']}. With batches of {self._batch} and seed {self._seed}, the rest of the epoch "
                    "would repeat some examples and miss others. Give the same --batch-size and --seed, or start from "
                    "the weights alone."
                )
            epoch, within = divmod(int(state["examples"]), self._features.units)
            self._done, self._smaller_last = epoch * self.per_epoch + within // self._batch, True
        else:  # of an earlier version, whose order is kept
            self._done, self._smaller_last = int(state["done"]), False
        self._epoch = None
        if "dropout" not in state:
            return "this run began with a version that drew dropout by row: from here on it is drawn by example"
        return None


def prediction_batches(features: Features, *, pad_id: int, positions: int, divisor: int = 1) -> Iterator[Placed]:
    """Yield all features once, in few shapes: row lengths and rows per batch are powers of two.

    Args:
        features: features to predict.
        pad_id: id of the padding token.
        positions: longest row that the model supports.
        divisor: number of which the number of rows must be a multiple.

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
            f"An example has {longest} tokens, but the model supports at most {positions}. Lower --max-length."
        )
    return longest
