"""Weights of chosen heads and queries, against softmax written out over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels import AlibiBias, DenseBias, DistanceKeys, RelativeBias, attention, attention_weights

B, L, S, H, K, D = 2, 13, 17, 4, 2, 8
HEADS, QUERIES = [3, 0], [12, 5, 5]


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(B, L, H, D)), generator.normal(size=(B, S, K, D))
    ids = generator.integers(0, 3, (B, L)), generator.integers(0, 3, (B, S))
    ids[0][0, 5] = 0
    return query.astype("float32"), key.astype("float32"), *(x.astype("int32") for x in ids)


def dense(query, key, bias=None, causal=False, window=(None, None), ids=None, scale=D**-0.5, softcap=None):
    """[B, H, L, S] in float64; bias [.., L, S]."""
    scores = np.einsum("blhd,bshd->bhls", query.astype(float), np.repeat(key, H // K, axis=2).astype(float)) * scale
    scores = scores if bias is None else scores + bias
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    distance = np.arange(S)[None] - np.arange(L)[:, None]
    seen = np.ones((B, 1, L, S), bool)
    left, right = window
    seen &= True if left is None else distance >= -left
    seen &= True if right is None else distance <= right
    seen &= distance <= 0 if causal else True
    if ids is not None:
        seen &= ((ids[0][:, :, None] == ids[1][:, None]) & (ids[0] != 0)[:, :, None])[:, None]
    weights = np.where(seen, np.exp(scores - scores.max()), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def slopes_written_out(slopes):
    return -slopes[:, None, None] * np.abs(np.arange(S)[None] - np.arange(L)[:, None])


@pytest.mark.parametrize("kind", ["plain", "causal", "window, softcap", "segments", "dense", "alibi", "shared dense"])
def test_equal_to_the_dense_weights(arrays, kind):
    query, key, *ids = arrays
    options, reference = {}, {}
    if kind == "causal":
        options = reference = {"causal": True, "scale": 1.0}
    if kind == "window, softcap":
        options = reference = {"window": (2, 3), "softcap": 1.5}
    if kind == "segments":
        options, reference = {"query_segment_ids": ids[0], "key_segment_ids": ids[1]}, {"ids": ids}
    if "dense" in kind:
        bias = np.random.default_rng(1).normal(size=(1, H, L, S) if kind == "dense" else (B, 1, L, S))
        bias[..., 3] = -np.inf
        options, reference = {"bias": DenseBias(jnp.asarray(bias, jnp.float32))}, {"bias": bias}
    if kind == "alibi":
        slopes = np.array([0.5, 0.25, 1.0, 0.1])
        options = {"bias": AlibiBias(jnp.asarray(slopes, jnp.float32))}
        reference = {"bias": slopes_written_out(slopes)[None]}

    @jax.jit
    def chosen(query, key):
        _, lse = attention(query, key, key, return_lse=True, **options)
        return attention_weights(query, key, heads=HEADS, queries=QUERIES, lse=lse, **options)

    found = chosen(query, key)
    expected = dense(query, key, **reference)[:, HEADS][:, :, QUERIES]
    assert found.shape == (B, 2, 3, S)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_weights_times_value_are_the_output(arrays):
    """With a learned bias that is not written out anywhere in this test, and gradients through both calls."""
    query, key, *ids = arrays
    table = jnp.asarray(np.random.default_rng(2).normal(size=(8, H)), jnp.float32)
    options = {"query_segment_ids": ids[0], "key_segment_ids": ids[1], "window": (9, None)}

    def fast(query, table):
        out, lse = attention(query, key, key, bias=RelativeBias(table, max_distance=9), return_lse=True, **options)
        return out, lse

    def slow(query, table):
        _, lse = fast(query, table)
        bias = RelativeBias(table, max_distance=9)
        weights = attention_weights(query, key, heads=range(H), queries=range(L), lse=lse, bias=bias, **options)
        return jnp.einsum("bhls,bshd->blhd", weights, jnp.repeat(key, H // K, axis=2))

    np.testing.assert_allclose(jax.jit(slow)(query, table), jax.jit(fast)(query, table)[0], atol=2e-6)
    grads = jax.jit(jax.grad(lambda *x: jnp.sum(slow(*x) ** 2), (0, 1)))(query, table)
    expected = jax.jit(jax.grad(lambda *x: jnp.sum(fast(*x)[0] ** 2), (0, 1)))(query, table)
    for found, reference in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, reference, atol=2e-5)


def test_weights_with_keys_of_distances(arrays):
    query, key, *ids = arrays
    generator = np.random.default_rng(3)
    own, keys = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((B, L, H, 6), (L + 2, H, 6)))
    options = {"bias": DistanceKeys(own, keys), "query_segment_ids": ids[0], "key_segment_ids": ids[1]}
    out, lse = attention(query, key, key, return_lse=True, **options)
    weights = attention_weights(query, key, heads=range(H), queries=range(L), lse=lse, **options)
    np.testing.assert_allclose(jnp.einsum("bhls,bshd->blhd", weights, jnp.repeat(key, H // K, axis=2)), out, atol=2e-6)


def test_empty_rows_are_zeros_and_nothing_is_as_large_as_the_scores(arrays):
    query, key, *ids = arrays
    options = {"query_segment_ids": ids[0], "key_segment_ids": ids[1]}
    _, lse = attention(query, key, key, return_lse=True, **options)
    weights = attention_weights(query, key, heads=[1], queries=[5], lse=lse, **options)
    assert ids[0][0, 5] == 0
    assert (np.asarray(weights[0]) == 0).all()

    long = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.bfloat16)
    table, lse = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 2), (1, 2048, 2)))
    compiled = jax.jit(
        lambda q, t, lse: attention_weights(q, q, heads=[1], queries=[0, 9], lse=lse, bias=RelativeBias(t))
    ).lower(long, table, lse)
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 2048 * 2048 / 4


def test_traced_places_out_of_range_are_nan(arrays):
    query, key, *_ = arrays
    _, lse = attention(query, key, key, return_lse=True)
    found = jax.jit(lambda places: attention_weights(query, key, heads=[0], queries=places, lse=lse))(
        jnp.array([L, 2, -1])
    )
    assert np.isnan(found[:, :, [0, 2]]).all()
    np.testing.assert_allclose(np.sum(found[:, :, 1], axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [0, H]}, r"heads: expected integers in \[0, 4\), found \[4\]"),
        ({"queries": [-1, 13]}, r"queries: expected integers in \[0, 13\), found \[-1, 13\]"),
        ({"queries": []}, r"queries: expected integers \[n\] in \[0, 13\), at least one, found float32 \[0\]"),
        ({"heads": [[0]]}, r"heads: expected integers \[n\]"),
        ({"lse": np.zeros((B, H, L), "float32")}, r"lse: expected float32 \[2, 13, 4\].*found float32 \[2, 4, 13\]"),
        ({"window": (1, -2)}, r"window: expected \(left, right\)"),
    ],
)
def test_refusals(arrays, change, message):
    query, key, *_ = arrays
    options = {"heads": [0], "queries": [0], "lse": np.zeros((B, L, H), "float32")} | change
    with pytest.raises(ValueError, match=message):
        attention_weights(query, key, **options)
