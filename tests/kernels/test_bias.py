"""T5's buckets, the Toeplitz row, and its dense form, with their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels import AlibiBias, DenseBias, RelativeBias, relative_position_bucket, toeplitz_row
from bestiary.kernels.bias import bucket_edges, dense_bias, dense_from_toeplitz

QUERIES, KEYS, HEADS = 5, 8, 3
DISTANCE = np.arange(KEYS)[None, :] - np.arange(QUERIES)[:, None]


def bucket_by_formula(distance: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The reference's formula for one distance, in its own order and in float32."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets * (distance > 0)
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    share = np.log(np.float32(distance) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    return offset + min(exact + int(share * np.float32(buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 16), (64, 100), (320, 4096)])
def test_buckets_are_the_references(bidirectional, buckets, max_distance):
    distance = np.arange(-5000, 5001)
    found = relative_position_bucket(distance, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
    expected = [bucket_by_formula(int(d), bidirectional, buckets, max_distance) for d in distance]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


def test_edges_of_the_released_sizes():
    """Where `transformers` 5.23 with PyTorch 2.13 starts each bucket, rounding at 16, 32 and 64 included."""
    both = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    before = [*range(1, 17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    np.testing.assert_array_equal(bucket_edges(bidirectional=True, buckets=32, max_distance=128), both)
    np.testing.assert_array_equal(bucket_edges(bidirectional=False, buckets=32, max_distance=128), before)


@pytest.mark.parametrize(
    ("bidirectional", "buckets", "max_distance"), [(True, 2, 128), (False, 1, 128), (True, 32, 8), (False, 32, 16)]
)
def test_too_few_buckets(bidirectional, buckets, max_distance):
    with pytest.raises(ValueError, match=rf"found {buckets} buckets, max_distance {max_distance}"):
        bucket_edges(bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_and_its_gradient(bidirectional):
    table = np.random.default_rng(0).normal(size=(8, HEADS)).astype(np.float32)
    bucket = relative_position_bucket(DISTANCE, bidirectional=bidirectional, buckets=8, max_distance=6)
    weight = np.random.default_rng(1).normal(size=(1, HEADS, QUERIES, KEYS)).astype(np.float32)

    def dense(table):
        return dense_bias(RelativeBias(table, bidirectional=bidirectional, max_distance=6), QUERIES, KEYS)

    found, pull = jax.vjp(jax.jit(dense), table)
    np.testing.assert_array_equal(found[0], np.moveaxis(table[np.asarray(bucket)], -1, 0))
    expected = np.stack([weight[0][:, np.asarray(bucket) == n].sum(-1) for n in range(8)])
    np.testing.assert_allclose(pull(weight)[0], expected, rtol=1e-5, atol=1e-6)


def test_alibi_bias():
    slopes = np.array([0.5, 0.25, 0.125], np.float32)
    found = dense_bias(AlibiBias(slopes), QUERIES, KEYS)
    np.testing.assert_array_equal(found[0], -slopes[:, None, None] * np.abs(DISTANCE))


@pytest.mark.parametrize(("queries", "keys"), [(5, 8), (8, 5), (1, 4), (4, 1)])
def test_toeplitz_row_and_its_dense_form(queries, keys):
    row = np.arange(2 * (queries + keys - 1), dtype=np.float32).reshape(2, -1)
    place = np.arange(keys)[None, :] - np.arange(queries)[:, None] + queries - 1
    dense, pull = jax.vjp(lambda row: dense_from_toeplitz(row, queries, keys), row)
    np.testing.assert_array_equal(dense, row[:, place])
    # Every distance's gradient is the sum over its diagonal.
    diagonals = np.stack([(place == n).sum() for n in range(queries + keys - 1)])
    np.testing.assert_array_equal(pull(jnp.ones_like(dense))[0], np.broadcast_to(diagonals, row.shape))


def test_biases_are_pytrees_with_static_settings():
    bias = RelativeBias(jnp.ones((8, 2)), bidirectional=False, max_distance=20)
    doubled = jax.tree.map(lambda x: 2 * x, bias)
    assert (doubled.bidirectional, doubled.max_distance) == (False, 20)
    assert toeplitz_row(doubled, 3, 4).shape == (2, 6)
    assert len(jax.tree.leaves((DenseBias(jnp.ones((1, 1, 2, 2))), AlibiBias(jnp.ones(2))))) == 2
