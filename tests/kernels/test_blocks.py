"""Which tiles of the score matrix are called needed and whole, against the mask written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.blocks import Area, Segments, bounds, needed, segments, whole

QUERIES, KEYS = 4, 3


def _ids(generator: np.random.Generator, length: int, order: str) -> np.ndarray:
    if order == "shuffled":
        return generator.integers(0, 4, (2, length)).astype(np.int32)
    ids = np.sort(generator.integers(1, 5, (2, length)), axis=1).astype(np.int32)
    ids[0, length - length // 4 :] = 0
    return ids


@pytest.mark.parametrize("order", [None, "sorted", "shuffled"])
@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (None, None)), (False, (3, 2)), (True, (5, None)), (False, (0, 9))],
)
@pytest.mark.parametrize(("length", "keys"), [(16, 12), (13, 17)])
def test_tiles_against_the_mask(length, keys, causal, window, order):
    generator = np.random.default_rng(length)
    area = Area(length, keys, window[0], 0 if causal else window[1])
    rows = 1 if order is None else 2
    distance = np.arange(keys)[None, :] - np.arange(length)[:, None]
    mask = np.ones((rows, length, keys), bool)
    if window[0] is not None:
        mask &= distance >= -window[0]
    right = 0 if causal else window[1]
    if right is not None:
        mask &= distance <= right
    query_ids = key_ids = None
    if order is not None:
        q, k = _ids(generator, length, order), _ids(generator, keys, order)
        mask &= (q[:, :, None] == k[:, None, :]) & (q[:, :, None] != 0)
        query_ids, key_ids = segments(jnp.asarray(q), QUERIES), segments(jnp.asarray(k), KEYS)
    (first_key, stop_key), (first_query, stop_query) = jax.device_get(bounds(area, QUERIES, KEYS, query_ids, key_ids))
    for b in range(rows):
        for i in range(-(-length // QUERIES)):
            for j in range(-(-keys // KEYS)):
                ids = (
                    None if query_ids is None else Segments(*(np.asarray(part)[b, i] for part in query_ids)),
                    None if key_ids is None else Segments(*(np.asarray(part)[b, j] for part in key_ids)),
                )
                tile = mask[b, i * QUERIES : (i + 1) * QUERIES, j * KEYS : (j + 1) * KEYS]
                is_needed = bool(needed(area, i * QUERIES, QUERIES, j * KEYS, KEYS, *ids))
                assert is_needed or not tile.any()
                assert bool(whole(area, i * QUERIES, QUERIES, j * KEYS, KEYS, *ids)) == (
                    tile.shape == (QUERIES, KEYS) and bool(tile.all())
                )
                assert not is_needed or (
                    first_key[b, i] <= j < stop_key[b, i] and first_query[b, j] <= i < stop_query[b, j]
                )


def test_packed_rows_need_little():
    """Eight examples of 64 tokens in a row of 512: the blocks on the diagonal, and no others."""
    ids = jnp.repeat(jnp.arange(1, 9, dtype=jnp.int32), 64)[None]
    ranges = segments(ids, 64)
    (first, stop), _ = bounds(Area(512, 512, None, None), 64, 64, ranges, ranges)
    np.testing.assert_array_equal(first, np.arange(8)[None])
    np.testing.assert_array_equal(stop, np.arange(1, 9)[None])


def test_a_block_of_padding_has_no_work():
    ids = jnp.asarray([[1, 1, 1, 1, 0, 0, 0, 0]], jnp.int32)
    ranges = segments(ids, 4)
    (first, stop), (first_query, stop_query) = bounds(Area(8, 8, None, None), 4, 4, ranges, ranges)
    assert [first.tolist(), stop.tolist()] == [[[0, 0]], [[1, 0]]]
    assert [first_query.tolist(), stop_query.tolist()] == [[[0, 0]], [[1, 0]]]
