"""Pack several examples into a row, and count the outcome."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from .progress import counted


@dataclass(frozen=True)
class Statistics:
    """Statistics of a plan of documents, as sums, so that those of several windows add up.

    Attributes:
        sequence_length: length of a row, in tokens.
        source_tokens: number of tokens in the documents.
        tokens: number of tokens in the rows, special tokens included; random second segments add to the documents'
            tokens, truncation removes some.
        lone_examples: of a single sentence, where pairs are to be put in order.
        dropped_examples: always 0; it is counted so that this can be seen.
        split_sentences: sentences longer than a row, which continue in the next one.
    """

    sequence_length: int
    windows: int = 0
    documents: int = 0
    sentences: int = 0
    source_tokens: int = 0
    examples: int = 0
    random_examples: int = 0
    swapped_examples: int = 0
    lone_examples: int = 0
    short_examples: int = 0
    truncated_examples: int = 0
    truncated_tokens: int = 0
    dropped_examples: int = 0
    split_sentences: int = 0
    rows: int = 0
    tokens: int = 0

    @property
    def packing_efficiency(self) -> float:
        """Fraction of the rows' positions that hold a real token."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0

    @property
    def truncated_fraction(self) -> float:
        """Fraction of the tokens chosen for examples that was truncated."""
        return self.truncated_tokens / (self.tokens + self.truncated_tokens) if self.tokens else 0.0

    def __add__(self, other: Statistics) -> Statistics:
        if self.sequence_length != other.sequence_length:
            raise ValueError(
                f"Statistics of rows of {self.sequence_length} and of {other.sequence_length} do not add up."
            )
        names = [field.name for field in fields(self) if field.name != "sequence_length"]
        return Statistics(self.sequence_length, **{name: getattr(self, name) + getattr(other, name) for name in names})

    def __str__(self) -> str:
        share = self.random_examples / max(1, self.examples)
        split = f"{counted(self.split_sentences, 'sentence')} split over rows; " if self.split_sentences else ""
        random = f"{share:.1%} with a random second segment; " if self.random_examples else ""
        if self.swapped_examples or self.lone_examples:
            pairs = self.examples - self.lone_examples
            random = f"{self.swapped_examples / max(1, pairs):.1%} of {counted(pairs, 'pair')} swapped, "
            random += f"{self.lone_examples:,} of a single sentence, without an order; "
        return (
            f"{counted(self.documents, 'document')}, {counted(self.source_tokens, 'token')}: "
            f"{counted(self.examples, 'example')} in {counted(self.rows, 'row')} of {self.sequence_length}, "
            f"{self.packing_efficiency:.1%} full; {random}{split}"
            f"{counted(self.truncated_tokens, 'token')} ({self.truncated_fraction:.2%}) truncated, "
            f"{counted(self.dropped_examples, 'example')} dropped"
        )


def pack(lengths: np.ndarray, capacity: int, most: int) -> tuple[np.ndarray, int]:
    """Assign examples to rows by best fit, longest first: each goes into the row with the least sufficient room.

    Args:
        lengths: [E] lengths of the examples, each at most `capacity`.
        capacity: length of a row.
        most: maximum number of examples per row.

    Returns:
        The row of each example, [E], and the number of rows. No example is split or dropped.
    """
    rows = np.zeros(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have left
    rooms = 0  # bit r is set if there is a row with room r
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
    """Concatenate ranges: [starts[0], starts[0] + 1, ... (lengths[0] elements), starts[1], ...]."""
    starts = np.asarray(starts, np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)


class RowOrder(NamedTuple):
    """Packed examples in the order of their rows.

    Attributes:
        examples: [E] int64, the examples, row after row.
        row_examples: [R+1] int64, index in `examples` of each row's first example.
        slot: [E] int64, index of each example within its row.
    """

    examples: np.ndarray
    row_examples: np.ndarray
    slot: np.ndarray

    def columns(self, lengths: np.ndarray) -> np.ndarray:
        """Return the start position of each example in its row, [E]; `lengths` [E] are in the order of `examples`."""
        starts = np.cumsum(lengths) - lengths
        return starts - np.repeat(starts[self.row_examples[:-1]], np.diff(self.row_examples))


def order_by_row(row_of: np.ndarray, rows: int) -> RowOrder:
    """Sort examples by their rows.

    Args:
        row_of: [E] row of each example.
        rows: number of rows, R; each of them has an example.
    """
    row_examples = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    slot = np.arange(len(row_of)) - np.repeat(row_examples[:-1], np.diff(row_examples))
    return RowOrder(np.argsort(row_of, kind="stable"), row_examples, slot)
