"""Contestants of the attention benchmark: our backends, and every other implementation that is installed.

Each is a function from a case's arrays to the output. It refuses unsupported cases with a reason; an error becomes a
reason too. A peer without segment ids gets packed rows as a boolean mask [B, 1, L, S], and every peer gets a relative
bias as an array [1, H, L, S] built by differentiable code, since that is how they are used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..backends import BACKENDS
from ..bias import dense_bias
from ..dispatch import attention
from .cases import Arrays, Case, bias_of
from .timing import Seconds, time_jax

Attend = Callable[[Case, Arrays], Any]

OURS = "bestiary"


class Refused(Exception):
    """Raised, with the reason, by a contestant that does not support a case."""


class Runner(Protocol):
    """A contestant, set up with the arrays of one case."""

    def results(self) -> dict[str, np.ndarray]:
        """Return the output and gradients for the first set of inputs, float32."""
        ...

    def forward(self) -> Seconds: ...

    def backward(self) -> Seconds:
        """Time the gradients alone, from what the forward pass has saved."""
        ...


class JaxRunner:
    """Runner of a JAX function. See `Runner`."""

    def __init__(self, attend: Attend, case: Case, sets: Sequence[Arrays], timing: dict[str, Any]) -> None:
        self.case, self.sets, self.timing, self.attend = case, sets, timing, attend

    def _call(self, inputs: Arrays, *primals: Any) -> Any:
        query, key, value, *parameter = primals
        changed = {"parameter": parameter[0]} if parameter else {}
        return self.attend(self.case, inputs._replace(query=query, key=key, value=value, **changed))

    def _primals(self, inputs: Arrays) -> tuple[Any, ...]:
        always = (inputs.query, inputs.key, inputs.value)
        return always if inputs.parameter is None else (*always, inputs.parameter)

    def _pass(self, inputs: Arrays) -> tuple[Any, Any]:
        """Return the output, and the function from its gradient to the input gradients, with the saved residuals."""
        return jax.vjp(functools.partial(self._call, inputs), *self._primals(inputs))

    def results(self) -> dict[str, np.ndarray]:
        inputs = self.sets[0]

        @jax.jit
        def both(inputs: Arrays) -> Any:
            out, pull = self._pass(inputs)
            return out, pull(inputs.wave)

        out, gradients = both(inputs)
        if inputs.segment_ids is not None:
            out = jnp.where((inputs.segment_ids != 0)[:, :, None, None], out, 0)
        names = ("query", "key", "value", "bias")[: len(gradients)]
        found = {"output": out, **dict(zip(names, gradients, strict=True))}
        return {name: np.asarray(x, np.float32) for name, x in found.items()}

    def forward(self) -> Seconds:
        return time_jax(lambda inputs: self.attend(self.case, inputs), [(x,) for x in self.sets], **self.timing)

    def backward(self) -> Seconds:
        kept = jax.jit(lambda inputs: self._pass(inputs)[1])
        sets = [(kept(inputs), inputs.wave) for inputs in self.sets]
        return time_jax(lambda pull, wave: pull(wave), sets, **self.timing)


def ours(name: str, case: Case, inputs: Arrays) -> Any:
    """Run one of our own backends."""
    dropout = {"dropout_rate": case.dropout, "dropout_seed": inputs.seed} if case.dropout else {}
    return attention(
        inputs.query,
        inputs.key,
        inputs.value,
        bias=bias_of(case, inputs.parameter),
        causal=case.causal,
        window=case.window,
        query_segment_ids=inputs.segment_ids,
        key_segment_ids=inputs.segment_ids,
        implementation=name,
        **dropout,
    )


def _dense(case: Case, inputs: Arrays) -> dict[str, Any]:
    """Return bias and mask as arrays, for peers that support nothing else. Padding attends to padding: no row is empty.

    The window is in the form that jax.nn and tokamax take.
    """
    bias = bias_of(case, inputs.parameter)
    ids = inputs.segment_ids
    windowed = case.window != (None, None)
    far = case.queries + case.keys  # no limit
    return {
        "local_window_size": tuple(far if side is None else side for side in case.window) if windowed else None,
        "bias": None if bias is None else dense_bias(bias, case.queries, case.keys).astype(case.dtype),
        "mask": None if ids is None else (ids[:, :, None] == ids[:, None, :])[:, None],
    }


def jax_nn(implementation: str, case: Case, inputs: Arrays) -> Any:
    """Run jax.nn.dot_product_attention."""
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Refused("needs an NVIDIA GPU")
    named: Any = implementation
    return jax.nn.dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=case.causal, implementation=named, **_dense(case, inputs)
    )


def tokamax(implementation: str, case: Case, inputs: Arrays) -> Any:
    """Run tokamax.dot_product_attention."""
    module: Any = importlib.import_module("tokamax")
    return module.dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=case.causal,
        implementation=implementation,
        **_dense(case, inputs),
    )


def splash(case: Case, inputs: Arrays, interpret: bool = False) -> Any:
    """Run splash attention, JAX's own Pallas kernels for TPU. It supports segment ids but no bias."""
    if jax.default_backend() != "tpu" and not interpret:
        raise Refused("needs a TPU")
    if case.bias != "none":
        raise Refused("has no bias")
    if case.heads != case.key_heads or case.queries % 128 or case.keys % 128:
        raise Refused("needs as many key heads as query heads, and lengths that are multiples of 128")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # Its default of 128 is slow; in practice it is used with the largest block of up to 512 that divides the length.
    q, k = (next(size for size in (512, 256, 128) if length % size == 0) for length in (case.queries, case.keys))
    shape = case.queries, case.keys
    if case.window == (None, None):
        mask = (masks.CausalMask if case.causal else masks.FullMask)(shape)
    else:
        mask = masks.LocalMask(shape, window_size=case.sides, offset=0)
    make: Any = kernel.make_splash_mha
    run = make(
        masks.MultiHeadMask([mask] * case.heads),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        block_sizes=kernel.BlockSizes(
            block_q=q,
            block_kv=k,
            block_kv_compute=k,
            block_q_dkv=q,
            block_kv_dkv=k,
            block_kv_dkv_compute=k,
            block_q_dq=q,
            block_kv_dq=k,
        ),
    )
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (inputs.query, inputs.key, inputs.value))
    query = (query * case.size**-0.5).astype(query.dtype)
    ids = inputs.segment_ids
    segments = None if ids is None else kernel.SegmentIds(ids, ids)
    out = jax.vmap(run, in_axes=(0, 0, 0, None if segments is None else 0))(query, key, value, segments)
    return jnp.swapaxes(out, 1, 2).astype(inputs.query.dtype)


class TorchRunner:
    """Runner of PyTorch's scaled_dot_product_attention, on its own device. See `Runner`."""

    def __init__(self, case: Case, sets: Sequence[Arrays], timing: dict[str, Any]) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        if jax.default_backend() == "tpu":
            raise Refused("runs on no TPU")
        if jax.default_backend() == "gpu" and not torch.cuda.is_available():
            raise Refused("is installed without CUDA")
        self.torch, self.case, self.timing = torch, case, timing
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.sets = [self._inputs(inputs) for inputs in sets]

    def _tensor(self, x: Any, dtype: Any = None) -> Any:
        """Copy an array to PyTorch through the host, since the two libraries share no device memory."""
        return self.torch.tensor(np.asarray(x.astype(jnp.float32))).to(self.device, dtype or self.torch.float32)

    def _inputs(self, inputs: Arrays) -> Any:
        torch = self.torch
        dtype = getattr(torch, self.case.dtype)
        # [B, H, L, D], contiguous, as in a model that has transposed once.
        parts = [
            self._tensor(jnp.swapaxes(x, 1, 2), dtype).contiguous().requires_grad_()
            for x in (inputs.query, inputs.key, inputs.value)
        ]
        if inputs.parameter is not None:
            parts.append(self._tensor(inputs.parameter).requires_grad_())
        ids = None if inputs.segment_ids is None else torch.tensor(np.asarray(inputs.segment_ids), device=self.device)
        return parts, self._tensor(jnp.swapaxes(inputs.wave, 1, 2), dtype), ids

    def _bias(self, parameter: Any) -> Any:
        torch, case = self.torch, self.case
        if case.bias == "dense":
            return parameter
        distance = jnp.arange(case.keys)[None] - jnp.arange(case.queries)[:, None]
        if case.bias == "alibi":
            steps = torch.tensor(np.array(jnp.abs(distance)), device=self.device)
            return (-parameter[:, None, None] * steps)[None]
        from ..bias import relative_position_bucket

        bucket = relative_position_bucket(distance, bidirectional=True, buckets=parameter.shape[0], max_distance=128)
        chosen = torch.nn.functional.embedding(torch.tensor(np.array(bucket), device=self.device), parameter)
        return chosen.permute(2, 0, 1)[None]

    def _attend(self, parts: Any, ids: Any) -> Any:
        torch, case = self.torch, self.case
        query, key, value, *parameter = parts
        mask = None if ids is None else (ids[:, :, None] == ids[:, None, :])[:, None]
        causal = case.causal
        windowed = case.window != (None, None)
        if windowed or (causal and (parameter or mask is not None)):  # It supports a mask or causality, not both.
            left, right = case.sides
            seen = torch.ones(case.queries, case.keys, dtype=torch.bool, device=self.device)
            seen = seen if left is None else seen.triu(-left)
            seen = seen if right is None else seen.tril(right)
            mask, causal = seen if mask is None else mask & seen, False
        if parameter:
            bias = self._bias(parameter[0]).to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=case.heads != case.key_heads
        )

    def results(self) -> dict[str, np.ndarray]:
        parts, wave, ids = self.sets[0]
        out = self._attend(parts, ids)
        gradients = self.torch.autograd.grad(out, parts, wave)
        if ids is not None:
            out = out.masked_fill((ids == 0)[:, None, :, None], 0)
        names = ("query", "key", "value", "bias")[: len(parts)]
        found = {"output": out, **dict(zip(names, gradients, strict=True))}
        arrays = {name: x.detach().float().cpu().numpy() for name, x in found.items()}
        return {name: x if name == "bias" else x.swapaxes(1, 2) for name, x in arrays.items()}

    def _timed(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Seconds:
        torch, samples, least = self.torch, self.timing["samples"], self.timing["least_seconds"]

        def once(rounds: int) -> float:
            if self.device == "cpu":
                clock = time.perf_counter()
                for _ in range(rounds):
                    for inputs in sets:
                        call(inputs)
                return time.perf_counter() - clock
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(rounds):
                for inputs in sets:
                    call(inputs)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        once(1)
        rounds = max(1, min(64, round(least / max(once(1), 1e-9))))
        found = [once(rounds) / (rounds * len(sets)) for _ in range(samples)]
        return Seconds(statistics.median(found), min(found), max(found))

    def forward(self) -> Seconds:
        with self.torch.no_grad():
            return self._timed(lambda inputs: self._attend(inputs[0], inputs[2]), self.sets)

    def backward(self) -> Seconds:
        sets = [(self._attend(parts, ids), parts, wave) for parts, wave, ids in self.sets]
        return self._timed(
            lambda inputs: self.torch.autograd.grad(inputs[0], inputs[1], inputs[2], retain_graph=True), sets
        )


PEERS: dict[str, Attend | None] = {
    "jax.nn xla": functools.partial(jax_nn, "xla"),
    "jax.nn cudnn": functools.partial(jax_nn, "cudnn"),
    "tokamax mosaic_gpu": functools.partial(tokamax, "mosaic_gpu"),
    "tokamax mosaic_tpu": functools.partial(tokamax, "mosaic_tpu"),
    "tokamax cudnn": functools.partial(tokamax, "cudnn"),
    "tokamax xla_chunked": functools.partial(tokamax, "xla_chunked"),
    "splash attention": splash,
    "torch sdpa": None,  # a runner of its own
}

# Package of each peer that may be missing, and the platform that a peer needs.
NEEDS = {"tokamax": "tokamax", "torch": "torch"}
PLATFORMS = {"tokamax mosaic_gpu": "gpu", "tokamax cudnn": "gpu", "tokamax mosaic_tpu": "tpu"}


def contestants(peers: Sequence[str]) -> list[str]:
    """Return names: our backends, fastest first, then the peers asked for by full name or by its first word."""
    chosen = [name for name in PEERS if "all" in peers or name in peers or name.split()[0] in peers]
    return [f"{OURS} {name}" for name in BACKENDS] + chosen


def known_peers() -> list[str]:
    """Return the names that `--peers` accepts."""
    return ["all", "none", *dict.fromkeys(name.split()[0] for name in PEERS), *PEERS]


def enter(name: str, case: Case, sets: Sequence[Arrays], timing: dict[str, Any]) -> Runner:
    """Set up a contestant for a case; raise `Refused` with the reason if it does not support the case."""
    own = name.startswith(f"{OURS} ")
    first = name.split()[0]
    if first in NEEDS and importlib.util.find_spec(NEEDS[first]) is None:
        raise Refused("is not installed")
    if not own and case.dropout:
        raise Refused("generates different dropout bits: there is nothing to compare")
    if name in PLATFORMS and jax.default_backend() != PLATFORMS[name]:
        raise Refused(f"needs a {PLATFORMS[name].upper()}")
    attend = functools.partial(ours, name.split(" ", 1)[1]) if own else PEERS[name]
    if attend is None:
        return TorchRunner(case, sets, timing)
    try:
        jax.eval_shape(functools.partial(attend, case), sets[0])
    except (NotImplementedError, ValueError) as error:
        raise Refused(first_line(error).removeprefix(f"implementation {name.split(' ', 1)[1]!r}: ")) from error
    return JaxRunner(attend, case, sets, timing)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if it has none."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
