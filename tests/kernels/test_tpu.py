"""The TPU kernels in Pallas' interpreter, with race detection: what the conformance suite cannot know of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bestiary.kernels import hash, tpu, xla
from bestiary.kernels.bias import DenseBias, RelativeBias, dense_from_toeplitz
from bestiary.kernels.call import Call
from bestiary.kernels.split import splitting
from bestiary.kernels.tpu import Blocks
from bestiary.kernels.tpu_frame import Tiling
from bestiary.kernels.tpu_tile import pad_row, row_part, skew, unskew

# The interpreter's programs are large and run once.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Tiles and chunks of 128: rows of a few hundred tokens have several of each.
SMALL = Blocks(Tiling(128, 128, 128), Tiling(128, 128, 128), Tiling(128, 128, 128), 0)
UNEVEN = Blocks(Tiling(256, 128, 256), Tiling(128, 256, 512), Tiling(256, 128, 256), 0)


def make(
    *,
    rows=1,
    length=260,
    keys=None,
    heads=2,
    key_heads=2,
    size=32,
    bias=None,
    segments=None,
    rate=0.0,
    seed=0,
    **options,
) -> Call:
    generator = np.random.default_rng(0)
    keys = keys or length

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    ids = [None, None]
    if segments is not None:
        ids = [jnp.asarray(generator.integers(0, 4, (rows, n)), jnp.int32) for n in (length, keys)]
        ids = [jnp.sort(x, axis=1) for x in ids] if segments == "sorted" else ids
    biases = {
        None: lambda: None,
        "relative": lambda: RelativeBias(normal(8, heads), max_distance=64),
        "dense": lambda: DenseBias(normal(1, heads, length, keys)),
        "rows": lambda: DenseBias(normal(rows, 1, length, keys)),
    }
    defaults = {"causal": False, "window": (None, None), "scale": size**-0.5, "softcap": None}
    return Call(
        query=normal(rows, length, heads, size),
        key=normal(rows, keys, key_heads, size),
        value=normal(rows, keys, key_heads, size),
        bias=biases[bias](),
        query_segment_ids=ids[0],
        key_segment_ids=ids[1],
        dropout_seeds=hash.row_seeds(jnp.asarray([3, 4], jnp.uint32), jnp.arange(rows)) if rate else None,
        dropout_rate=rate,
        **(defaults | options),
    )


def cotangents(out, lse):
    """Some gradients of the output and of lse."""
    slope = jnp.cos(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    wave = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return wave, jnp.where(lse == -jnp.inf, 0, slope)


def everything(call: Call, run):
    """The output, lse, and the gradients of query, key, value and bias for fixed gradients of both.

    Steps that a kernel calls parallel are run in a random order.
    """

    def outputs(query, key, value, bias):
        return run(dataclasses.replace(call, query=query, key=key, value=value, bias=bias))

    @jit
    def compute(*arrays):
        (out, lse), pull = jax.vjp(outputs, *arrays)
        return out, lse, pull(cotangents(out, lse))

    with tpu.interpreting(pltpu.InterpretParams(detect_races=True, random_seed=1)):
        return compute(call.query, call.key, call.value, call.bias)


def assert_close(found, wanted, tolerance=2e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"causal": True, "segments": "sorted", "keys": 390}, UNEVEN),
        ({"bias": "relative", "rate": 0.2, "length": 300, "keys": 390, "softcap": 2.0, "segments": "sorted"}, SMALL),
        ({"bias": "dense", "rows": 2, "length": 200, "keys": 150, "softcap": 1.5, "segments": "shuffled"}, SMALL),
        ({"bias": "rows", "rows": 2, "keys": 140, "key_heads": 1, "rate": 0.3, "window": (90, 20)}, UNEVEN),
        # Short rows: several heads a step.
        ({"bias": "relative", "length": 140, "keys": 70, "key_heads": 1, "rate": 0.1, "segments": "shuffled"}, None),
        ({"bias": "dense", "length": 60, "keys": 130, "softcap": 2.0, "window": (3, 40)}, None),
    ],
)
def test_long_and_short_rows(options, blocks):
    call = make(**options)
    assert_close(everything(call, partial(tpu.run, blocks=blocks)), everything(call, xla.run))


def test_tiles_that_are_not_needed_are_not_read():
    """NaN in another example's tile would spread from any product with it, even a masked one."""
    ids = jnp.repeat(jnp.asarray([1, 2, 2, 3], jnp.int32), 128)[None]
    call = make(length=512, window=(100, None))
    poison = jnp.where((jnp.arange(512) >= 384) | (jnp.arange(512) < 128), jnp.nan, 0.0)[None, :, None, None]
    call = dataclasses.replace(
        call,
        query=call.query + poison,
        key=call.key + poison,
        value=call.value + poison,
        query_segment_ids=ids,
        key_segment_ids=ids.at[:, 256:384].set(9),
    )
    out, lse, gradients = everything(call, partial(tpu.run, blocks=SMALL))
    for array in (out, lse, *gradients[:3]):
        assert np.isfinite(array[:, 128:256]).all()
        assert not np.isfinite(array[:, 384:]).any()
    np.testing.assert_array_equal(out[:, 356:384], 0)


@pytest.mark.parametrize("blocks", [SMALL, None])
def test_empty_rows(blocks):
    """Queries without a key: zeros, lse -inf, and no gradient even where that of lse is NaN."""
    call = make(length=150, segments="sorted")
    ids = jnp.where(jnp.arange(150) < 140, 0, 5).astype(jnp.int32)[None]
    call = dataclasses.replace(call, query_segment_ids=ids, key_segment_ids=jnp.where(ids == 0, 7, ids))

    @jit
    def compute(*arrays):
        (out, lse), pull = jax.vjp(
            lambda q, k, v: tpu.run(dataclasses.replace(call, query=q, key=k, value=v), blocks), *arrays
        )
        return out, lse, pull((jnp.ones_like(out), jnp.where(lse == -jnp.inf, jnp.nan, 1)))

    with tpu.interpreting():
        out, lse, (query, key, value) = compute(call.query, call.key, call.value)
    np.testing.assert_array_equal(out[:, :140], 0)
    np.testing.assert_array_equal(lse[:, :140], -np.inf)
    np.testing.assert_array_equal(query[:, :140], 0)
    for gradient in (key, value):
        np.testing.assert_array_equal(gradient[:, :140], 0)
        assert np.isfinite(gradient).all()
        assert np.any(gradient[:, 140:])


@pytest.mark.parametrize("blocks", [SMALL, None])
def test_dropout_bits_are_those_of_the_hash(blocks):
    rate, length = 0.3, 200
    call = make(rows=2, length=length, rate=rate)
    # Equal weights, and values that show which of them are left.
    call = dataclasses.replace(
        call,
        key=jnp.zeros_like(call.key),
        value=jnp.broadcast_to(jnp.eye(length, dtype=jnp.float32)[None, :, None, :], (2, length, 2, length)),
    )
    with tpu.interpreting():
        out, _ = jit(lambda: tpu.run(call, blocks))()
    assert call.dropout_seeds is not None
    a, b = hash.query_words(call.dropout_seeds, jnp.arange(2), jnp.arange(length))
    kept = hash.keep(a[..., None], b[..., None], hash.key_words(jnp.arange(length))[None, None, None], rate)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(out), 1, 2) > 0, kept)


def test_skew_cuts_a_toeplitz_row_into_tiles_and_unskew_is_its_transpose():
    generator = np.random.default_rng(0)
    down, across, padded = 200, 330, (256, 384)
    row = jnp.asarray(generator.normal(size=(1, down + across - 1)), jnp.float32)
    whole = np.zeros(padded, np.float32)
    whole[:down, :across] = dense_from_toeplitz(row, down, across)[0]
    padded_row = pad_row(row, down, across, *padded)
    for i, j in ((0, 0), (0, 256), (128, 128)):
        start = int(row_part(i, j, 128, padded[0]))
        tile = jit(partial(skew, down=128, across=128))(padded_row[0, :, start : start + 256])
        rows, columns = min(128, down - i), min(128, across - j)
        np.testing.assert_array_equal(tile[:rows, :columns], whole[i : i + rows, j : j + columns])
    part, tile = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((1, 640), (256, 384)))
    moved, summed = jit(lambda part, tile: (skew(part, 256, 384), unskew(tile)))(part, tile)
    np.testing.assert_allclose(jnp.vdot(moved, tile), jnp.vdot(part, summed), rtol=1e-4)


@pytest.mark.parametrize(("kind", "bias"), [(AxisType.Auto, "relative"), (AxisType.Explicit, "dense")])
def test_over_a_mesh(kind, bias):
    """Rows and heads on different devices: the same numbers, dropout's bits included."""
    call = make(rows=2, length=40, heads=4, bias=bias, rate=0.2, segments="sorted")
    wanted = everything(call, xla.run)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind, kind))

    def put(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, P(*axes)))

    call = dataclasses.replace(
        call,
        query=put(call.query, "data", None, "tensor"),
        key=put(call.key, "data", None, "tensor"),
        value=put(call.value, "data", None, "tensor"),
        bias=jax.tree.map(lambda x: put(x, None, "tensor"), call.bias),
        query_segment_ids=put(call.query_segment_ids, "data"),
        key_segment_ids=put(call.key_segment_ids, "data"),
        dropout_seeds=put(call.dropout_seeds, "data"),
    )

    @jit
    def compute(arrays):
        def loss(query, key, value, bias):
            given = dataclasses.replace(call, **arrays | {"query": query, "key": key, "value": value, "bias": bias})
            assert tpu.supports(given) is None
            return tpu.run(given)

        (out, lse), pull = jax.vjp(loss, *(arrays[name] for name in ("query", "key", "value", "bias")))
        return out, lse, pull(waves)

    out, lse, _ = wanted
    waves = (
        put(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape), "data", None, "tensor"),
        put(
            jnp.cos(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape) * (lse > -jnp.inf),
            "data",
            None,
            "tensor",
        ),
    )
    arrays = {f.name: value for f in dataclasses.fields(call) if isinstance(value := getattr(call, f.name), jax.Array)}
    with tpu.interpreting(), splitting(mesh, batch="data", heads="tensor"):
        assert_close(compute(arrays | {"bias": call.bias}), wanted)


def test_refusals():
    call = make(length=8)
    assert "needs a TPU" in (tpu.supports(call) or "")
    with tpu.compiling():
        assert tpu.supports(call) is None
        assert "float64" in (tpu.supports(dataclasses.replace(call, query=np.zeros((1, 8, 2, 32)))) or "")
        assert "at most 256" in (tpu.supports(make(length=8, size=300)) or "")
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        with splitting(mesh, batch="data"):
            assert "1 rows cannot be split evenly over 4 devices" in (tpu.supports(call) or "")
    with pytest.raises(ValueError, match="found 'rows'"), splitting(mesh, batch="rows"):
        pass
