"""TPU backend: Pallas attention kernels, forward and backward, partitioned over a mesh without any gather.

Rows of up to 256 tokens use the kernels in `short.py`, longer rows those in `long.py`. The latter take queries, keys
and values with the head axis before the token axis; XLA fuses that transposition into the surrounding projections where
it can. Lengths need not be multiples of the block size: the last block is masked, not padded.

float16 is computed in float32: the matrix unit has no float16, and bfloat16 would lose three bits. Dropout costs 7
integer operations per element and pass (`hash`), 2 of them multiplications; the bits are never stored.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..bias import AlibiBias, DenseBias, DistanceKeys, RelativeBias, toeplitz_row
from ..blocks import Area
from ..call import Call
from ..split import Split, misfit, split_of, undeclared
from ..tuning import tuned
from . import long as tpu_long
from . import short as tpu_short
from .frame import Tiling
from .tile import LANES, LOG2E, Cotangents, Meaning, Operands, ceil_to

LARGEST_HEAD = 256

SCALAR_MEMORY = 15 * 2**16
"""Bytes of scalar memory for the bounds of tiles and the segments in them: most of the 1 MiB that every chip has."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of the kernels, which tuning varies. They affect speed and summation order, not the result's meaning.

    Attributes:
      forward: tiling of the long-row forward kernel; its `chunk` counts keys.
      query: tiling of the long-row kernel for the query gradient; its `chunk` counts keys.
      key_value: tiling of the long-row kernel for the key and value gradients; its `chunk` counts queries.
      key_heads: maximum number of key heads per step of the short-row kernels; 0 selects the long-row kernels.
    """

    forward: Tiling
    query: Tiling
    key_value: Tiling
    key_heads: int


def choose_blocks(call: Call) -> Blocks:
    """Return block sizes that are reasonable on every chip, from the shapes alone.

    A step needs about 12 of the 16 MiB of VMEM that the oldest chip has: two chunks of each streamed operand (one is
    fetched while the other is used) and about six copies of a score tile.
    """
    length, heads, size = call.query.shape[1:]
    key_length, key_heads, v_size = call.value.shape[1:]
    group = heads // key_heads
    width = 2 if call.query.dtype == jnp.bfloat16 else 4
    lanes = ceil_to(size, LANES) + ceil_to(v_size, LANES)
    # Smaller tiles follow the segments more closely; larger tiles do more work per load of the matrix unit.
    small = call.query_segment_ids is not None or width * lanes > 1024
    most = 256 if small else 512

    def tile(length: int, most: int) -> int:
        parts = -(-length // most)
        return ceil_to(-(-length // parts), LANES)

    def chunk(length: int, tile: int, across: int) -> int:
        bytes_per_token = width * lanes
        if isinstance(call.bias, DenseBias):
            bytes_per_token = max(bytes_per_token, 2 * across * call.bias.value.dtype.itemsize)
        return tile * max(1, min(-(-length // tile), 2 * 2**20 // bytes_per_token // tile))

    q, k, half_q = tile(length, most), tile(key_length, most), tile(length, 256)
    # Seven operands and gradients per head, double-buffered.
    bytes_per_head = 7 * width * lanes * ceil_to(max(length, key_length), LANES)
    return Blocks(
        forward=Tiling(q, k, chunk(key_length, k, q)),
        query=Tiling(half_q, k, chunk(key_length, k, half_q)),
        key_value=Tiling(half_q, k, chunk(length, half_q, k)),
        key_heads=max(1, min(8, 6 * 2**20 // bytes_per_head) // group),
    )


@dataclasses.dataclass(frozen=True)
class _Mode:
    interpret: bool | pltpu.InterpretParams
    """As `pallas_call` takes it; False to compile."""


_mode: contextvars.ContextVar[_Mode | None] = contextvars.ContextVar("tpu_mode", default=None)


@contextlib.contextmanager
def interpreting(params: pltpu.InterpretParams | bool | None = None) -> Iterator[None]:
    """Run this backend on any device, in one of Pallas' interpreters, within the context. Slow; for tests.

    It applies to functions traced within the context; one that jit has already traced for the same shapes is
    unaffected.

    Args:
      params: parameters of the TPU interpreter (default: with its race detector on), or True for Pallas' plain
        interpreter, which does not detect races.
    """
    params = pltpu.InterpretParams(detect_races=True) if params is None else params
    token = _mode.set(_Mode(params))
    try:
        yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let this backend accept calls on machines without a TPU, within the context, to compile ahead of time for one."""
    token = _mode.set(_Mode(False))
    try:
        yield
    finally:
        _mode.reset(token)


def supports(call: Call) -> str | None:
    """See `Backend`."""
    if isinstance(call.bias, DistanceKeys):
        return "no keys of distances; plain JAX has them"
    if call.query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"expected float32, bfloat16 or float16, found {call.query.dtype}"
    if max(call.query.shape[3], call.value.shape[3]) > LARGEST_HEAD:
        return f"expected heads of at most {LARGEST_HEAD}, found {call.query.shape[3]} and {call.value.shape[3]}"
    if _mode.get() is None and jax.default_backend() != "tpu":
        return f"needs a TPU, found {jax.default_backend()}"
    split = split_of(call)
    reason = undeclared(call) if split is None else misfit(call, split)
    return reason or _beyond_scalar_memory(call, split)


def _beyond_scalar_memory(call: Call, split: Split | None) -> str | None:
    """Return why the kernels for long rows cannot hold in scalar memory what they know of all tiles, or None."""
    blocks, length, key_length = _blocks(call), call.query.shape[1], call.key.shape[1]
    if blocks.key_heads and max(length, key_length) <= tpu_short.LONGEST and not isinstance(call.bias, DenseBias):
        return None
    rows = call.query.shape[0]
    if split is not None:
        rows //= math.prod(split.mesh.shape[axis] for axis in split.batch)
    segmented = call.query_segment_ids is not None
    tilings = (blocks.forward, blocks.query, blocks.key_value)
    needed = 4 * rows * max(tiling.scalars_of_row(length, key_length, segmented=segmented) for tiling in tilings)
    if needed <= SCALAR_MEMORY:
        return None
    return (
        f"expected at most {SCALAR_MEMORY} bytes of scalar memory for the bounds of all tiles, "
        f"found {needed} of {rows} rows a device"
    )


def _blocks(call: Call) -> Blocks:
    """Return the block sizes of a call: those of the tuning table or, where it has no row, `choose_blocks`'s."""
    return (tuned(call, Blocks) if _mode.get() is None else None) or choose_blocks(call)


def kernels_of(call: Call, key_value: Tiling) -> tuple[str, ...]:
    """Return the kernels for long rows that a call runs: the fields of `Blocks` that matter, given that field."""
    length, heads, size = call.query.shape[1:]
    width = 2 if call.query.dtype == jnp.bfloat16 else 4
    together = tpu_long.fits_together(heads // call.key.shape[2], length, size, width, key_value)
    # The gradient of a dense bias has the tiles of the queries' kernel.
    alone = () if together and not isinstance(call.bias, DenseBias) else ("query",)
    return "forward", *alone, "key_value"


def run(call: Call, blocks: Blocks | None = None) -> tuple[Array, Array]:
    """See `Backend`. `blocks` overrides the tuning table and, where it has no row, `choose_blocks`."""
    mode = _mode.get() or _Mode(False)
    bias = None if call.bias is None else "dense" if isinstance(call.bias, DenseBias) else "row"
    length, key_length = call.query.shape[1], call.key.shape[1]
    plan = _Plan(
        meaning=Meaning(
            area=Area(length, key_length, *call.sides),
            scale=call.scale,
            softcap=call.softcap,
            rate=call.dropout_rate,
            segmented=call.query_segment_ids is not None,
            bias=bias,
        ),
        blocks=blocks or _blocks(call),
        interpret=mode.interpret,
        split=split_of(call),
    )
    # Computed here for all heads of all rows, so that a device that holds some of the heads gets their words.
    words = call.dropout_words()
    dtype = jnp.float32 if call.query.dtype == jnp.float16 else call.query.dtype
    dense = call.bias.value if isinstance(call.bias, DenseBias) else None
    if dense is not None and dense.dtype not in (jnp.float32, jnp.bfloat16):
        dense = dense.astype(jnp.float32)
    operands = Operands(
        query=call.query.astype(dtype),
        key=call.key.astype(dtype),
        value=call.value.astype(dtype),
        query_ids=call.query_segment_ids,
        key_ids=call.key_segment_ids,
        **{} if words is None else words._asdict(),
        row=toeplitz_row(call.bias, length, key_length) if isinstance(call.bias, RelativeBias | AlibiBias) else None,
        dense=dense,
    )
    out, lse = _attention(plan, operands)
    return out.astype(call.query.dtype), jnp.moveaxis(lse, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about a call that is static while tracing."""

    meaning: Meaning
    blocks: Blocks
    interpret: bool | pltpu.InterpretParams
    split: Split | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, operands: Operands) -> tuple[Array, Array]:
    return _split(plan, "forward", operands)


def _attention_forward(plan: _Plan, operands: Operands) -> tuple[tuple[Array, Array], Any]:
    out, lse = _attention(plan, operands)
    return (out, lse), (operands, out, lse)


def _attention_backward(plan: _Plan, saved: Any, gradients: tuple[Array, Array]) -> tuple[Operands]:
    operands, out, lse = saved
    out_gradient, lse_gradient = gradients
    delta = jnp.sum(out_gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = jnp.moveaxis(delta, 1, 2) - lse_gradient
    # The lse of a query without keys is constant: any gradient that arrives for it is discarded, even NaN.
    delta = jnp.where(lse == -jnp.inf, 0, delta)
    cotangents = Cotangents(out_gradient, lse * LOG2E, delta)
    query, key, value, row = _split(plan, "backward", operands, cotangents)
    return (
        Operands(
            query=query,
            key=key,
            value=value,
            query_ids=None,
            key_ids=None,
            row=None if row is None else jnp.sum(row, axis=0),
            # Computed separately, so that it is eliminated as dead code where the gradient is not used.
            dense=None if operands.dense is None else _split(plan, "dense", operands, cotangents),
        ),
    )


_attention.defvjp(_attention_forward, _attention_backward)


def _compute(plan: _Plan, what: str, operands: Operands, cotangents: Cotangents | None = None) -> Any:
    """Run one device's part of the pass `what`: "forward", "backward" or "dense" (the gradient of a dense bias)."""
    meaning, blocks, interpret = plan.meaning, plan.blocks, plan.interpret
    key_heads = tpu_short.heads_a_step(operands, blocks.key_heads)
    if key_heads and what == "forward":
        return tpu_short.forward(operands, meaning, key_heads, interpret)
    if key_heads and what == "backward":
        assert cotangents is not None
        return tpu_short.backward(operands, cotangents, meaning, key_heads, interpret)

    def turn(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 2)

    operands = operands._replace(query=turn(operands.query), key=turn(operands.key), value=turn(operands.value))
    if what == "forward":
        out, lse = tpu_long.forward(operands, meaning, blocks.forward, interpret)
        return turn(out), lse
    assert cotangents is not None
    cotangents = cotangents._replace(out=turn(cotangents.out))
    if what == "dense":
        return tpu_long.dense_gradient(operands, cotangents, meaning, blocks.query, interpret)
    heads, length, size = operands.query.shape[1:]
    group, width = heads // operands.key.shape[1], operands.query.dtype.itemsize
    together = tpu_long.fits_together(group, length, size, width, blocks.key_value)
    key, value, query, row = tpu_long.key_value_gradients(
        operands, cotangents, meaning, blocks.key_value, interpret, together=together
    )
    if query is None:
        query, row = tpu_long.query_gradient(operands, cotangents, meaning, blocks.query, interpret)
    return turn(query), turn(key), turn(value), row


def _split(plan: _Plan, what: str, operands: Operands, cotangents: Cotangents | None = None) -> Any:
    """Run `_compute` on each device of the mesh, for the rows and heads that it holds."""
    split = plan.split
    if split is None:
        return _compute(plan, what, operands, cotangents)
    shared = (False, False) if operands.dense is None else tuple(size == 1 for size in operands.dense.shape[:2])

    def spec(name: str, array: Any) -> P | None:
        if array is None:
            return None
        rows, heads = split.batch, split.heads
        if name == "dense":
            rows, heads = (() if one else axes for one, axes in zip(shared, (rows, heads), strict=True))
        elif name == "g" and array.shape[0] == 1:
            rows = ()
        return P(*({"b": rows, "h": heads}.get(letter) or None for letter in _AXES[name]))

    def local(operands: Operands, cotangents: Cotangents | None) -> Any:
        result = _compute(plan, what, operands, cotangents)
        if what == "dense":
            for one, axes in zip(shared, (split.batch, split.heads), strict=True):
                result = lax.psum(result, axes) if one and axes else result
        return result

    specs = (
        Operands(*map(spec, operands._fields, operands)),
        None if cotangents is None else Cotangents(*map(spec, cotangents._fields, cotangents)),
    )
    if AxisType.Explicit in split.mesh.axis_types:  # Small arrays made for all heads are partitioned here.
        operands, cotangents = jax.tree.map(
            lambda x, place: jax.reshard(x, NamedSharding(split.mesh, place)), (operands, cotangents), specs
        )
    results = tuple(spec(name, operands.row if name == "rows" else 0) for name in _RESULTS[what])
    return jax.shard_map(
        local,
        mesh=split.mesh,
        in_specs=specs,
        out_specs=results[0] if what == "dense" else results,
        check_vma=False,
    )(operands, cotangents)


_RESULTS = {
    "forward": ("out", "lse"),
    "backward": ("query", "key", "value", "rows"),
    "dense": ("dense",),
}

# One letter per dimension: b for batch rows, h for heads, a dot for a dimension that is never partitioned.
_AXES = {
    "query": "b.h.",
    "key": "b.h.",
    "value": "b.h.",
    "query_ids": "b.",
    "key_ids": "b.",
    "a": "bh.",
    "b": "bh.",
    "g": "b.",
    "row": "h.",
    "rows": "bh.",
    "dense": "bh..",
    "out": "b.h.",
    "lse": "bh.",
    "delta": "bh.",
}
