"""The TPU kernels compiled ahead of time, forward and backward, for chips that need not be there."""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bestiary.kernels.bias import DenseBias, RelativeBias
from bestiary.kernels.call import Call
from bestiary.kernels.split import splitting
from bestiary.kernels.tpu import backend as tpu

pytest.importorskip("libtpu", reason="libtpu is not installed: nothing can be compiled for a TPU")

pytestmark = pytest.mark.usefixtures("optimised")

# Nothing runs on a chip here, so other processes with the compiler loaded do no harm.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.fixture(scope="module")
def mesh_of() -> Callable[..., Mesh]:
    """From a chip's name and the axes' sizes to a mesh (data, tensor) of such chips."""
    devices: dict[str, Any] = {}

    def make(chip: str, data: int = 1, tensor: int = 1) -> Mesh:
        if chip not in devices:
            devices[chip] = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
        return Mesh(np.array(devices[chip][: data * tensor]).reshape(data, tensor), ("data", "tensor"))

    return make


def compiled(
    mesh,
    *,
    rows=1,
    length=1024,
    keys=None,
    heads=4,
    key_heads=None,
    size=64,
    v_size=None,
    dtype=jnp.bfloat16,
    bias=None,
    segments=False,
    rate=0.0,
    softcap=None,
    causal=False,
    window=(None, None),
):
    """Output, lse and all gradients, compiled for the mesh with rows and heads split over it."""
    keys, key_heads, v_size = keys or length, key_heads or heads, v_size or size

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    split = ("data", None, "tensor")
    arrays = {
        "query": array((rows, length, heads, size), dtype, *split),
        "key": array((rows, keys, key_heads, size), dtype, *split),
        "value": array((rows, keys, key_heads, v_size), dtype, *split),
        "bias": {
            None: None,
            "relative": RelativeBias(array((32, heads), jnp.float32, None, "tensor")),
            "dense": DenseBias(array((1, heads, length, keys), dtype, None, "tensor")),
        }[bias],
        "query_segment_ids": array((rows, length), jnp.int32, "data") if segments else None,
        "key_segment_ids": array((rows, keys), jnp.int32, "data") if segments else None,
        "dropout_seeds": array((rows, 2), jnp.uint32, "data") if rate else None,
    }
    rule = {"causal": causal, "window": window, "scale": size**-0.5, "softcap": softcap, "dropout_rate": rate}

    def step(arrays, wave, slope):
        def outputs(query, key, value, bias):
            given = arrays | {"query": query, "key": key, "value": value, "bias": bias}
            call = Call(**given, **rule)
            assert tpu.supports(call) is None
            return tpu.run(call)

        outcome, pull = jax.vjp(outputs, *(arrays[name] for name in ("query", "key", "value", "bias")))
        return outcome, pull((wave, slope))

    cotangents = (
        array((rows, length, heads, v_size), dtype, *split),
        array((rows, length, heads), jnp.float32, *split),
    )
    with tpu.compiling(), splitting(mesh, batch="data", heads="tensor"):
        return jax.jit(step).trace(arrays, *cotangents).lower(lowering_platforms=("tpu",)).compile()


def kernels(program) -> int:
    return program.as_text().count('custom_call_target="tpu_custom_call"')


ALL = {"bias": "relative", "rate": 0.1, "segments": True}


@pytest.mark.parametrize(
    ("chip", "options", "expected"),
    [
        ("v4", ALL | {"length": 700, "keys": 1000}, 2),
        ("v5e", {"length": 4096, "causal": True}, 2),
        # Too many queries, or several heads of one key head: seven products.
        ("v5e", {"length": 8192, "causal": True}, 3),
        ("v5e", ALL | {"length": 100, "keys": 200, "heads": 2}, 2),
        ("v5p", {"length": 1500, "key_heads": 2, "size": 80, "v_size": 32, "window": (100, 7), "softcap": 3.0}, 3),
        ("v5p", {"length": 600, "heads": 1, "dtype": jnp.float32, "size": 256, "segments": True}, 2),
        ("v6e", {"length": 128, "heads": 12, "rows": 2, "segments": True}, 2),
        ("v6e", {"length": 300, "bias": "dense", "heads": 1, "rate": 0.1, "dtype": jnp.float16, "causal": True}, 3),
    ],
)
def test_compiles(mesh_of, chip, options, expected):
    assert kernels(compiled(mesh_of(chip), **options)) == expected


def test_memory_is_linear_in_the_length(mesh_of):
    """With everything on at once, twice the length takes at most twice the memory: nothing of size L x S is made."""
    used = []
    for length in (4096, 8192):
        memory = compiled(mesh_of("v5p"), length=length, heads=2, **ALL).memory_analysis()
        used.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
    assert used[1] <= 2.1 * used[0]
    assert used[1] < 8192 * 8192  # One byte for each score of one head.


def test_nothing_is_gathered(mesh_of):
    """Rows and heads split over four chips: all that is exchanged is the sum of the bias's gradient over the rows."""
    program = compiled(mesh_of("v5e", 2, 2), rows=4, heads=8, key_heads=4, **ALL).as_text()
    exchanged = re.findall(r"= (\S+?\[[\d,]*\])\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", program)
    assert exchanged == [("f32[4,2047]", "all-reduce")]
    assert "bf16[2,4,1024,64]" in program
