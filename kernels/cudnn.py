"""The cuDNN backend: NVIDIA GPUs that have no kernels of our own take jax.nn's cuDNN path, where it means the same.

It does for plain, causal and (causal) windowed attention in 16 bits. All else is refused, with the reason, rather than
computed nearly: cuDNN draws dropout's bits its own way; adds masks and biases written out [L, S] and rounded to 16
bits, so that a large score would shine through a mask; has no row without keys; and reaches a softcap only by a program
of its own.

`jax.nn.dot_product_attention` rounds lse to 16 bits and gives it no gradient. So what it calls is called here, and
lse's gradient added. (It is a private module of jax: `supports` says so where a version has moved it.) cuDNN's backward
pass may add up in another order from run to run, unless XLA is told `--xla_gpu_exclude_nondeterministic_ops`.
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
    """What cuDNN, wherever it runs, would not compute as `attention` says; None where it would."""
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
        return "segment ids would be written out [L, S] and added to the scores, where a large score shines through"
    if call.bias is not None:
        return "a bias would be written out [H, L, S] and rounded to 16 bits"
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
    """Why cuDNN's attention cannot run on the default device, or over the mesh of the call; None where it can."""
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
    """What is static in a call."""

    scale: float
    causal: bool
    left: int | None


def _fused(rule: _Rule, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """cuDNN's output [B, L, H, D] and lse [B, H, L], float32; the gradient that reaches it through lse is ignored."""
    assert fused is not None
    result: Any = fused.dot_product_attention(
        query,
        key,
        value,
        scale=rule.scale,
        mask_type=fused.MaskType.CAUSAL if rule.causal else fused.MaskType.NO_MASK,
        # Counted with the query itself.
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
        # lse's gradient with regard to a score is the score's weight. So the query's is the attended mean of the keys:
        # attention with the keys as values; and the key's is what, there, the values' would be.
        weighted = jnp.swapaxes(d_lse, 1, 2)[..., None] * rule.scale
        mean, pull = jax.vjp(lambda value: _fused(rule, query, key, value)[0], key)
        d_query = (d_query + weighted * mean).astype(query.dtype)
        (of_keys,) = pull((weighted * query).astype(query.dtype))
        d_key = d_key + of_keys
    return d_query, d_key, d_value


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)
