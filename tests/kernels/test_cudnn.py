"""The cuDNN backend where there is no GPU: what it refuses, and what it adds to cuDNN's own output and gradients."""

import functools
import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from bestiary.kernels import BACKENDS, AlibiBias, attention, cudnn
from bestiary.kernels.call import Call

B, L, H, K, D = 2, 12, 4, 2, 16


def call(length=L, keys=L, size=D, value_size=None, dtype=jnp.bfloat16, **options):
    arrays = {
        "query": jnp.ones((B, length, H, size), dtype),
        "key": jnp.ones((B, keys, K, size), dtype),
        "value": jnp.ones((B, keys, K, value_size or size), dtype),
    }
    return Call.of(**(arrays | options))


IDS = jnp.ones((B, L), jnp.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": jnp.float16, "size": 128},
        {"causal": True},
        {"causal": True, "window": (3, 5)},
        {"window": (3, 0)},
        {"keys": 7},
        {"window": (L - 1, L)},  # no limit at all
    ],
)
def test_means_the_same(options):
    assert cudnn.meaning_differs(call(**options)) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float32}, "expected bfloat16 or float16, found float32"),
        ({"size": 136}, "multiple of 8 up to 128, found 136 and 136"),
        ({"size": 12}, "multiple of 8 up to 128, found 12 and 12"),
        ({"value_size": 8}, "found 16 and 8"),
        ({"query_segment_ids": IDS, "key_segment_ids": IDS}, "segment ids would be added to the scores"),
        ({"bias": AlibiBias(jnp.ones(H))}, "a bias would be materialised"),
        ({"softcap": 2.0}, "no softcap"),
        ({"dropout_rate": 0.1, "dropout_seed": jnp.zeros(2, jnp.uint32)}, "its dropout draws other bits"),
        ({"window": (3, 1)}, r"a window must be causal, .* found \(3, 1\)"),
        ({"window": (3, None)}, r"a window must be causal"),
        ({"keys": 7, "causal": True}, "unequal lengths, 12 queries and 7 keys"),
    ],
)
def test_refuses_what_it_would_compute_otherwise(options, reason):
    found = cudnn.meaning_differs(call(**options))
    assert found is not None
    assert re.search(reason, found)


def test_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="implementation 'cudnn': needs an NVIDIA GPU, found cpu"):
        attention(*(jnp.ones((1, 4, 2, 16), jnp.bfloat16),) * 3, implementation="cudnn")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [("7.5", "compute capability 8.0 or later, found 7.5"), (None, "found None"), ("8.0", None), ("12.1", None)],
)
def test_gpus(monkeypatch, capability, reason):
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn.jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    found = cudnn.device_lacks(call())
    assert found is None if reason is None else reason in found

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused, "check_cudnn_version", missing)
    assert cudnn.device_lacks(call()) is not None


def test_jax_has_what_is_called():
    names = inspect.signature(fused.dot_product_attention).parameters
    assert {"query", "key", "value", "scale", "mask_type", "sliding_window_length", "return_residual"} <= set(names)
    assert fused.MaskType.CAUSAL is not fused.MaskType.NO_MASK


def stand_in(query, key, value, *, scale, mask_type, sliding_window_length, return_residual):
    """What cuDNN returns, and what gradients it has: none through lse."""
    assert return_residual
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("blhd,bshd->bhls", query, key) * scale
    distance = jnp.arange(key.shape[1])[None] - jnp.arange(query.shape[1])[:, None]
    seen = distance <= 0 if mask_type == fused.MaskType.CAUSAL else distance == distance
    if sliding_window_length is not None:
        seen &= distance > -sliding_window_length
    scores = jnp.where(seen[None, None], scores, -jnp.inf)
    out = jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(scores), value)
    return out, jax.lax.stop_gradient(jax.nn.logsumexp(scores, axis=-1))


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (4, None), "scale": 0.7}])
def test_output_lse_and_both_gradients(monkeypatch, options):
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
    generator = np.random.default_rng(0)
    query, key, value, wave = (generator.normal(size=(B, L, heads, D)).astype("float32") for heads in (H, K, K, H))
    slope = generator.normal(size=(B, L, H)).astype("float32")

    def ours(query, key, value):
        return cudnn.run(Call.of(query=query, key=key, value=value, **options))

    reference = functools.partial(attention, return_lse=True, implementation="xla", **options)

    def loss(function, through_lse):
        def value_of(*arrays):
            out, lse = function(*arrays)
            return jnp.sum(out * wave) + (jnp.sum(lse * slope) if through_lse else 0.0)

        return value_of

    for through_lse in (False, True):
        found, expected = (
            jax.jit(jax.value_and_grad(loss(function, through_lse), (0, 1, 2)))(query, key, value)
            for function in (ours, reference)
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), found, expected)


def test_comes_after_our_own_kernels_and_before_xla():
    names = list(BACKENDS)
    assert names.index("cudnn") < names.index("xla")
    assert all(names.index(own) < names.index("cudnn") for own in ("tpu", "hopper") if own in names)
