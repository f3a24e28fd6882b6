"""Cases of the attention benchmark: shapes, biases and packed rows, their arrays, and the operations they need."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..bias import AlibiBias, DenseBias, RelativeBias

BIASES = ("none", "relative", "alibi", "dense")
BUCKETS = 32


class BenchError(ValueError):
    """Raised, with the reason, if a benchmark cannot measure what its options ask for."""


class Lengths(NamedTuple):
    """Log-normal document lengths: their mean in tokens, and the standard deviation of their logarithm."""

    mean: float
    spread: float


CORPORA = {"wikipedia": Lengths(261, 0.7), "short": Lengths(131, 0.82)}
"""Length distributions of `--packed`, simulated so that everyone gets the same rows without the text."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark's table; sizes as in `attention`."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    size: int
    dtype: str
    bias: str = "none"
    causal: bool = False
    packed: str | None = None
    dropout: float = 0.0
    window: tuple[int | None, int | None] = (None, None)

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How many keys are visible before and after the query: the window, combined with causality."""
        return self.window[0], 0 if self.causal else self.window[1]

    @property
    def label(self) -> str:
        """Short label for a table or chart."""
        lengths = f"{self.queries}" if self.queries == self.keys else f"{self.queries}x{self.keys}"
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        extras = [
            "" if self.bias == "none" else self.bias,
            "causal" if self.causal else "",
            "" if self.window == (None, None) else f"window {window_text(self.window)}",
            self.packed or "",
            f"dropout {self.dropout:g}" if self.dropout else "",
        ]
        return " ".join([f"{self.batch}x{lengths}, {heads} heads of {self.size}", *filter(None, extras)])


class Arrays(NamedTuple):
    """One set of inputs. All are on the device except `segment_ids`, which the sets share."""

    query: Any
    key: Any
    value: Any
    parameter: Any
    """Array of the bias: table, slopes or dense bias; None without a bias."""
    wave: Any
    """Gradient of the output, shaped like the query; 0 at padding."""
    segment_ids: Any
    seed: Any


def parse_shapes(text: str) -> list[tuple[int, int, int, int, int, int]]:
    """Parse `--shapes` to (B, L, S, H, K, D) each; raise a BenchError that names an invalid part."""
    shapes = []
    for part in text.split(","):
        numbers = [int(number) for number in part.split("x")] if re.fullmatch(r"\d+(x\d+)+", part.strip()) else []
        if len(numbers) == 4:
            b, length, heads, size = numbers
            numbers = [b, length, length, heads, heads, size]
        if len(numbers) != 6 or 0 in numbers or numbers[3] % numbers[4]:
            raise BenchError(
                f"--shapes: expected BxLxHxD (batch, length, heads, head size) or BxLxSxHxKxD with K dividing H, none "
                f"of them 0, separated by commas; found {part.strip()!r}"
            )
        b, queries, keys, heads, key_heads, size = numbers
        shapes.append((b, queries, keys, heads, key_heads, size))
    return shapes


def parse_window(text: str) -> tuple[int | None, int | None]:
    """Parse `--window` to (left, right), None for no limit; raise a BenchError if it is invalid."""
    if not text:
        return None, None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(re.fullmatch(r"\d*", part) for part in parts):
        raise BenchError(
            f"--window: expected LEFT,RIGHT (numbers of keys visible before and after the query; an empty side has no "
            f"limit) or one number for both, found {text!r}"
        )
    left, right = (int(part) if part else None for part in (parts[0], parts[-1]))
    return left, right


def window_text(window: tuple[int | None, int | None]) -> str:
    """Format a window as `--window` accepts it."""
    return ",".join("" if side is None else str(side) for side in window)


def document_lengths(lengths: Lengths, most: int, generator: np.random.Generator) -> Iterator[int]:
    """Generate an endless stream of lengths between 1 and `most`."""
    centre = np.log(lengths.mean) - lengths.spread**2 / 2
    while True:
        yield int(np.clip(round(generator.lognormal(centre, lengths.spread)), 1, most))


def pack(lengths: Lengths, rows: int, row_length: int, seed: int) -> np.ndarray:
    """Return segment ids, int32 [rows, row_length]: whole documents, each in the first row that has room for it.

    Packing ends after 32 consecutive documents that found no room; the remainder is padding.
    """
    ids = np.zeros((rows, row_length), np.int32)
    used, count = np.zeros(rows, int), np.zeros(rows, int)
    misses = 0
    for length in document_lengths(lengths, row_length, np.random.default_rng(seed)):
        fitting = np.flatnonzero(used + length <= row_length)
        misses = 0 if fitting.size else misses + 1
        if misses == 32:
            break
        for row in fitting[:1]:
            count[row] += 1
            ids[row, used[row] : used[row] + length] = count[row]
            used[row] += length
    return ids


def segment_ids(case: Case, seed: int) -> np.ndarray | None:
    """Return a case's segment ids, int32 [B, L]; None if its rows are not packed."""
    return None if case.packed is None else pack(CORPORA[case.packed], case.batch, case.queries, seed)


class Documents(NamedTuple):
    """Packed documents, in the forms in which other implementations take them.

    Attributes:
      starts: first token of each document in its row, int32 [B, M], followed by -1.
      lengths: number of tokens of each, likewise.
      first: for each token the first token of its document, int32 [B, L]; padding is a document too.
      stop: the token after the last one of its document, likewise.
    """

    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    stop: np.ndarray


def documents(ids: np.ndarray) -> Documents:
    """Find the documents of packed rows of segment ids, int32 [B, L], each of them contiguous."""
    rows, length = ids.shape
    most = max(1, int(ids.max()))
    starts, lengths = np.full((rows, most), -1, np.int32), np.full((rows, most), -1, np.int32)
    first, stop = np.zeros_like(ids), np.zeros_like(ids)
    for row, tokens in enumerate(ids):
        edges = np.concatenate([[0], np.flatnonzero(np.diff(tokens)) + 1, [length]])
        count = 0
        for begin, end in itertools.pairwise(edges):
            first[row, begin:end], stop[row, begin:end] = begin, end
            if tokens[begin]:
                starts[row, count], lengths[row, count] = begin, end - begin
                count += 1
    return Documents(starts, lengths, first, stop)


def needed_area(case: Case, segment_ids: np.ndarray | None) -> int:
    """Count the unmasked query-key pairs of one head, over the batch."""
    left, right = case.sides

    def pairs(queries: int, keys: int) -> int:
        place = np.arange(queries, dtype=np.int64)
        first = 0 if left is None else np.maximum(place - left, 0)
        last = keys - 1 if right is None else np.minimum(place + right, keys - 1)
        return int(np.maximum(last - first + 1 + 0 * place, 0).sum())

    if segment_ids is None:
        return case.batch * pairs(case.queries, case.keys)
    lengths = np.concatenate([np.bincount(row)[1:] for row in segment_ids])
    return sum(pairs(int(length), int(length)) for length in lengths)


class Needed(NamedTuple):
    """Work that any implementation of a pass must do: floating-point operations, and bytes to and from memory."""

    operations: float
    bytes: float


def needed_work(case: Case, area: int) -> tuple[Needed, Needed]:
    """Return the work of the forward and of the backward pass.

    Operations are those of the matrix products on unmasked pairs: two in the forward pass, five in the backward pass
    (one of which recomputes the scores). Bytes are those of inputs and outputs, each counted once; a relative bias is
    negligible.
    """
    product = 2.0 * area * case.heads * case.size
    width = jnp.dtype(case.dtype).itemsize
    queries = case.batch * case.queries * case.heads * case.size * width
    keys = case.batch * case.keys * case.key_heads * case.size * width
    lse = 4 * case.batch * case.queries * case.heads
    dense = 4 * case.heads * case.queries * case.keys if case.bias == "dense" else 0
    forward = Needed(2 * product, 2 * queries + 2 * keys + lse + dense)
    # Reads query, key, value, output, its gradient, lse; writes three gradients.
    backward = Needed(5 * product, 4 * queries + 4 * keys + lse + 2 * dense)
    return forward, backward


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "query": (case.batch, case.queries, case.heads, case.size),
        "key": (case.batch, case.keys, case.key_heads, case.size),
        "value": (case.batch, case.keys, case.key_heads, case.size),
        "wave": (case.batch, case.queries, case.heads, case.size),
    }
    parameters: dict[str, tuple[int, ...] | None] = {
        "none": None,
        "relative": (BUCKETS, case.heads),
        "alibi": (case.heads,),
        "dense": (1, case.heads, case.queries, case.keys),
    }

    shape = parameters[case.bias]
    if shape is not None:
        shapes["parameter"] = shape
    return shapes


def abstract(case: Case) -> Arrays:
    """Return the shapes and dtypes of a case's arrays, without a device."""
    made = {name: jax.ShapeDtypeStruct(shape, case.dtype) for name, shape in _shapes(case).items()}
    if "parameter" in made:
        made["parameter"] = jax.ShapeDtypeStruct(made["parameter"].shape, jnp.float32)
    ids = None if case.packed is None else jax.ShapeDtypeStruct((case.batch, case.queries), jnp.int32)
    return Arrays(**{"parameter": None} | made, segment_ids=ids, seed=None)


def draw(case: Case, sets: int, seed: int) -> list[Arrays]:
    """Generate `sets` different inputs on the default device, so that no repeated call finds its inputs in a cache."""
    ids = segment_ids(case, seed)
    shapes = _shapes(case)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])

    @jax.jit
    def make(key: Any) -> dict[str, Any]:
        parts = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
        made = {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        # The scale of learned biases; slopes must be positive.
        parameter = jnp.abs(made.pop("parameter")) * 0.1 if "parameter" in made else None
        if ids is not None:
            made["wave"] = jnp.where((ids != 0)[:, :, None, None], made["wave"], 0)
        return {name: x.astype(case.dtype) for name, x in made.items()} | {"parameter": parameter}

    out = []
    device_ids = None if ids is None else jnp.asarray(ids)
    for n in range(sets):
        made = make(jax.random.fold_in(jax.random.key(seed), n))
        seed_words = jnp.array([seed, n], jnp.uint32) if case.dropout else None
        out.append(Arrays(**made, segment_ids=device_ids, seed=seed_words))
    return out


def bias_of(case: Case, parameter: Any) -> RelativeBias | AlibiBias | DenseBias | None:
    """Return the bias of a case with the array from `draw`."""
    match case.bias:
        case "relative":
            return RelativeBias(parameter)
        case "alibi":
            return AlibiBias(parameter)
        case "dense":
            return DenseBias(parameter)
    return None
