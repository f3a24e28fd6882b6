"""The hash behind dropout: its exact bits, its statistics, and that they do not depend on how work is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels import hash_dropout, row_seeds
from bestiary.kernels.hash import keep, key_words, query_words, threshold

SEED = np.array([12, 3456], np.uint32)
WORD = 2**32
GOLDEN_SEEDS = [[915917477, 410666223], [2624088461, 3598104466]]
GOLDEN_DROPPED = ["0f27f74d", "66d23dda", "77bb2ad6", "e5ce7745", "789fe33c", "d191648e"]


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % WORD
    x = (x ^ x >> 15) * 0x846CA68B % WORD
    return x ^ x >> 16


def fold(seed: tuple[int, int], index: int) -> tuple[int, int]:
    first = mix(seed[0] ^ mix((index * 0x9E3779B9 + seed[1]) % WORD))
    return first, mix((seed[1] + (first >> 16 | first << 16)) % WORD)


def kept(words: tuple[int, int], key: int, rate: float) -> bool:
    x = ((mix((key + 0x9E3779B9) % WORD) ^ words[0]) * 0x7FEB352D + words[1]) % WORD
    return (x ^ x >> 16) * 0x846CA68B % WORD >= rate * WORD


@jax.jit
def attention_bits(seeds: jax.Array) -> jax.Array:
    """bool [B, 4, 256, 256] at rate 1/4."""
    a, b = query_words(seeds, jnp.arange(4), jnp.arange(256))
    return keep(a[..., None], b[..., None], key_words(jnp.arange(256))[None, None, None, :], 0.25)


def standard(bits, rate: float) -> np.ndarray:
    """Bits as numbers of mean 0 and variance 1."""
    return (np.asarray(bits, np.float32) - (1 - rate)) / np.sqrt(rate * (1 - rate), dtype=np.float32)


def test_bits_are_those_of_the_formula_in_integers():
    seeds = row_seeds(jnp.asarray(SEED), jnp.arange(3))
    bits = np.asarray(attention_bits(seeds))
    for row, head, query, key in [(0, 0, 0, 0), (2, 3, 255, 255), (1, 2, 77, 13), (0, 1, 128, 200), (2, 0, 9, 31)]:
        seed = fold((12, 3456), row)
        assert tuple(int(x) for x in seeds[row]) == seed
        words = fold(fold(seed, head), query)
        expected = [kept(words, k, 0.25) for k in range(key, min(key + 20, 256))]
        assert bits[row, head, query, key : key + 20].tolist() == expected


def test_the_bits_never_change():
    """A run resumed with a later version drops what the earlier one would have."""
    assert np.asarray(row_seeds(jnp.asarray(SEED), jnp.arange(2))).tolist() == GOLDEN_SEEDS
    x = jnp.ones((2, 3, 32))
    dropped = np.asarray(hash_dropout(x, 0.5, row_seeds(jnp.asarray(SEED), jnp.arange(2)))) == 0
    assert [f"{int(''.join('01'[int(bit)] for bit in row), 2):08x}" for row in dropped.reshape(6, 32)] == GOLDEN_DROPPED


@pytest.mark.parametrize("seed", [(0, 0), (0, 1), (1, 0), (2**32 - 1, 2**31), (123, 456)])
def test_attention_bits_are_independent(seed):
    x = standard(attention_bits(row_seeds(jnp.asarray(seed, jnp.uint32), jnp.arange(4))), 0.25)
    assert abs(x.sum()) / np.sqrt(x.size) < 4.5  # standard deviations
    # The mean of every line along every axis varies as it should, no more (a pattern) and no less (a lattice).
    for axis in range(4):
        means = np.square(x.sum(axis) / np.sqrt(x.shape[axis]))
        assert abs(means.mean() - 1) / np.sqrt(2 / means.size) < 5
    # No bit knows its neighbours', in any direction.
    for axis in range(4):
        for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128):
            if lag < x.shape[axis]:
                one, other = np.take(x, range(lag, x.shape[axis]), axis), np.take(x, range(x.shape[axis] - lag), axis)
                assert abs((one * other).sum()) / np.sqrt(one.size) < 4.5
    squares = x[:, :, 1:, 1:] * x[:, :, :-1, 1:] * x[:, :, 1:, :-1] * x[:, :, :-1, :-1]
    assert abs(squares.sum()) / np.sqrt(squares.size) < 4.5


def test_no_two_lines_of_bits_are_alike():
    """Over all pairs of (row, head, query), also shifted against each other: no stream overlaps another."""
    lines = standard(attention_bits(row_seeds(jnp.asarray(SEED), jnp.arange(2))), 0.25).reshape(-1, 256)
    for shift in (0, 1, 7, 64):
        products = lines @ np.roll(lines, shift, axis=1).T / np.sqrt(256)
        products = products[~np.eye(len(lines), dtype=bool)]
        assert abs(np.mean(products**2) - 1) < 0.01
        assert np.abs(products).max() < 8


def test_long_rows_of_hidden_activations():
    """More positions than 16 bits count, and rows that do not share a stream."""
    rate, rows, positions, channels = 0.1, 3, 70_000, 8
    seeds = row_seeds(jnp.asarray(SEED), jnp.arange(rows))
    out = np.asarray(jax.jit(hash_dropout, static_argnums=1)(jnp.ones((rows, positions, channels)), rate, seeds))
    assert np.unique(out).tolist() == [0, np.float32(1 / 0.9)]
    x = standard(out > 0, rate)
    assert abs(x.sum()) / np.sqrt(x.size) < 4.5
    for one, other in [(x[:, 1:], x[:, :-1]), (x[:, 65536:], x[:, :-65536]), (x[..., 1:], x[..., :-1])]:
        assert abs((one * other).sum()) / np.sqrt(one.size) < 4.5
    flat = x.reshape(rows, -1)
    for shift in (0, 1, 8, 65536):
        assert abs((flat[0] * np.roll(flat[1], shift)).sum()) / np.sqrt(flat[0].size) < 4.5


def test_the_split_of_the_batch_does_not_matter():
    x = np.random.default_rng(0).normal(size=(6, 5, 4, 7)).astype(np.float32)
    dropout = jax.jit(lambda x, rows: hash_dropout(x, 0.5, row_seeds(jnp.asarray(SEED), rows)))
    whole = np.asarray(dropout(x, np.arange(6)))
    for rows in (range(3), range(3, 6), range(5, 6)):
        np.testing.assert_array_equal(whole[rows], dropout(x[rows], np.array(rows)))
    # What lies between the batch and the last dimension counts as one: a position.
    np.testing.assert_array_equal(whole.reshape(6, 20, 7), dropout(x.reshape(6, 20, 7), np.arange(6)))


def test_an_example_drops_the_same_wherever_it_is_packed():
    """Each token has its example's seed and its position in it: then neither row nor place matters."""
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 5)).astype(np.float32)
    seed, five, two = jnp.asarray(SEED), x[0, :5], x[1, :2]
    alone = np.zeros((6, 5, 3, 5), np.float32)
    alone[4], alone[5, :2] = five, two
    expected = np.asarray(hash_dropout(jnp.asarray(alone), 0.5, row_seeds(seed, jnp.arange(6))))
    packed = jnp.concatenate([two, five])[None]
    examples, positions = jnp.array([[5, 5, 4, 4, 4, 4, 4]]), jnp.array([[0, 1, 0, 1, 2, 3, 4]])
    dropped = np.asarray(hash_dropout(packed, 0.5, row_seeds(seed, examples), positions))[0]
    np.testing.assert_array_equal(dropped[:2], expected[5, :2])
    np.testing.assert_array_equal(dropped[2:], expected[4])
    # A vector of an example is its token at the given position.
    vectors = jnp.asarray(np.stack([five[0], two[1]])[:, 0])
    dropped = hash_dropout(vectors, 0.5, row_seeds(seed, jnp.array([4, 5])), jnp.array([0, 1]))
    rows = row_seeds(seed, jnp.arange(6))
    one = np.asarray(hash_dropout(jnp.asarray(alone[:, :, 0]), 0.5, rows))
    np.testing.assert_array_equal(dropped, [one[4, 0], one[5, 1]])


@pytest.mark.parametrize("shape", [(4, 6, 16), (4, 16), (4,)])
def test_the_gradient_drops_the_same(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    seeds = row_seeds(jnp.asarray(SEED), jnp.arange(4))
    out, pull = jax.vjp(lambda x: hash_dropout(x, 0.3, seeds), x)
    (gradient,) = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(gradient, np.where(np.asarray(out) == 0, 0, np.float32(1 / 0.7)))
    assert {leaf.shape for leaf in jax.tree.leaves(pull)} <= {(4, 2)}


def test_what_is_dropped_is_zero_whatever_it_was():
    x = jnp.full((2, 64), jnp.nan)
    out = np.asarray(hash_dropout(x, 0.5, row_seeds(jnp.asarray(SEED), jnp.arange(2))))
    assert (out == 0).any()


def test_rate_zero_is_the_identity():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert hash_dropout(x, 0.0, row_seeds(jnp.asarray(SEED), jnp.arange(2))) is x


def test_dtype_is_kept():
    seeds = row_seeds(jnp.asarray(SEED), jnp.arange(2))
    assert hash_dropout(jnp.ones((2, 3), jnp.bfloat16), 0.5, seeds).dtype == jnp.bfloat16


def test_thresholds():
    assert threshold(0.5) == 2**31
    assert threshold(1 - 1e-12) == 2**32 - 1


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), "0.1", None])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match=r"rate: expected a number in \[0, 1\), found"):
        hash_dropout(jnp.ones((2, 3)), rate, row_seeds(jnp.asarray(SEED), jnp.arange(2)))


def test_seeds_that_do_not_fit():
    with pytest.raises(ValueError, match=r"seeds: expected .* or \[B, L, 2\] for x \[3, 4\], found uint32 \[2, 2\]"):
        hash_dropout(jnp.ones((3, 4)), 0.1, jnp.zeros((2, 2), jnp.uint32))
    with pytest.raises(ValueError, match=r"seeds: expected uint32 .* found int32 \[3, 2\]"):
        hash_dropout(jnp.ones((3, 4)), 0.1, jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"seed: expected uint32 \[2\], found uint32 \[3\]"):
        row_seeds(jnp.zeros(3, jnp.uint32), jnp.arange(2))
    with pytest.raises(ValueError, match=r"rows: expected integers \[B\] or \[B, L\], found float32 \[2\]"):
        row_seeds(jnp.zeros(2, jnp.uint32), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"positions: expected integers \[3\], found int32 \[3, 4\]"):
        hash_dropout(jnp.ones((3, 4)), 0.1, jnp.zeros((3, 2), jnp.uint32), jnp.zeros((3, 4), jnp.int32))
