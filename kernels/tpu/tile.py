"""One score tile inside a TPU kernel: bias, softcap, mask and dropout, written once for all kernels.

A tile has one of two orientations: `Axis.QUERIES_DOWN`, [queries, keys], in the forward pass, or `Axis.KEYS_DOWN`,
[keys, queries], for the gradients of keys and values. Vectors of the side along dimension 0 are columns [n, 128], the
same in all lanes, and those of the other side rows [1, n]. Sizes are multiples of 128, the width of a vector register.

Of a column [n, 1] every use would cost a permutation per register: nothing tells the compiler that a vector in memory
or out of a transposition is the same in all lanes.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..blocks import Area

LOG2E = math.log2(math.e)
LANES = 128
SUBLANES = 8


class Operands(NamedTuple):
    """Arrays of a call; None for those it does not use."""

    query: Any
    """[B, L, H, D]; here and below, the kernels for long rows take the head axis before the token axis"""
    key: Any
    """[B, S, K, D]"""
    value: Any
    """[B, S, K, Dv]"""
    query_ids: Any
    """int32 [B, L]"""
    key_ids: Any
    """int32 [B, S]"""
    row: Any
    """float32 [H, L+S-1]: the Toeplitz row of each head"""
    dense: Any
    """[1 or B, 1 or H, L, S]"""
    a: Any = None
    """uint32 [B, H, L]: `a` of dropout's `Words`"""
    b: Any = None
    """uint32 [B, H, L]"""
    g: Any = None
    """uint32 [1 or B, S]"""


class Cotangents(NamedTuple):
    """Inputs of the backward pass besides the operands."""

    out: Any
    """[B, L, H, Dv], the gradient of the output"""
    lse: Any
    """float32 [B, H, L], of the forward pass, in units of log2"""
    delta: Any
    """float32 [B, H, L]: sum(gradient * output) minus the gradient of lse"""


class Axis(enum.Enum):
    """The side of a tile that runs down (dimension 0); the other runs across."""

    QUERIES_DOWN = 0
    KEYS_DOWN = 1


@dataclasses.dataclass(frozen=True)
class Meaning:
    """Static definition of a call's scores. The fields are those of `attention`."""

    area: Area
    scale: float
    softcap: float | None
    rate: float
    segmented: bool
    bias: str | None
    """None, "row" (Toeplitz) or "dense"."""

    @property
    def masks(self) -> bool:
        """Whether any pair within the rows may be masked."""
        return self.segmented or self.area.left is not None or self.area.right is not None


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """Return a . b in float32, summed over dimension `over[0]` of a and `over[1]` of b, at full float32 precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def column(row: Array) -> Array:
    """Turn a row [1, n] into a column [n, 128]."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def as_row(column: Array) -> Array:
    """Turn a column [n, 128] into a row [1, n]."""
    return jnp.transpose(column)[:1]


def widen(column: Array, lanes: int) -> Array:
    """Repeat a column [n, 128] to [n, lanes]: the same registers, used again."""
    times = -(-lanes // LANES)
    whole = column if times == 1 else jnp.concatenate([column] * times, axis=1)
    return whole[:, :lanes] if lanes % LANES else whole


def places(start: Any, size: int, dimension: int) -> Array:
    """Return the indices of `size` tokens from `start`, int32: a column if `dimension` is 0, a row if it is 1."""
    shape = (size, 1) if dimension == 0 else (1, size)
    return start + lax.broadcasted_iota(jnp.int32, shape, dimension)


def rows_within(x: Array, start: Any, length: int) -> Array:
    """Zero the rows of `x` [n, D] from token `length` on, where nothing was fetched; row 0 is token `start`."""
    return jnp.where(places(start, x.shape[0], 0) < length, x, jnp.zeros((), x.dtype))


def query_words(x: Any, meaning: Meaning, keys: int) -> tuple[Array, Array] | None:
    """Return dropout's words of the queries for a tile of this many keys, from a kernel's inputs; None without it."""
    return (widen(column(x.a[...]), keys), widen(column(x.b[...]), keys)) if meaning.rate else None


def allowed(
    meaning: Meaning, query: Any, queries: int, key: Any, keys: int, query_ids: Any, key_ids: Any, axis: Axis
) -> Array | None:
    """Return which pairs of the tile attend: bool, broadcastable to the tile; None if all of them do.

    The ids are columns or rows, depending on the orientation, or None.
    """
    area = meaning.area
    down, across = (0, 1) if axis is Axis.QUERIES_DOWN else (1, 0)
    if meaning.segmented:
        query_ids = widen(query_ids, keys) if axis is Axis.QUERIES_DOWN else query_ids
        key_ids = widen(key_ids, queries) if axis is Axis.KEYS_DOWN else key_ids
    query_places, key_places = places(query, queries, down), places(key, keys, across)
    terms = []
    if area.left is not None or area.right is not None:
        distance = key_places - query_places
        if area.left is not None:
            terms.append(distance >= -area.left)
        if area.right is not None:
            terms.append(distance <= area.right)
    if meaning.segmented:
        terms.append((query_ids == key_ids) & (query_ids != 0))
    if area.queries % queries:
        terms.append(query_places < area.queries)
    if area.keys % keys:
        terms.append(key_places < area.keys)
    if not terms:
        return None
    mask = terms[0]
    for term in terms[1:]:
        mask = mask & term
    return mask


def scores(meaning: Meaning, products: Array, bias: Array | None, mask: Array | None) -> tuple[Array, Array | None]:
    """Return the tile's scores in units of log2, -inf where masked, and the softcap's tanh, from the products q . k.

    The bias is in units of log2 too. (The vector unit's exponential is `exp2`: `exp` costs it another multiplication.)
    """
    values = products * (meaning.scale * LOG2E)
    if bias is not None:
        values = values + bias
    bent = None
    if meaning.softcap is not None:
        bent = jnp.tanh(values * (1 / (meaning.softcap * LOG2E)))
        values = bent * (meaning.softcap * LOG2E)
    if mask is not None:
        values = jnp.where(mask, values, -jnp.inf)
        bent = None if bent is None else jnp.where(mask, bent, 0.0)
    return values, bent


def score_gradient(
    meaning: Meaning,
    weights: Array,
    products: Array,
    delta: Array,
    bent: Array | None,
    kept: Array | None,
    mask: Array | None,
) -> tuple[Array, Array]:
    """Return the weights after dropout, and the gradient of `scale * q . k + bias`.

    Args:
      meaning: definition of the call.
      weights: softmax weights, before dropout.
      products: do . v of each pair.
      delta: sum(do * out) of each query, minus the gradient of its lse.
      bent: tanh of the softcap.
      kept: dropout bits.
      mask: which pairs attend. For the others do . v may be infinite, and 0 * inf is NaN.
    """
    dropped = weights
    if kept is not None:
        dropped = jnp.where(kept, weights * (1 / (1 - meaning.rate)), 0.0)
        products = jnp.where(kept, products * (1 / (1 - meaning.rate)), 0.0)
    gradient = weights * (products - delta)
    if bent is not None:
        gradient = gradient * (1 - bent * bent)
    if mask is not None:
        gradient = jnp.where(mask, gradient, 0.0)
    return dropped, gradient


def pad_row(row: Array, down: int, across: int, down_padded: int, across_padded: int) -> Array:
    """Pad a Toeplitz row [H, down + across - 1] to the kernels' layout [H, 1, down_padded + across_padded].

    Element `e` belongs to the distance (index across) - (index down) = e - down_padded.
    """
    ends = (down_padded - down + 1, across_padded - across)
    return jnp.pad(row, ((0, 0), ends))[:, None, :]


def in_log2(bias: Array) -> Array:
    """Turn a bias in natural units into what `scores` adds."""
    return bias.astype(jnp.float32) * LOG2E


def row_part(start_down: Any, start_across: Any, down: int, down_padded: int) -> Any:
    """Return the start of the part of a padded row that a tile needs, `down + across` elements."""
    return pl.multiple_of(start_across - start_down - down + down_padded, LANES)


def skew(part: Array, down: int, across: int) -> Array:
    """Build a tile [down, across] of a Toeplitz bias from its part of the row [1, down + across]: part[c - r + down].

    The tile consists of blocks of 128 rows, all of them slices, at multiples of 128, of one array [128, down + across]
    whose row r is the part shifted right by r. That array costs one rotation per register; the slices are free.
    """
    width = down + across
    eight = jnp.broadcast_to(part, (SUBLANES, width))
    place = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    for step in (1, 2, 4):
        eight = jnp.where((place & step) != 0, pltpu.roll(eight, step, 1), eight)
    moved = [eight] + [pltpu.roll(eight, rows, 1) for rows in range(SUBLANES, LANES, SUBLANES)]
    moved = jnp.concatenate(moved, axis=0)
    cuts = [lax.slice_in_dim(moved, down - r, down - r + across, axis=1) for r in range(0, down, LANES)]
    return cuts[0] if len(cuts) == 1 else jnp.concatenate(cuts, axis=0)


def unskew(tile: Array) -> Array:
    """Sum [down, across] along its diagonals to [1, down + across]: the transpose of `skew`."""
    down, across = tile.shape
    width = down + across
    total = None
    for r in range(0, down, LANES):
        block = lax.slice_in_dim(tile, r, r + LANES, axis=0)
        parts = [jnp.zeros((LANES, down - r), tile.dtype), block]
        if r:
            parts.append(jnp.zeros((LANES, r), tile.dtype))
        block = jnp.concatenate(parts, axis=1)
        total = block if total is None else total + block
    assert total is not None
    eight = lax.slice_in_dim(total, 0, SUBLANES, axis=0)
    for rows in range(SUBLANES, LANES, SUBLANES):
        eight = eight + pltpu.roll(lax.slice_in_dim(total, rows, rows + SUBLANES, axis=0), width - rows, 1)
    place = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    for step in (1, 2, 4):
        eight = jnp.where((place & step) != 0, pltpu.roll(eight, width - step, 1), eight)
    return jnp.sum(eight, axis=0, keepdims=True)


def softmax_step(values: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """Process one tile of an online softmax over dimension 1, of scores in units of log2.

    Returns:
      The tile's weights relative to the new maximum; and columns, as `top` and `total` are: the new maximum, the new
      total, and the factor that rescales all earlier sums.
    """
    new = jnp.maximum(top, jnp.max(values, axis=1, keepdims=True))
    # Avoid -inf - -inf, which is NaN, where nothing has been attended to yet.
    reference = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.exp2(values - widen(reference, values.shape[1]))
    ratio = jnp.exp2(top - reference)
    return weights, new, total * ratio + jnp.sum(weights, axis=1, keepdims=True), ratio


def softmax_end(top: Array, total: Array) -> tuple[Array, Array]:
    """Return the factor for the sum of weights times values, and lse: 0 and -inf where nothing was attended to.

    The maximum is in units of log2, lse is the natural logarithm.
    """
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    return jnp.where(empty, 0.0, 1 / total), jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(total))


def ceil_to(size: int, multiple: int) -> int:
    """Round `size` up to a multiple."""
    return -(-size // multiple) * multiple


def to_lanes(x: Array | None, block: int, value: Any = 0) -> Array | None:
    """Turn [..., n] into [..., 1, n'], padded with `value` to a multiple n' of `block`; None stays None."""
    if x is None:
        return None
    ends = (0, ceil_to(x.shape[-1], block) - x.shape[-1])
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + (ends,), constant_values=value)[..., None, :]


def dense_index(shape: tuple[int, ...]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a function from (row b, head or block of heads h) to the row and head of a dense bias of this shape."""
    return lambda b, h: (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0)


def row_index(x: Array | None) -> Callable[[Any], Any]:
    """Return a function from row b to the row of an array [1 or B, ...]."""
    return lambda b: b if x is not None and x.shape[0] > 1 else 0
