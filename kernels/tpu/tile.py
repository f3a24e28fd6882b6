"""One tile of the scores inside a TPU kernel: bias, softcap, mask and dropout, written once for all kernels.

A tile lies either way: `Axis.QUERIES_DOWN`, [queries, keys], where the forward pass wants it, or `Axis.KEYS_DOWN`,
[keys, queries], where the gradients of keys and values do. What belongs to the side that goes down is a column [n, 1],
what belongs to the other a row [1, n]. Sizes are multiples of 128, the width of a vector register.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..blocks import Area
from ..hash import fold, keep, key_words

LANES = 128
SUBLANES = 8


class Operands(NamedTuple):
    """The arrays of a call; None for what it does without."""

    query: Any
    """[B, L, H, D]; here and in what follows, the kernels for long rows take heads before tokens"""
    key: Any
    """[B, S, K, D]"""
    value: Any
    """[B, S, K, Dv]"""
    query_ids: Any
    """int32 [B, L]"""
    key_ids: Any
    """int32 [B, S]"""
    words: Any
    """uint32 [B, H, 2]: dropout's words of each (row, head)"""
    row: Any
    """float32 [H, L+S-1]: the Toeplitz row of each head"""
    dense: Any
    """[1 or B, 1 or H, L, S]"""


class Cotangents(NamedTuple):
    """What the backward pass knows besides the operands."""

    out: Any
    """[B, L, H, Dv], the gradient of the output"""
    lse: Any
    """float32 [B, H, L], of the forward pass"""
    delta: Any
    """float32 [B, H, L]: sum(gradient * output), less the gradient of lse"""


class Axis(enum.Enum):
    """Which side of a tile goes down (dimension 0); the other goes across."""

    QUERIES_DOWN = 0
    KEYS_DOWN = 1


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the scores of a call mean, known when tracing. The fields are those of `attention`."""

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
    """a . b in float32, summed over dimension `over[0]` of a and `over[1]` of b. Float32 keeps all its bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def column(row: Array) -> Array:
    """[1, n] as [n, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


def as_row(values: Array) -> Array:
    """[n, 1] as [1, n]."""
    return jnp.transpose(jnp.broadcast_to(values, (values.shape[0], LANES)))[:1]


def places(start: Any, size: int, dimension: int) -> Array:
    """The numbers of `size` tokens from `start`, int32: a column where `dimension` is 0, a row where it is 1."""
    shape = (size, 1) if dimension == 0 else (1, size)
    return start + lax.broadcasted_iota(jnp.int32, shape, dimension)


def rows_within(x: Array, start: Any, length: int) -> Array:
    """`x` [n, D], whose first row is token `start`, with 0 from token `length` on: nothing was fetched there."""
    return jnp.where(places(start, x.shape[0], 0) < length, x, jnp.zeros((), x.dtype))


def query_hash(words: tuple[Any, Any], start: Any, size: int, axis: Axis) -> tuple[Array, Array]:
    """Dropout's two words of each query, from those of its (row, head): columns or rows, as the queries lie."""
    a, b = fold(words[0], words[1], places(start, size, 1).astype(jnp.uint32))
    return (column(a), column(b)) if axis is Axis.QUERIES_DOWN else (a, b)


def kept(meaning: Meaning, query_words: tuple[Array, Array], key: Any, size: int, axis: Axis) -> Array:
    """Which weights of the tile dropout keeps, for the keys from `key` on."""
    g = key_words(places(key, size, 1))
    return keep(*query_words, g if axis is Axis.QUERIES_DOWN else column(g), meaning.rate)


def allowed(
    meaning: Meaning, query: Any, queries: int, key: Any, keys: int, query_ids: Any, key_ids: Any, axis: Axis
) -> Array | None:
    """Which pairs of the tile attend: bool, of a shape that broadcasts to the tile's; None where all of them do.

    The ids are columns or rows, as their side goes, or None.
    """
    area = meaning.area
    down, across = (0, 1) if axis is Axis.QUERIES_DOWN else (1, 0)
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
    """The tile's scores, -inf where masked, and the softcap's tanh, from the products q . k."""
    values = products if meaning.scale == 1 else products * meaning.scale
    if bias is not None:
        values = values + bias
    bent = None
    if meaning.softcap is not None:
        bent = jnp.tanh(values * (1 / meaning.softcap))
        values = bent * meaning.softcap
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
    """The weights that met the values, and the gradient of `scale * q . k + bias`.

    Args:
      meaning: of the call.
      weights: softmax's, before dropout.
      products: do . v of each pair.
      delta: sum(do * out) of each query, less the gradient of its lse.
      bent: the softcap's tanh.
      kept: dropout's bits.
      mask: what attends. What does not may be so large that do . v is infinite, and 0 times that is no zero.
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
    """A Toeplitz row [H, down + across - 1] as the kernels read it: [H, 1, down_padded + across_padded].

    Element `e` belongs to the difference (place across) - (place down) = e - down_padded.
    """
    ends = (down_padded - down + 1, across_padded - across)
    return jnp.pad(row, ((0, 0), ends))[:, None, :]


def row_part(start_down: Any, start_across: Any, down: int, down_padded: int) -> Any:
    """Where the part of a padded row that a tile needs begins; it is `down + across` long."""
    return pl.multiple_of(start_across - start_down - down + down_padded, LANES)


def skew(part: Array, down: int, across: int) -> Array:
    """The tile [down, across] of a Toeplitz bias, from its part of the row [1, down + across]: part[c - r + down].

    The tile is made of blocks of 128 rows, and all of them are cuts, at multiples of 128, of one array [128, down +
    across] whose row r is the part moved right by r. That array costs one rotation a register; the cuts are free.
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
    """The transpose of `skew`: sums [down, across] along its diagonals, to [1, down + across]."""
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
    """One tile of an online softmax over dimension 1.

    Returns:
      The tile's weights against the new maximum, that maximum, the new total, and the factor of all earlier sums.
    """
    new = jnp.maximum(top, jnp.max(values, axis=1, keepdims=True))
    # Where nothing has been attended to yet, -inf - -inf would be NaN.
    reference = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.exp(values - reference)
    ratio = jnp.exp(top - reference)
    return weights, new, total * ratio + jnp.sum(weights, axis=1, keepdims=True), ratio


def softmax_end(top: Array, total: Array) -> tuple[Array, Array]:
    """What the sum of weights times values is multiplied with, and lse: 0 and -inf where nothing was attended to."""
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    return jnp.where(empty, 0.0, 1 / total), jnp.where(empty, -jnp.inf, top + jnp.log(total))


def ceil_to(size: int, multiple: int) -> int:
    """The smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def to_lanes(x: Array | None, block: int, value: Any = 0) -> Array | None:
    """[..., n] as [..., 1, n'], filled with `value` up to n', a multiple of `block`; None stays None."""
    if x is None:
        return None
    ends = (0, ceil_to(x.shape[-1], block) - x.shape[-1])
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + (ends,), constant_values=value)[..., None, :]


def dense_index(shape: tuple[int, ...]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Which row and head of a dense bias of this shape belong to row b, head (or block of heads) h."""
    return lambda b, h: (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0)
