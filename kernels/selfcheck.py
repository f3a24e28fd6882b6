"""Self-check of kernels: compare a kernel with the reference on the current device.

A kernel that was tested in an interpreter and compiled for its chip has still not run on the chip. Before such a kernel
is selected automatically, it is therefore compared with the XLA backend, once per process: output and all gradients, on
rows that fill its blocks and rows that do not. That costs the compilation of a few small programs.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import backends
from .bias import RelativeBias
from .call import Call

# Length -> number of rows: short rows, and rows of several blocks. Both are more work than a chip can start at once, so
# that persistent blocks process several items in turn.
LENGTHS = {120: 20, 640: 2}
HEADS, KEY_HEADS, HEAD_SIZE, BUCKETS = 16, 8, 64, 32
MARGIN = 2.0  # allowed error, as a multiple of the XLA backend's error in the same precision


@cache
def agrees(name: str, dtype: str) -> bool:
    """Tell whether backend `name` agrees with the XLA backend in `dtype`; warn if it does not.

    Errors are measured against the float32 result, and may be `MARGIN` times the XLA backend's own error in `dtype`.
    """
    # Use a separate thread, since this one may be tracing a program, during which nothing can be computed.
    with ThreadPoolExecutor(1) as thread:
        failure = thread.submit(_difference, name, dtype).result()
    if failure is None:
        return True
    warnings.warn(
        f"attention: the {name} kernel failed its self-check and is not used: {failure} on "
        f"{jax.devices()[0].device_kind}. Please report this. To use it anyway, select it by name.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _difference(name: str, dtype: str) -> str | None:
    """Return what went wrong, or None."""
    with jax.default_device(jax.local_devices()[0]):
        for length, batch in LENGTHS.items():
            inputs = _inputs(length, batch)
            truth = _run("xla", "float32", inputs)
            usual = _run("xla", dtype, inputs)
            try:
                found = _run(name, dtype, inputs)
            except Exception as error:
                return f"it failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            for what, value in found.items():
                error, allowed = (float(np.abs(other[what] - truth[what]).max()) for other in (found, usual))
                scale = float(np.abs(truth[what]).max())
                # Allow rounding of the last bit even if the XLA result happens to be exact.
                if not np.isfinite(value).all() or error > MARGIN * max(allowed, scale * float(jnp.finfo(dtype).eps)):
                    return f"its {what} has an error of {error:.2g}, more than {MARGIN:g} x {allowed:.2g}"
    return None


def _inputs(length: int, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    ends = np.sort(rng.choice(np.arange(1, length), (batch, 3)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1)
    segments[:, length - 7 :] = 0
    shapes = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS, "cotangent": HEADS}
    arrays = {what: rng.normal(size=(batch, length, heads, HEAD_SIZE)) for what, heads in shapes.items()}
    return {**arrays, "table": rng.normal(size=(BUCKETS, HEADS)), "segments": segments.astype(np.int32)}


def _run(name: str, dtype: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the output and gradients, in float32 on the host."""

    def loss(parts: dict[str, Array], segments: Array, cotangent: Array) -> tuple[Array, Array]:
        call = Call.of(
            query=parts["query"],
            key=parts["key"],
            value=parts["value"],
            bias=RelativeBias(parts["table"]),
            query_segment_ids=segments,
            key_segment_ids=segments,
            dropout_rate=0.1,
            dropout_seed=jnp.asarray([1, 2], jnp.uint32),
        )
        out, _ = backends.BACKENDS[name].run(call)
        return (out.astype(jnp.float32) * cotangent).sum(), out

    # Round once, so that every precision starts from the same numbers.
    parts: dict[str, Any] = {
        what: jnp.asarray(inputs[what], jnp.bfloat16).astype(dtype) for what in ("query", "key", "value")
    }
    parts["table"] = jnp.asarray(inputs["table"], jnp.float32)
    cotangent = jnp.asarray(inputs["cotangent"], jnp.bfloat16).astype(jnp.float32)
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(parts, jnp.asarray(inputs["segments"]), cotangent)
    results = {"output": out} | {f"gradient of {what}": gradient for what, gradient in gradients.items()}
    return {what: np.asarray(value.astype(jnp.float32)) for what, value in results.items()}
