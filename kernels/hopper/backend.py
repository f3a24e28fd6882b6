"""Hopper backend: Pallas attention kernels for sm_90 (H100, H200), forward and backward.

This module prepares the call (padding, hash words, the bias in the kernels' layout), defines its derivative, and
partitions it over a mesh. The kernels are in `forward.py`, `backward.py` and `bias.py`, those for short rows in
`short.py`; shared code is in `tile.py`, `work.py` and `operands.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..bias import AlibiBias, DenseBias, DistanceKeys, RelativeBias, toeplitz_row
from ..call import Call
from ..split import Split, misfit, split_of, undeclared
from ..tuning import tuned
from . import short as hopper_short
from .backward import key_gradient, query_gradient
from .bias import bias_gradient
from .forward import forward
from .tile import LOG2E, MULTIPROCESSORS, Blocks, Options, ceil_to, compiling, interpreting, mode

__all__ = ["Blocks", "Tuning", "blocks_for", "compiling", "interpreting", "run", "supports"]

LARGEST_HEAD = 256

LONGEST_AXIS = 65535
"""Blocks along the second and third axis of a grid."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block sizes of the kernels, which tuning varies.

    Attributes:
      forward: tile sizes of the forward kernel.
      query_gradient: tile sizes of the kernel for dq.
      key_gradient: tile sizes of the kernel for dk and dv.
      bias_gradient: tile sizes of the kernel for the gradient of the bias.
      together: whether one kernel computes both dk and dv; two kernels need fewer registers.
      one_pass: pipeline stages of the short-row forward kernel; 0 selects the general kernel. A call that does not fit
        the short-row kernels uses the general ones in any case.
      fused: pipeline stages of the short-row backward kernel; likewise.
    """

    forward: Blocks
    query_gradient: Blocks
    key_gradient: Blocks
    bias_gradient: Blocks
    together: bool = True
    one_pass: int = 0
    fused: int = 0


def blocks_for(
    size: int, value_size: int, bias: str | None = None, *, dropout: bool = False, segments: bool = False
) -> Tuning:
    """Return the default tile sizes: the largest that registers and shared memory allow, found by compiling.

    Args:
      size: head size D of queries and keys.
      value_size: head size Dv of values.
      bias: None, "row" or "dense".
      dropout: whether there is dropout.
      segments: whether there are segment ids.
    """
    return dataclasses.replace(_tiles(size, value_size, bias, dropout, segments), one_pass=2, fused=2)


def rule(call: Call) -> Tuning:
    """Return `blocks_for` of a call."""
    size, value_size = (ceil_to(x.shape[3], 16) for x in (call.query, call.value))
    options = _options(call)
    dropout, segments = options.dropout_rate > 0, options.segments
    tuning = blocks_for(size, value_size, options.bias, dropout=dropout, segments=segments)
    plain = options.simple and not (dropout or segments) and call.sides == (None, None)
    if plain and max(size, value_size) <= 64:
        batch, queries, heads = call.query.shape[:3]
        larger = dataclasses.replace(tuning.forward, warpgroups=3)
        # Three groups keep the tensor cores busier than two, but their tiles fit fewer lengths.
        if _busiest(batch * heads, queries, larger) <= 1.05 * _busiest(batch * heads, queries, tuning.forward):
            return dataclasses.replace(tuning, forward=larger)
    return tuning


def _busiest(rows: int, queries: int, blocks: Blocks) -> int:
    """Return how many queries, padding among them, the busiest multiprocessor computes, of this many rows of heads."""
    return -(-rows * -(-queries // blocks.rows) // MULTIPROCESSORS) * blocks.rows


def _tiles(size: int, value_size: int, bias: str | None, dropout: bool, segments: bool) -> Tuning:
    large = max(size, value_size)
    if large <= 64:
        wide = 64 if bias == "dense" else 128
        query = 64 if bias or dropout else 128
        return Tuning(Blocks(2, wide, 2), Blocks(2, query, 2), Blocks(2, 64, 2), Blocks(2, 64, 2))
    if large <= 128:
        wide = 64 if bias or dropout else 128
        # Two accumulators of 64 x 128 leave no registers for a bias or for dropout bits.
        together = not (bias or dropout)
        # Nor do a dense bias's tiles leave shared memory for a second step.
        stages = 1 if bias == "dense" else 2
        backward = Blocks(2, 64, stages)
        return Tuning(Blocks(2, wide, stages), backward, backward, Blocks(2, 64, 1), together)
    forward = Blocks(1, 64, 1) if bias or dropout or segments else Blocks(2, 64, 1)
    return Tuning(forward, Blocks(1, 64, 1), Blocks(1, 64, 1), Blocks(1, 64, 1), together=False)


def supports(call: Call) -> str | None:
    """See `Backend`."""
    if isinstance(call.bias, DistanceKeys):
        return "no keys of distances; plain JAX has them"
    if call.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"expected bfloat16 or float16, found {call.query.dtype}"
    size, value_size = call.query.shape[3], call.value.shape[3]
    if max(size, value_size) > LARGEST_HEAD:
        return f"expected head sizes up to {LARGEST_HEAD}, found {size} and {value_size}"
    if mode() is None:
        found = jax.default_backend()
        if found == "gpu":
            found = f"compute capability {getattr(jax.local_devices()[0], 'compute_capability', 'unknown')}"
        if found != "compute capability 9.0":
            return f"needs a Hopper GPU (compute capability 9.0), found {found}"
        if reason := _miscompiled(call):
            return reason
    if reason := _beyond_the_grid(call):
        return reason
    split = split_of(call)
    return undeclared(call) if split is None else misfit(call, split)


def _miscompiled(call: Call) -> str | None:
    """Return why this CUDA compiles the call wrongly, or None."""
    version = _cuda_version()
    # Its ptxas miscompiles masks by position; jax refuses causal attention with it as well.
    if call.sides != (None, None) and 12080 <= version < 12091:
        return f"CUDA 12.8.0 to 12.9.0 compiles masks by position wrongly; expected another, found {version}"
    return None


def _cuda_version() -> int:
    """Return the version of CUDA's runtime, 12080 for 12.8; 0 if it is not known."""
    try:
        from jax._src.lib import cuda_versions  # where jax's own kernels ask
    except ImportError:
        return 0
    return 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def _beyond_the_grid(call: Call) -> str | None:
    """Return which axis of a kernel's grid would be too long, or None. (The first, batch rows, has 2^31 blocks.)"""
    queries, heads = call.query.shape[1:3]
    keys = call.key.shape[1]
    tuning = _tuning(call)
    axes = {
        "heads": heads,
        "tiles of queries": -(-queries // tuning.query_gradient.rows),
        "tiles of keys": -(-keys // tuning.key_gradient.rows),
    }
    if call.bias is not None:
        own = tuning.bias_gradient
        rows, columns = -(-queries // own.rows), -(-keys // own.columns)
        if isinstance(call.bias, DenseBias):
            axes["tiles of a dense bias"] = rows * columns
        else:
            axes["diagonals of tiles of a bias"] = columns + (rows - 1) * (own.rows // own.columns)
    for what, count in axes.items():
        if count > LONGEST_AXIS:
            return f"expected at most {LONGEST_AXIS} {what}, the length of a grid's axis, found {count}"
    return None


def _tuning(call: Call) -> Tuning:
    """Return the block sizes of a call: those of the tuning table or, where it has no row, `rule`'s."""
    return (tuned(call, Tuning) if mode() is None else None) or rule(call)


def run(call: Call, tuning: Tuning | None = None) -> tuple[Array, Array]:
    """See `Backend`. `tuning` overrides the tuning table and, where it has no row, `blocks_for`."""
    queries, keys, value_size = call.query.shape[1], call.value.shape[1], call.value.shape[3]
    options = _options(call)
    bias: dict[str, Array] = {}
    if isinstance(call.bias, DenseBias):
        bias["dense"] = call.bias.value.astype(jnp.float32) * LOG2E
    elif isinstance(call.bias, RelativeBias | AlibiBias):
        bias["row"] = toeplitz_row(call.bias, queries, keys) * LOG2E
    fixed: dict[str, Array] = {}
    if call.query_segment_ids is not None and call.key_segment_ids is not None:
        fixed = {"query_segments": call.query_segment_ids, "key_segments": call.key_segment_ids}
    words = call.dropout_words()
    if words is not None:
        fixed |= words._asdict()
    split = split_of(call)
    # The copy engine needs rows of a multiple of 16 bytes, `wgmma` steps of 16 elements; zeros leave products
    # unchanged.
    query, key = (_widen(x) for x in (call.query, call.key))
    value = _widen(call.value)
    out, lse = _attention(Plan(options, tuning or _tuning(call), split), query, key, value, bias, fixed)
    return out[..., :value_size], jnp.swapaxes(lse, 1, 2)


def short_stages(call: Call) -> dict[str, tuple[int, ...]]:
    """Return the numbers of stages with which a call fits each short-row kernel: tuning's choices besides 0."""
    options = _options(call)
    query, value = ((*x.shape[:3], ceil_to(x.shape[3], 16)) for x in (call.query, call.value))
    fits = {
        "one_pass": lambda n: hopper_short.fits_forward(options, query, value, n, call.query.dtype),
        "fused": lambda n: hopper_short.fits_backward(options, query, value, n),
    }
    return {kernel: tuple(n for n in range(1, 5) if fit(n)) for kernel, fit in fits.items()}


def _options(call: Call) -> Options:
    left, right = call.sides
    return Options(
        left=left,
        right=right,
        scale=call.scale,
        softcap=call.softcap,
        bias=None if call.bias is None else "dense" if isinstance(call.bias, DenseBias) else "row",
        segments=call.query_segment_ids is not None,
        dropout_rate=call.dropout_rate,
        interpret=mode() == "interpret",
    )


def _widen(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % 16)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a call that is static while tracing."""

    options: Options
    tuning: Tuning
    split: Split | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: Plan, query: Array, key: Array, value: Array, bias: Mapping[str, Array], fixed: Mapping[str, Array]
) -> tuple[Array, Array]:
    arrays = {"query": query, "key": key, "value": value, **bias, **fixed}
    out = _everywhere(plan, functools.partial(_forward, out_dtype=query.dtype), ("out", "lse"), arrays)
    return out["out"], out["lse"]


def _attention_forward(plan: Plan, *arguments: Any) -> tuple[tuple[Array, Array], Any]:
    if plan.options.bias is None:
        out, lse = _attention(plan, *arguments)
        return (out, lse), (*arguments, out, lse)
    # The gradient of a bias sums over many scores, and with them the output's rounding error, which enters through
    # `delta` and is the same along a whole row of scores. So the output is saved unrounded here.
    query, key, value, bias, fixed = arguments
    arrays = {"query": query, "key": key, "value": value, **bias, **fixed}
    exact = _everywhere(plan, functools.partial(_forward, out_dtype=jnp.float32), ("out", "lse"), arrays)
    out, lse = exact["out"], exact["lse"]
    return (out.astype(query.dtype), lse), (*arguments, out, lse)


def _attention_backward(plan: Plan, saved: tuple[Any, ...], gradients: tuple[Array, Array]) -> tuple[Any, ...]:
    query, key, value, bias, fixed, out, lse = saved
    gradient, lse_gradient = gradients
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=3).swapaxes(1, 2)
    # An empty row is exp2(score - inf) = 0 everywhere; its lse is constant, so any gradient for it is discarded.
    empty = lse == -jnp.inf
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "gradient": gradient,
        "lse": jnp.where(empty, jnp.inf, lse * LOG2E),
        "delta": jnp.where(empty, 0.0, delta - lse_gradient),
        **bias,
        **fixed,
    }
    grads = _everywhere(plan, _backward, ("query", "key", "value"), arrays)
    # Computed separately, so that it is eliminated as dead code where the gradient is not used.
    arrays = _after(plan, grads, arrays)
    bias_grads = _everywhere(plan, _bias_backward, tuple(bias), arrays) if bias else {}
    return grads["query"], grads["key"], grads["value"], bias_grads, dict.fromkeys(fixed)


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(plan: Plan, arrays: dict[str, Array], *, out_dtype: Any) -> dict[str, Array]:
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    options, stages = plan.options, plan.tuning.one_pass
    if hopper_short.fits_forward(options, query.shape, value.shape, stages, out_dtype):
        out, lse = hopper_short.forward(options, stages, query, key, value, arrays, out_dtype)
    else:
        out, lse = forward(options, plan.tuning.forward, query, key, value, arrays, out_dtype)
    return {"out": out, "lse": lse}


def _backward(plan: Plan, arrays: dict[str, Array]) -> dict[str, Array]:
    query, key, value, gradient = (arrays.pop(name) for name in ("query", "key", "value", "gradient"))
    arguments = (query, key, value, gradient, arrays)
    if hopper_short.fits_backward(plan.options, query.shape, value.shape, plan.tuning.fused):
        grads = hopper_short.backward(plan.options, plan.tuning.fused, *arguments)
        return dict(zip(("query", "key", "value"), grads, strict=True))
    query_grad = query_gradient(plan.options, plan.tuning.query_gradient, *arguments)
    arguments = _after(plan, query_grad, arguments)
    key_grads = functools.partial(key_gradient, plan.options, plan.tuning.key_gradient, *arguments)
    if plan.tuning.together:
        key_grad, value_grad = key_grads()
    else:
        (key_grad,) = key_grads(wanted=("k",))
        (value_grad,) = key_gradient(
            plan.options, plan.tuning.key_gradient, *_after(plan, key_grad, arguments), wanted=("v",)
        )
    return {"query": query_grad, "key": key_grad, "value": value_grad}


def _after[T](plan: Plan, previous: Any, arguments: T) -> T:
    """Return the arguments; in the interpreter, only after `previous`: concurrent kernels would share a thread pool."""
    return jax.lax.optimization_barrier((arguments, previous))[0] if plan.options.interpret else arguments


def _bias_backward(plan: Plan, arrays: dict[str, Array]) -> dict[str, Array]:
    query, key, value, gradient = (arrays.pop(name) for name in ("query", "key", "value", "gradient"))
    name = plan.options.bias
    assert name is not None
    axes: tuple[str, ...] = ()
    if plan.split is not None:
        # The gradient of what all rows, or all heads, share is the sum over the devices that hold them.
        shape = arrays[name].shape
        rows_shared = name == "row" or shape[0] == 1
        heads_shared = name == "dense" and shape[1] == 1
        axes = (plan.split.batch if rows_shared else ()) + (plan.split.heads if heads_shared else ())
    total = bias_gradient(plan.options, plan.tuning.bias_gradient, query, key, value, gradient, arrays)
    # The bias is in units of log2, its gradient so far in natural units.
    return {name: jax.lax.psum(total * (1 / LOG2E), axes) if axes else total * (1 / LOG2E)}


# One letter per dimension: b for batch rows, h for heads, a dot for a dimension that is never partitioned.
_AXES = {
    "query": "b.h.",
    "key": "b.h.",
    "value": "b.h.",
    "gradient": "b.h.",
    "out": "b.h.",
    "lse": "bh.",
    "delta": "bh.",
    "a": "bh.",
    "b": "bh.",
    "g": "b.",
    "query_segments": "b.",
    "key_segments": "b.",
    "row": "h.",
    "dense": "bh..",
}


def _everywhere(
    plan: Plan,
    compute: Callable[[Plan, dict[str, Array]], dict[str, Array]],
    results: tuple[str, ...],
    arrays: dict[str, Array],
) -> dict[str, Array]:
    """Run `compute` on each device of the mesh, for the rows and heads that it holds, so that nothing is gathered."""
    split = plan.split
    if split is None:
        return compute(plan, dict(arrays))

    def spec(name: str) -> P:
        axes = {"b": split.batch, "h": split.heads, ".": ()}
        if name in ("dense", "g"):  # may be the same for all rows, or heads
            axes |= {letter: () for letter, size in zip(_AXES[name], arrays[name].shape, strict=True) if size == 1}
        return P(*(axes[letter] or None for letter in _AXES[name]))

    specs = {name: spec(name) for name in arrays}
    if AxisType.Explicit in split.mesh.axis_types:  # Small arrays made for all heads are partitioned here.
        arrays = {name: jax.reshard(x, NamedSharding(split.mesh, specs[name])) for name, x in arrays.items()}
    return jax.shard_map(
        lambda local: compute(plan, dict(local)),
        mesh=split.mesh,
        in_specs=(specs,),
        out_specs={name: spec(name) for name in results},
        check_vma=False,
    )(arrays)
