"""Contestants of the attention benchmark: our backends, and every other implementation that is installed.

Each is a function from a case's arrays to the output. It refuses unsupported cases with a reason; an error becomes a
reason too. A peer gets packed rows in the form in which it is fastest: as offsets (cuDNN), as a range of keys for each
query (tokamax), as cumulative lengths or a block mask (PyTorch), as segment ids (splash); what has none of these, as a
boolean mask [B, 1, L, S]. Peers get a relative bias as an array [1, H, L, S] built by differentiable code, or as a
function of the score where they take one, since that is how they are used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..backends import BACKENDS
from ..bias import dense_bias
from ..dispatch import attention
from .cases import Arrays, Case, bias_of, documents
from .runner import Refused, Runner
from .timing import Seconds, time_jax
from .torch_peers import TORCH, TorchRunner
from .workers import first_line

Attend = Callable[[Case, Arrays], Any]

OURS = "bestiary"


class JaxRunner:
    """Runner of a JAX function. See `Runner`."""

    def __init__(
        self, attend: Attend, case: Case, sets: Sequence[Arrays], timing: dict[str, Any], *, own: bool = True
    ) -> None:
        self.case, self.sets, self.timing, self.attend, self.own = case, sets, timing, attend, own

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
        names = ("query", "key", "value", "bias")[: len(gradients)]
        found = {"output": out, **dict(zip(names, gradients, strict=True))}
        if inputs.segment_ids is not None:  # what peers leave at padding is theirs to say
            at_padding = (inputs.segment_ids == 0)[:, :, None, None]
            free = ("output",) if self.own else ("output", "query", "key", "value")
            found |= {name: jnp.where(at_padding, 0, found[name]) for name in free}
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


def cudnn_offsets(case: Case, inputs: Arrays, ids: np.ndarray | None) -> Any:
    """Run cuDNN on packed rows as it takes them: the offset and length of each document, and nothing between them."""
    if jax.default_backend() != "gpu":
        raise Refused("needs an NVIDIA GPU")
    if ids is None:
        raise Refused("is for packed rows")
    if case.bias != "none" or case.window != (None, None):
        raise Refused("has no bias and no window for packed rows")
    from jax._src.cudnn import fused_attention_stablehlo as fused

    offsets, lengths = cudnn_packing(ids)
    result: Any = fused.dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        q_seqlen=jnp.asarray(lengths),
        kv_seqlen=jnp.asarray(lengths),
        q_offsets=jnp.asarray(offsets),
        kv_offsets=jnp.asarray(offsets),
        scale=case.size**-0.5,
        mask_type=fused.MaskType.CAUSAL if case.causal else fused.MaskType.NO_MASK,
    )
    return result


def cudnn_packing(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where documents begin, int32 [B, M + 1], and their lengths, [B, M], with -1 where there are fewer than M.

    M is at least 2: with one document a row cuDNN's functions take a row for a document.
    """
    packed = documents(ids)
    more = max(0, 2 - packed.starts.shape[1])
    ends = {"mode": "constant", "constant_values": -1}
    return np.pad(packed.starts, ((0, 0), (0, more + 1)), **ends), np.pad(packed.lengths, ((0, 0), (0, more)), **ends)


def tokamax(implementation: str, case: Case, inputs: Arrays, ids: np.ndarray | None) -> Any:
    """Run tokamax.dot_product_attention; packed rows as the range of keys of each query."""
    _stub_xprof()
    dense = _dense(case, inputs)
    if ids is None or implementation not in ("mosaic_gpu", "xla_chunked"):
        module: Any = importlib.import_module("tokamax")
        return module.dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=case.causal, implementation=implementation, **dense
        )
    # Its public function takes no ranges; the operation beneath it does.
    api: Any = importlib.import_module("tokamax._src.ops.attention.api")
    base: Any = importlib.import_module("tokamax._src.ops.attention.base")
    packed = documents(ids)
    mask = base.Mask(
        k_start=jnp.asarray(packed.first)[:, None], k_end=jnp.asarray(packed.stop)[:, None], is_causal=case.causal
    )
    if case.window != (None, None):
        left, right = dense["local_window_size"]
        mask &= base.CausalMask(offset=right, window_size=left + right + 1)
    return api.IMPLEMENTATIONS[implementation](inputs.query, inputs.key, inputs.value, bias=dense["bias"], mask=mask)


def _stub_xprof() -> None:
    """Stand in for xprof, 98 MB that tokamax imports for its own timing alone, where it is not installed."""
    if importlib.util.find_spec("xprof") is not None:
        return
    name = ""
    for part in ("xprof", "cli", "tools", "get_kernel_stats_tool"):
        parent, name = name, f"{name}.{part}".lstrip(".")
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        if parent:
            setattr(sys.modules[parent], part, module)


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


PEERS: dict[str, Attend] = {
    "jax.nn xla": functools.partial(jax_nn, "xla"),
    "jax.nn cudnn": functools.partial(jax_nn, "cudnn"),
    "splash attention": splash,
}
# Those that take packed rows in a form of their own get the segment ids as a NumPy array, too.
PACKED: dict[str, Callable[[Case, Arrays, np.ndarray | None], Any]] = {
    "cudnn offsets": cudnn_offsets,
    "tokamax mosaic_gpu": functools.partial(tokamax, "mosaic_gpu"),
    "tokamax mosaic_tpu": functools.partial(tokamax, "mosaic_tpu"),
    "tokamax cudnn": functools.partial(tokamax, "cudnn"),
    "tokamax xla_chunked": functools.partial(tokamax, "xla_chunked"),
}
NAMES = (*PEERS, *PACKED, *TORCH)

# Package of each peer that may be missing, and the platform that a peer needs.
NEEDS = {"tokamax": "tokamax", "torch": "torch"}
PLATFORMS = {"tokamax mosaic_gpu": "gpu", "tokamax cudnn": "gpu", "tokamax mosaic_tpu": "tpu"}


def contestants(peers: Sequence[str]) -> list[str]:
    """Return names: our backends, fastest first, then the peers asked for by full name or by its first words."""
    chosen = [name for name in NAMES if "all" in peers or any(f"{name} ".startswith(f"{peer} ") for peer in peers)]
    return [f"{OURS} {name}" for name in BACKENDS] + chosen


def known_peers() -> list[str]:
    """Return the names that `--peers` accepts."""
    return ["all", "none", *dict.fromkeys(name.split()[0] for name in NAMES), "torch sdpa", *NAMES]


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
    if name in TORCH:
        return TorchRunner(name, case, sets, timing)
    if name in PACKED:
        ids = None if sets[0].segment_ids is None else np.asarray(sets[0].segment_ids)
        attend = functools.partial(_with_ids, PACKED[name], ids)
    else:
        attend = functools.partial(ours, name.split(" ", 1)[1]) if own else PEERS[name]
    try:
        jax.eval_shape(functools.partial(attend, case), sets[0])
    except (NotImplementedError, ValueError) as error:
        raise Refused(first_line(error).removeprefix(f"implementation {name.split(' ', 1)[1]!r}: ")) from error
    return JaxRunner(attend, case, sets, timing, own=own)


def _with_ids(attend: Callable[..., Any], ids: np.ndarray | None, case: Case, inputs: Arrays) -> Any:
    return attend(case, inputs, ids)
