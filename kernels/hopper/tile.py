"""What the Hopper kernels share: the static facts of a call, and the arithmetic of one tile of scores.

A tile is a block of scores in the registers of one warpgroup, as `wgmma` leaves them. In the forward pass and for dq
its rows are queries and its columns keys; for dk and dv it is transposed. `Side` says which: the vectors of the queries
then run along `axis` 0 or 1, and those of the keys along the other.

Scores are kept as base-2 logarithms (`exp2` is the hardware's own exponential): `scale`, and the bias, carry log2(e).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..blocks import Area
from ..hash import _M1, _M2, threshold

LOG2E = math.log2(math.e)
LOWEST = float(np.finfo(np.float32).min)
WARPGROUP_ROWS = 64
"""Rows of one `wgmma`, and of every warpgroup's tile."""

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM): the size of a persistent grid. Another number of them costs balance, never correctness."""

SHARED_MEMORY = 227 * 1024 - 4096
"""Bytes of shared memory that a block may have, less what barriers and alignment take."""

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("hopper_mode", default=None)


@contextlib.contextmanager
def interpreting(*, detect_races: bool = True) -> Iterator[None]:
    """Within it the kernels run on the CPU, in Pallas's GPU interpreter, for tests: slow, and with races found.

    It applies to what is traced within: a function that jit has already traced for the same shapes stays as it is. The
    interpreter blocks a thread of XLA's pool for each warpgroup that waits: with fewer than four of them it may hang
    (`JAX_NUM_CPU_DEVICES=8` makes the pool large enough anywhere).
    """
    token = _mode.set("interpret")
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within it the backend supports calls on machines without a GPU too: for compiling ahead of time for one."""
    token = _mode.set("compile")
    try:
        yield
    finally:
        _mode.reset(token)


def mode() -> str | None:
    """ "interpret" or "compile" within `interpreting` or `compiling`, else None."""
    return _mode.get()


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of one kernel. What a tuner may vary; `hopper.blocks_for` is the rule.

    Attributes:
      warpgroups: computing warpgroups of a block, each with 64 rows of its own.
      columns: keys (forward, dq, the bias's gradient) or queries (dk and dv) of a step; a multiple of 64.
      stages: how many steps are held in shared memory at once.
    """

    warpgroups: int
    columns: int
    stages: int

    def __post_init__(self) -> None:
        if not (1 <= self.warpgroups <= 3 and self.columns > 0 and self.columns % 64 == 0 and self.stages >= 1):
            raise ValueError(f"expected 1 to 3 warpgroups, columns in multiples of 64 and a stage, found {self}")

    @property
    def rows(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call, besides shapes and dtypes. Hashable: it keys the compiled kernels."""

    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    bias: str | None
    """None, "row" (Toeplitz) or "dense"."""
    segments: bool
    dropout_rate: float
    interpret: bool

    def area(self, queries: int, keys: int) -> Area:
        return Area(queries, keys, self.left, self.right)

    @property
    def simple(self) -> bool:
        """Whether a score is its product times a positive number, so that the maximum can be taken before scaling."""
        return self.bias is None and self.softcap is None and self.scale > 0


@dataclasses.dataclass(frozen=True)
class Side:
    """Where a tile lies: its first query and key (traced), its shape, and which axis the queries run along.

    `sums_over_keys`: whether anything is summed over its keys, so that those beyond the last must weigh nothing. Where
    they are rows of dk and dv alone, they are never stored.
    """

    query: Any
    key: Any
    shape: tuple[int, int]
    axis: int
    sums_over_keys: bool = True

    def along_queries(self, vector: Array) -> Array:
        return lax.broadcast_in_dim(vector, self.shape, [self.axis])

    def along_keys(self, vector: Array) -> Array:
        return lax.broadcast_in_dim(vector, self.shape, [1 - self.axis])

    def load_queries(self, ref: Any) -> Array:
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - self.axis))

    def load_keys(self, ref: Any) -> Array:
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(self.axis))

    def places(self, axis: int) -> Array:
        """Where each query (`axis` of the queries) or key of the tile lies in it: a vector."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return plgpu.broadcasted_iota(jnp.int32, (self.shape[axis],), 0, layout=layout)


def zeros(shape: tuple[int, ...], axis: int | None = None, fill: float = 0.0) -> Array:
    """A float32 array in a warpgroup's registers: laid out as `wgmma` does, or a vector along `axis` of such a tile."""
    layout = plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def product(*pairs: tuple[Any, Any], then: Callable[[], None] | None = None) -> Array:
    """The sum of all a @ b, both in shared memory, float32; `then` runs once it is issued, before it is awaited."""

    def body(accumulator: Any) -> Array:
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        if then is not None:
            then()
        return accumulator[...]

    a, b = pairs[0]
    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(
    options: Options, sums: Sequence[tuple[Array, Callable[[], Array], Any]], then: Callable[[], None] | None = None
) -> list[Array]:
    """[c + a() @ b for each (c, a, b)], with a() in registers and b in shared memory.

    All are issued, one after the other, before any is awaited: what `a` computes overlaps with the products before it,
    and what `then` does with all of them. The interpreter knows neither accumulators with a first value nor `wgmma`
    from registers: there, plain products.
    """
    if options.interpret:
        out = [c + jnp.dot(a(), b[...], preferred_element_type=jnp.float32) for c, a, b in sums]
        release()
        if then is not None:
            then()
        return out

    def body(accumulators: Any) -> None:
        for accumulator, (_, a, b) in zip(accumulators, sums, strict=True):
            plgpu.wgmma(accumulator, a(), b)
        if then is not None:
            then()

    start: Any = tuple(plgpu.WGMMAAccumulatorRef.init(c) for c, _, _ in sums)
    return list(pl.run_state(body)(start))


def two_products(pairs: Sequence[tuple[Any, Any]], between: Callable[[Array], Any]) -> tuple[Any, Array]:
    """`between(first product)` and the second product, which is computed meanwhile. All operands in shared memory."""

    def body(first: Any, second: Any) -> tuple[Any, Array]:
        for accumulator, (a, b) in zip((first, second), pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        result = between(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return result, second[...]

    accumulators = [plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs]
    return pl.run_scoped(body, *accumulators)


def release() -> None:
    """Order what this warpgroup has loaded from shared memory before the copies that will overwrite it.

    Loads go by the generic proxy, the copy engine writes by the asynchronous one; a barrier alone does not order the
    two. (What only `wgmma` has read needs no fence.)
    """
    plgpu.commit_smem()


def toeplitz_tile(options: Options, row: Any, side: Side) -> Array:
    """The tile of a Toeplitz row's part in shared memory: element (query, key) is `row[key - query + queries - 1]`.

    `row` holds the queries + keys - 1 distances of the tile, at least.
    """
    first = side.shape[side.axis] - 1
    if options.interpret:
        places = [lax.broadcasted_iota(jnp.int32, side.shape, axis) for axis in (0, 1)]
        return row[...][places[1 - side.axis] - places[side.axis] + first]

    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(side.shape, np.dtype(np.float32), layout=plgpu.Layout.WGMMA),
    )
    def read(_: Any, row: Any) -> Any:
        index = ir.IndexType.get()
        zero = mgpu.FragmentedArray.splat(mgpu.c(0.0, ir.F32Type.get()), side.shape, mgpu.WGMMA_LAYOUT, is_signed=None)

        def element(_: Any, place: Sequence[Any]) -> Any:
            distance = arith.subi(place[1 - side.axis], place[side.axis])
            return memref.load(row, [arith.addi(distance, mgpu.c(first, index))])

        return zero.foreach(element, create_array=True)

    tile: Any = read
    return tile(row)


def logits(options: Options, products: Array, bias: Array | None) -> Array:
    """Products of queries and keys as scores, in units of log2: scaled, biased, capped, not yet masked."""
    if options.softcap is None:
        scores = products * (options.scale * LOG2E)
        # The bias arrives in units of log2 already.
        return scores if bias is None else scores + bias
    scores = products * (options.scale / options.softcap)
    scores = scores if bias is None else scores + bias * (1 / (options.softcap * LOG2E))
    return tanh(scores) * (options.softcap * LOG2E)


def tanh(x: Array) -> Array:
    """tanh(x). From `exp2`, whose error is 2**-22; the hardware's own tanh has 2**-11, too coarse beneath a softcap."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2E)))


def masked(
    options: Options, scores: Array, side: Side, keys: int, query_segments: Array | None, key_segments: Array | None
) -> Array:
    """Scores with -inf where a query may not attend to a key. `keys`: how many there are in all."""
    keep: Array | None = None

    def both(a: Array | None, b: Array) -> Array:
        return b if a is None else a & b

    if options.left is not None or options.right is not None:
        # Bounds of each query against places of keys: a thread keeps a few of both, not a distance an element.
        place = side.along_keys(side.places(1 - side.axis))
        own = side.places(side.axis) + (side.query - side.key)
        if options.left is not None:
            keep = both(keep, place >= side.along_queries(own - options.left))
        if options.right is not None:
            keep = both(keep, place <= side.along_queries(own + options.right))
    if options.segments:
        assert query_segments is not None
        assert key_segments is not None
        # Padding differs from everything, and so do the places beyond the last key: see `pad_ids`.
        keep = both(keep, side.along_queries(query_segments) == side.along_keys(key_segments))
    elif side.sums_over_keys and keys % side.shape[1 - side.axis]:
        keep = both(keep, side.along_keys(side.places(1 - side.axis)) < keys - side.key)
    return scores if keep is None else jnp.where(keep, scores, -jnp.inf)


def can_mask(options: Options, keys: int, side: Side) -> bool:
    """Whether any tile of this shape needs mask code at all."""
    limited = options.left is not None or options.right is not None or options.segments
    return limited or (side.sums_over_keys and keys % side.shape[1 - side.axis] != 0)


def mask_unless(
    whole: Any,
    options: Options,
    scores: Array,
    side: Side,
    keys: int,
    vectors: Mapping[str, Array],
) -> Array:
    """`masked`, where the tile is not known to be whole."""
    if not can_mask(options, keys, side):
        return scores
    ids = vectors.get("query_segments"), vectors.get("key_segments")
    return lax.cond(whole, lambda s: s, lambda s: masked(options, s, side, keys, *ids), scores)


def recomputed(
    whole: Any,
    options: Options,
    products: Array,
    bias: Array | None,
    side: Side,
    keys: int,
    vectors: Mapping[str, Array],
) -> tuple[Array, Array | None]:
    """The backward pass's weights, and what the softcap multiplies the scores' gradient with.

    `vectors["lse"]` is in units of log2, and +inf where a row is empty or there is none.
    """
    slope, unit = None, 1.0
    if options.simple:
        scores, unit = products, options.scale * LOG2E
    else:
        scores = logits(options, products, bias)
        if options.softcap is not None:
            share = scores * (1 / (options.softcap * LOG2E))
            slope = 1.0 - share * share
    scores = mask_unless(whole, options, scores, side, keys, vectors)
    return jnp.exp2(scores * unit - side.along_queries(vectors["lse"])), slope


def score_gradient(
    whole: Any,
    options: Options,
    weights: Array,
    slope: Array | None,
    weight_gradient: Array,
    side: Side,
    keys: int,
    vectors: Mapping[str, Array],
) -> Array:
    """The gradient of the scores (in natural units, biased), from that of the weights that met the values.

    What is not attended to may be so large that its weight's gradient is infinite or not a number: 0 times that is 0.
    """
    if options.dropout_rate:
        keep = kept(options, side, vectors["a"], vectors["b"], vectors["g"])
        weight_gradient = jnp.where(keep, weight_gradient * (1 / (1 - options.dropout_rate)), 0.0)
    change = weight_gradient - side.along_queries(vectors["delta"])
    if can_mask(options, keys, side):
        change = lax.cond(whole, lambda c: c, lambda c: jnp.where(weights > 0.0, c, 0.0), change)
    gradient = weights * change
    return gradient if slope is None else gradient * slope


def kept(options: Options, side: Side, a: Array, b: Array, g: Array) -> Array:
    """Which elements dropout keeps: `hash.keep`, on a tile."""
    x = (side.along_keys(g) ^ side.along_queries(a)) * _M1 + side.along_queries(b)
    x = (x ^ (x >> np.uint32(16))) * _M2
    return x >= np.uint32(threshold(options.dropout_rate))


def transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The shared-memory tiling and swizzle of a matrix with so many columns."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if columns * size % s == 0)
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // size)), swizzling(swizzle)


def matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices that `wgmma` and the copy engine both read."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))


def ceil_to(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
