"""Shared by the Hopper kernels: the static facts of a call, and the arithmetic of one score tile.

A tile is a block of scores in the registers of one warpgroup, as `wgmma` leaves them. In the forward pass and for dq
its rows are queries and its columns keys; for dk and dv it is transposed. `Side` says which: the vectors of the queries
run along `axis` 0 or 1, those of the keys along the other.

Scores are base-2 logarithms (`exp2` is the hardware's native exponential): `scale` and the bias include log2(e).
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
"""Rows of one `wgmma`, and thus of every warpgroup's tile."""

MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM): the size of a persistent grid. It affects load balance, not correctness."""

SHARED_MEMORY = 227 * 1024 - 4096
"""Bytes of shared memory available to a block, minus barriers and alignment."""

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("hopper_mode", default=None)


@contextlib.contextmanager
def interpreting(*, detect_races: bool = True) -> Iterator[None]:
    """Run the kernels on the CPU within the context, in Pallas' GPU interpreter, which detects races. Slow; for tests.

    It applies to functions traced within the context; one that jit has already traced for the same shapes is
    unaffected. The interpreter blocks a thread of XLA's pool for each waiting warpgroup: with fewer than four threads
    it may hang (`JAX_NUM_CPU_DEVICES=8` makes the pool large enough everywhere).
    """
    token = _mode.set("interpret")
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let this backend accept calls on machines without a GPU, within the context, to compile ahead of time for one."""
    token = _mode.set("compile")
    try:
        yield
    finally:
        _mode.reset(token)


def mode() -> str | None:
    """Return "interpret" or "compile" within `interpreting` or `compiling`, else None."""
    return _mode.get()


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of one kernel, which tuning may vary; `backend.blocks_for` gives the defaults.

    Attributes:
      warpgroups: consumer warpgroups of a block, each with 64 rows of its own.
      columns: keys (forward, dq, gradient of the bias) or queries (dk and dv) per step; a multiple of 64.
      stages: number of steps held in shared memory at once.
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
    """Static facts of a call, besides shapes and dtypes. Hashable: it is part of the key of compiled kernels."""

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
        """Whether a score is its product times a positive number, so that the maximum can be found before scaling."""
        return self.bias is None and self.softcap is None and self.scale > 0


@dataclasses.dataclass(frozen=True)
class Side:
    """Position of a tile: its first query and key (traced), its shape, and the axis that the queries run along.

    `sums_over_keys` says that something is summed over the tile's keys, so that those beyond the last must have weight
    0. Keys that are only rows of dk and dv need no masking: rows beyond the last are never stored.
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
        """Return the index, within the tile, of each query (if `axis` is that of the queries) or key: a vector."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return plgpu.broadcasted_iota(jnp.int32, (self.shape[axis],), 0, layout=layout)


def zeros(shape: tuple[int, ...], axis: int | None = None, fill: float = 0.0) -> Array:
    """Create a float32 array in registers, in `wgmma`'s layout, or a vector along `axis` of such a tile."""
    layout = plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def product(*pairs: tuple[Any, Any], then: Callable[[], None] | None = None) -> Array:
    """Sum all a @ b, both in shared memory, in float32; `then` runs once they are issued, before they are awaited."""

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
    """Compute [c + a() @ b for each (c, a, b)], with a() in registers and b in shared memory.

    All products are issued, one after the other, before any is awaited: `a` overlaps with the products before it, and
    `then` with all of them. The interpreter supports neither accumulators with an initial value nor `wgmma` from
    registers, so it computes plain products.
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


def beside[T: Sequence[Array]](
    options: Options,
    pair: tuple[Any, Any],
    other: tuple[Array, Array, Any],
    then: Callable[[], None],
    make: Callable[[Array, T], T],
    made: T,
) -> tuple[Array, T]:
    """Return c + a @ b of `other`, (c, a, b), and what `make` makes of the product of `pair` while that is computed.

    `pair`, in shared memory, is issued first, then `other`, with c and a in registers and b in shared memory; then come
    `then` and `make`, which also gets `made`: what it made last time, or arrays of the same kind. Sums too wide to
    leave registers for both a and what is made are awaited before `make`.
    """
    c, a, b = other
    if options.interpret:
        products = product(pair, then=then)
        (total,) = accumulate(options, [(c, lambda: a, b)])
        return total, make(products, made)

    def body(refs: Any) -> None:
        accumulator, *results = refs
        before: Any = tuple(ref[...] for ref in results)

        def products(first: Any) -> None:
            plgpu.wgmma(first, *pair)
            plgpu.wgmma(accumulator, a, b)
            then()
            product = plgpu.wgmma_accumulator_load(first, wait_n=1 if c.shape[1] <= 128 else 0)
            for ref, value in zip(results, make(product, before), strict=True):
                ref[...] = value

        pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((pair[0].shape[0], pair[1].shape[1]), jnp.float32))

    start: Any = (plgpu.WGMMAAccumulatorRef.init(c), *made)
    total, *made_now = pl.run_state(body)(start)
    result: Any = tuple(made_now)
    return total, result


def rescaled(options: Options, sums: Array, factors: Array) -> Array:
    """Multiply each row of `sums` by its factor. A warp none of whose factors differs from 1 leaves that out."""
    if options.interpret:
        return sums * lax.broadcast_in_dim(factors, sums.shape, [0])

    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, nvvm, scf, vector

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, np.dtype(np.float32), layout=plgpu.Layout.WGMMA),
    )
    def multiply(_: Any, sums: Any, factors: Any) -> Any:
        bit = ir.IntegerType.get_signless(1)
        differs: Any = mgpu.c(0, bit)
        for register in factors.registers.flat:
            other = arith.cmpf(arith.CmpFPredicate.UNE, register, mgpu.c(1.0, register.type))
            differs = arith.ori(differs, vector.extract(other, [], [0]) if other.type != bit else other)
        differs = nvvm.vote_sync(mgpu.c(0xFFFFFFFF, ir.IntegerType.get_signless(32)), differs, nvvm.VoteSyncKind.any)
        branch: Any = scf.IfOp(differs, [register.type for register in sums.registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            product = sums * factors.broadcast_in_dim(sums.shape, (0,), sums.layout)
            scf.yield_(list(product.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(sums.registers.flat))
        registers = np.empty(sums.registers.shape, dtype=object)
        registers.flat = list(branch.results)
        return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)

    tile: Any = multiply
    return tile(sums, factors)


def two_products(pairs: Sequence[tuple[Any, Any]], between: Callable[[Array], Any]) -> tuple[Any, Array]:
    """Return `between(first product)` and the second product, computed concurrently. All operands in shared memory."""

    def body(first: Any, second: Any) -> tuple[Any, Array]:
        for accumulator, (a, b) in zip((first, second), pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        result = between(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return result, second[...]

    accumulators = [plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs]
    return pl.run_scoped(body, *accumulators)


def four_products(
    options: Options,
    pairs: Sequence[tuple[Any, Any]],
    sums: Sequence[Array],
    first: Callable[[Array], tuple[Any, Array]],
    second: Callable[[Any, Array], Array],
    others: Sequence[Any],
) -> list[Array]:
    """Add two products to `sums`, each of what is made of one of two other products, all overlapped.

    `first` makes of pair 0's product something to keep, and what is multiplied by `others[0]` and added to `sums[0]`:
    that product is issued before pair 1's is awaited. `second` makes of what was kept and pair 1's product what is
    multiplied by `others[1]` and added to `sums[1]`. Operands are in shared memory, but for what the two make.
    """
    if options.interpret:
        kept, product_of_pair = two_products(pairs, lambda x: first(x))
        made = [kept[1], second(kept[0], product_of_pair)]
        return accumulate(options, [(c, lambda a=a: a, b) for c, a, b in zip(sums, made, others, strict=True)])

    def body(accumulators: Any) -> None:
        def products(*temporary: Any) -> None:
            for accumulator, (a, b) in zip(temporary, pairs, strict=True):
                plgpu.wgmma(accumulator, a, b)
            kept, made = first(plgpu.wgmma_accumulator_load(temporary[0], wait_n=1))
            plgpu.wgmma(accumulators[0], made, others[0])
            plgpu.wgmma(accumulators[1], second(kept, plgpu.wgmma_accumulator_load(temporary[1], wait_n=1)), others[1])

        shapes = [plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs]
        pl.run_scoped(products, *shapes)

    start: Any = tuple(plgpu.WGMMAAccumulatorRef.init(c) for c in sums)
    return list(pl.run_state(body)(start))


def release() -> None:
    """Order this warpgroup's loads from shared memory before the copies that will overwrite it.

    Loads use the generic proxy, the copy engine the asynchronous one; a barrier alone does not order the two. (Memory
    that only `wgmma` has read needs no fence.)
    """
    plgpu.commit_smem()


def toeplitz_tile(options: Options, row: Any, side: Side) -> Array:
    """Build a tile from a Toeplitz row's part in shared memory: element (query, key) is `row[key - query + queries -
    1]`.

    `row` holds at least the queries + keys - 1 distances of the tile.
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
    """Turn products of queries and keys into scores in units of log2: scaled, biased, capped, not yet masked."""
    if options.softcap is None:
        scores = products * (options.scale * LOG2E)
        # The bias is already in units of log2.
        return scores if bias is None else scores + bias
    scores = products * (options.scale / options.softcap)
    scores = scores if bias is None else scores + bias * (1 / (options.softcap * LOG2E))
    return tanh(scores) * (options.softcap * LOG2E)


def tanh(x: Array) -> Array:
    """Compute tanh(x) by `exp2`, with an error of 2**-22; the hardware's tanh has 2**-11, too coarse for a softcap."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2E)))


def masked(
    options: Options, scores: Array, side: Side, keys: int, query_segments: Array | None, key_segments: Array | None
) -> Array:
    """Set scores to -inf where a query may not attend to a key. `keys` is the total number of keys, S."""
    keep: Array | None = None

    def both(a: Array | None, b: Array) -> Array:
        return b if a is None else a & b

    if options.left is not None or options.right is not None:
        # Compare each query's bounds with key indices: a thread keeps a few of both, not one distance per element.
        place = side.along_keys(side.places(1 - side.axis))
        own = side.places(side.axis) + (side.query - side.key)
        if options.left is not None:
            keep = both(keep, place >= side.along_queries(own - options.left))
        if options.right is not None:
            keep = both(keep, place <= side.along_queries(own + options.right))
    if options.segments:
        assert query_segments is not None
        assert key_segments is not None
        # Padding equals nothing, nor do positions beyond the last key; see `pad_ids`.
        keep = both(keep, side.along_queries(query_segments) == side.along_keys(key_segments))
    elif side.sums_over_keys and keys % side.shape[1 - side.axis]:
        keep = both(keep, side.along_keys(side.places(1 - side.axis)) < keys - side.key)
    return scores if keep is None else jnp.where(keep, scores, -jnp.inf)


def can_mask(options: Options, keys: int, side: Side) -> bool:
    """Tell whether any tile of this shape needs mask code at all."""
    limited = options.left is not None or options.right is not None or options.segments
    return limited or (side.sums_over_keys and keys % side.shape[1 - side.axis] != 0)


def mask_unless(
    whole: Any,
    options: Options,
    scores: Array,
    side: Side,
    keys: int,
    segments: Callable[[], tuple[Array | None, Array | None]],
) -> Array:
    """Apply `masked` unless the tile is known to be unmasked; only then ask for the ids of queries and keys."""
    if not can_mask(options, keys, side):
        return scores
    return lax.cond(whole, lambda s: s, lambda s: masked(options, s, side, keys, *segments()), scores)


def recomputed(
    whole: Any,
    options: Options,
    products: Array,
    bias: Array | None,
    side: Side,
    keys: int,
    vectors: Mapping[str, Array],
) -> tuple[Array, Array | None]:
    """Recompute the weights in the backward pass, and the softcap's factor of the scores' gradient.

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
    ids = vectors.get("query_segments"), vectors.get("key_segments")
    scores = mask_unless(whole, options, scores, side, keys, lambda: ids)
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
    """Compute the gradient of the biased scores (in natural units) from that of the weights after dropout.

    Keys that are not attended to may be so large that the gradient of their weight is infinite or NaN; the result is 0.
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
    """Return which elements dropout keeps: `hash.keep` on a tile."""
    x = (side.along_keys(g) ^ side.along_queries(a)) * _M1 + side.along_queries(b)
    x = (x ^ (x >> np.uint32(16))) * _M2
    return x >= np.uint32(threshold(options.dropout_rate))


def transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Return the shared-memory tiling and swizzle of a matrix with `columns` columns."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if columns * size % s == 0)
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // size)), swizzling(swizzle)


def matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describe shared memory for a matrix that both `wgmma` and the copy engine access."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))


def ceil_to(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
