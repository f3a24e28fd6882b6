"""cuDNN backend: jax.nn's cuDNN path for NVIDIA GPUs without kernels of ours, for the calls it computes exactly.

These are plain, causal and (causal) windowed attention in 16 bits. Everything else is refused, with the reason, rather
than approximated: cuDNN draws its own dropout bits; adds masks and biases as [L, S] arrays rounded to 16 bits, so that
a large score would leak through a mask; does not support rows without keys; and has a softcap only as a separate
program.

`jax.nn.dot_product_attention` rounds lse to 16 bits and gives it no gradient. This module therefore calls the functions
beneath it and adds lse's gradient. (They are in a private module of jax; `supports` reports it if a version has moved
them.) cuDNN's backward pass may sum in a different order from run to run, unless XLA is given
`--xla_gpu_exclude_nondeterministic_ops`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from .call import Call

try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
except ImportError:  # pragma: no cover - a version of jax to come
    fused = None

LARGEST_HEAD = 128
OLDEST = (8, 0)
"""Compute capability of the oldest GPUs (Ampere) that cuDNN's attention runs on."""


def supports(call: Call) -> str | None:
    """See `Backend`."""
    return meaning_differs(call) or device_lacks(call)


def meaning_differs(call: Call) -> str | None:
    """Return in what respect cuDNN would not compute the call as `attention` defines it, or None."""
    size, value_size = call.query.shape[3], call.value.shape[3]
    length, keys = call.query.shape[1], call.key.shape[1]
    left, right = call.sides
    if call.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"expected bfloat16 or float16, found {call.query.dtype}"
    if size != value_size or size % 8 or size > LARGEST_HEAD:
        return (
            f"expected one head size of queries, keys and values, a multiple of 8 up to {LARGEST_HEAD}, "
            f"found {size} and {value_size}"
        )
    if call.query_segment_ids is not None:
        return "segment ids would be added to the scores as an [L, S] array, through which a large score can leak"
    if call.bias is not None:
        return "a bias would be materialised as [H, L, S] and rounded to 16 bits"
    if call.softcap is not None:
        return "no softcap"
    if call.dropout_rate:
        return "its dropout draws other bits"
    if right not in (None, 0) or (right is None and left is not None):
        return f"a window must be causal, or end at the query itself: found ({left}, {right})"
    if right == 0 and length != keys:
        return f"causal attention between unequal lengths, {length} queries and {keys} keys"
    return None


def device_lacks(call: Call) -> str | None:
    """Return why cuDNN's attention cannot run on the default device or over the call's mesh, or None."""
    if fused is None:
        return "this version of jax keeps cuDNN's attention elsewhere"
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, found {jax.default_backend()}"
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    try:
        number = tuple(int(part) for part in str(capability).split("."))
    except ValueError:
        number = ()
    if number < OLDEST:
        return f"needs an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later, found {capability}"
    if AxisType.Explicit in jax.typeof(call.query).sharding.mesh.axis_types:
        return "the mesh's axes are explicit"
    try:
        fused.check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    return None


def run(call: Call) -> tuple[Array, Array]:
    """See `Backend`."""
    left, right = call.sides
    out, lse = _attention(_Rule(call.scale, right == 0, left), call.query, call.key, call.value)
    return out, jnp.swapaxes(lse, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """Static facts of a call."""

    scale: float
    causal: bool
    left: int | None


def _fused(rule: _Rule, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Compute the output [B, L, H, D] and lse [B, H, L], float32, by cuDNN, which ignores the gradient of lse."""
    assert fused is not None
    result: Any = fused.dot_product_attention(
        query,
        key,
        value,
        scale=rule.scale,
        mask_type=fused.MaskType.CAUSAL if rule.causal else fused.MaskType.NO_MASK,
        # The length includes the query itself.
        sliding_window_length=None if rule.left is None else rule.left + 1,
        return_residual=True,
    )
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule: _Rule, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    return _fused(rule, query, key, value)


def _attention_forward(rule: _Rule, *arguments: Any) -> tuple[tuple[Array, Array], Any]:
    query, key, value = (argument.value for argument in arguments)
    (out, lse), pull = jax.vjp(functools.partial(_fused, rule), query, key, value)
    return (out, lse), (pull, query, key)


def _attention_backward(rule: _Rule, saved: Any, cotangents: tuple[Any, Any]) -> tuple[Array, Array, Array]:
    pull, query, key = saved
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, query.dtype)
    nothing = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    d_query, d_key, d_value = pull((d_out, nothing))
    if not isinstance(d_lse, SymbolicZero):
        # The derivative of lse by a score is the score's weight. So its gradient by the query is the weighted mean of
        # the keys, i.e. attention with the keys as values; and by the key it is what that call gives as the values'
        # gradient.
        weighted = jnp.swapaxes(d_lse, 1, 2)[..., None] * rule.scale
        mean, pull = jax.vjp(lambda value: _fused(rule, query, key, value)[0], key)
        d_query = (d_query + weighted * mean).astype(query.dtype)
        (of_keys,) = pull((weighted * query).astype(query.dtype))
        d_key = d_key + of_keys
    return d_query, d_key, d_value


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)
