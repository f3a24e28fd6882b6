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

from bestiary.kernels import hash, xla
from bestiary.kernels.bias import DenseBias, dense_from_toeplitz
from bestiary.kernels.call import Call
from bestiary.kernels.split import splitting
from bestiary.kernels.tpu import backend as tpu
from bestiary.kernels.tpu.backend import Blocks
from bestiary.kernels.tpu.frame import Tiling
from bestiary.kernels.tpu.tile import pad_row, row_part, skew, unskew

# Tiles and chunks of 128: rows of a few hundred tokens have several of each.
SMALL = Blocks(Tiling(128, 128, 128), Tiling(128, 128, 128), Tiling(128, 128, 128), 0)


def make(
    *,
    rows=1,
    length=260,
    heads=2,
    size=32,
    bias=None,
    segments=False,
    rate=0.0,
    window=(None, None),
) -> Call:
    generator = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    ids = None
    if segments:
        ids = jnp.sort(jnp.asarray(generator.integers(0, 4, (rows, length)), jnp.int32), axis=1)
    return Call(
        query=normal(rows, length, heads, size),
        key=normal(rows, length, heads, size),
        value=normal(rows, length, heads, size),
        bias=DenseBias(normal(1, heads, length, length)) if bias == "dense" else None,
        query_segment_ids=ids,
        key_segment_ids=ids,
        dropout_seeds=hash.row_seeds(jnp.asarray([3, 4], jnp.uint32), jnp.arange(rows)) if rate else None,
        dropout_rate=rate,
        causal=False,
        window=window,
        scale=size**-0.5,
        softcap=None,
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

    @jax.jit
    def compute(*arrays):
        (out, lse), pull = jax.vjp(outputs, *arrays)
        return out, lse, pull(cotangents(out, lse))

    with tpu.interpreting(pltpu.InterpretParams(detect_races=True, random_seed=1)):
        return compute(call.query, call.key, call.value, call.bias)


def assert_close(found, wanted, tolerance=2e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_tiles_that_are_not_needed_are_not_read():
    """NaN in another example's tile would spread from any product with it, even a masked one."""
    ids = jnp.repeat(jnp.asarray([1, 2, 2, 3], jnp.int32), 128)[None]
    call = make(length=512, heads=1, window=(100, None))
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


def test_skew_cuts_a_toeplitz_row_into_tiles_and_unskew_is_its_transpose():
    generator = np.random.default_rng(0)
    down, across, padded = 200, 330, (256, 384)
    row = jnp.asarray(generator.normal(size=(1, down + across - 1)), jnp.float32)
    whole = np.zeros(padded, np.float32)
    whole[:down, :across] = dense_from_toeplitz(row, down, across)[0]
    padded_row = pad_row(row, down, across, *padded)
    cut = jax.jit(partial(skew, down=128, across=128))
    for i, j in ((0, 0), (0, 256), (128, 128)):
        start = int(row_part(i, j, 128, padded[0]))
        tile = cut(padded_row[0, :, start : start + 256])
        rows, columns = min(128, down - i), min(128, across - j)
        np.testing.assert_array_equal(tile[:rows, :columns], whole[i : i + rows, j : j + columns])
    part, tile = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((1, 640), (256, 384)))
    moved, summed = jax.jit(lambda part, tile: (skew(part, 256, 384), unskew(tile)))(part, tile)
    np.testing.assert_allclose(jnp.vdot(moved, tile), jnp.vdot(part, summed), rtol=1e-4)


def test_over_an_explicit_mesh():
    """Rows and heads on different devices: the same numbers, dropout's bits included."""
    call = make(rows=2, length=40, heads=2, bias="dense", rate=0.2, segments=True)
    wanted = everything(call, xla.run)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)

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

    @jax.jit
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
            jnp.cos(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape) * (lse > -jnp.inf).astype(jnp.float32),
            "data",
            None,
            "tensor",
        ),
    )
    arrays = {f.name: value for f in dataclasses.fields(call) if isinstance(value := getattr(call, f.name), jax.Array)}
    with tpu.interpreting():
        assert_close(compute(arrays | {"bias": call.bias}), wanted)


def test_refusals():
    call = make(length=8)
    assert "needs a TPU" in (tpu.supports(call) or "")
    with tpu.compiling():
        assert tpu.supports(call) is None
        assert "float64" in (tpu.supports(dataclasses.replace(call, query=np.zeros((1, 8, 2, 32)))) or "")
        assert "at most 256" in (tpu.supports(make(length=8, size=300)) or "")
        many = jax.ShapeDtypeStruct((16384, 512, 1, 32), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((16384, 512), jnp.int32)
        packed = {"query": many, "key": many, "value": many, "query_segment_ids": ids, "key_segment_ids": ids}
        given = dataclasses.replace(call, **packed)
        assert "bytes of scalar memory for the bounds of all tiles, found 1048576 of 16384 rows" in tpu.supports(given)
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        with splitting(mesh, batch="data"):
            assert tpu.supports(given) is None
            assert "1 rows cannot be split evenly over 4 devices" in (tpu.supports(call) or "")
    with pytest.raises(ValueError, match="found 'rows'"), splitting(mesh, batch="rows"):
        pass
