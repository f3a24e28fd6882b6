"""Models compiled ahead of time for chips that need not be there."""

import dataclasses
import os
from importlib.util import find_spec
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bestiary.kernels.bench.tune import H200
from bestiary.kernels.hopper import backend as hopper
from bestiary.kernels.tpu import backend as tpu
from bestiary.models.encoders.modernbert import FAMILY, ModernBertConfig
from bestiary.models.registry import init_params

pytestmark = pytest.mark.usefixtures("optimised")

# Nothing runs on a chip here, so other processes with the compiler loaded do no harm.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

LAYERS = 3  # of ModernBERT-base, one of them global
CHIPS = {
    "h200": ("jax_cuda13_plugin", hopper, {"platform": "cuda", "topology": "1x1x1", "target_config": H200}),
    "v5e": ("libtpu", tpu, {"platform": "tpu", "topology_name": "v5e:2x2"}),
}


def temporaries(chip: str, length: int) -> int:
    """Bytes of temporary memory of ModernBERT's loss and gradients at one row of this length, packed."""
    package, backend, target = CHIPS[chip]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: nothing can be compiled for {chip}")
    mesh = Mesh(np.array(topologies.get_topology_desc(**target).devices[:1]), ("data",))
    place = NamedSharding(mesh, PartitionSpec())
    config = dataclasses.replace(
        ModernBertConfig.preset("modernbert-base"),
        layers=LAYERS,
        dtype="bfloat16",
        remat=True,
        attention_implementation={"h200": "hopper", "v5e": "tpu"}[chip],
    )
    model = FAMILY.build("masked_lm", config)
    with backend.compiling():
        params = jax.eval_shape(lambda: nn.unbox(init_params(model, jax.random.key(0))))
    params, row, slots = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, 1024), jnp.int32)),
    )

    def loss(params: Any, ids: jax.Array, segments: jax.Array, places: jax.Array, slots: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, ids, segments, places, mlm_positions=slots)
        return logits.astype(jnp.float32).sum()

    with backend.compiling():
        traced = jax.jit(jax.grad(loss)).trace(params, row, row, row, slots)
    program = traced.lower(lowering_platforms=(target["platform"],)).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chip", CHIPS)
def test_modernbert_trains_on_8192_tokens_without_a_score_of_each_pair(chip):
    """One layer's scores of all pairs would take 12 * 8192 * 8192 bytes at a byte each; more than all temporaries."""
    length, heads = 8192, 12
    assert temporaries(chip, length) < heads * length * length
