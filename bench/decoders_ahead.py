"""Compile a GPT's or T5's training step for a TPU topology that is not here, and print the memory it needs.

    uv pip install libtpu
    python bench/decoders_ahead.py --model gpt3-2.7b --topology v5p:4x4x4 --rows 256 --length 2048
    python bench/decoders_ahead.py --model t5-base --topology v5e:2x2 --rows 8 --length 2048

Parameters, gradients and Adam's moments are sharded over all chips (--mesh fsdp=-1); layers are recomputed.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bestiary.models.registry import init_params, presets
from bestiary.train.config import OptimConfig
from bestiary.train.learner import count_parameters, make_learner
from bestiary.train.optim.schedule import schedule
from bestiary.train.pretrain.causal import NextTokens
from bestiary.train.pretrain.denoising.span_corruption import SpanCorruption, raw_length
from bestiary.train.pretrain.loop import train_step
from bestiary.train.sharding import BATCH_AXES, MESH_AXES, Parallelism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt3-2.7b")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--attention", default=None)
    a = parser.parse_args()
    family = presets()[a.model]
    config = dataclasses.replace(
        family.config.preset(a.model), dtype="bfloat16", remat=True, attention_implementation=a.attention
    )
    denoises = "generation" in family.heads
    model = family.build("generation" if denoises else "causal_lm", config)
    target = topologies.get_topology_desc(platform="tpu", topology_name=a.topology)
    devices = np.array(target.devices)
    mesh = Mesh(devices.reshape(1, -1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    parallelism = Parallelism(mesh)
    optim = OptimConfig(learning_rate=1.6e-4, beta2=0.95, weight_decay=0.1)
    learner = make_learner(partial(init_params, model), optim=optim, rate=schedule(optim, [(1000, None)]), seed=0)
    state = parallelism.abstract(learner.make, learner.specs)
    by_rows = NamedSharding(mesh, P(BATCH_AXES))

    def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((a.rows, *shape), dtype, sharding=by_rows)  # pyright: ignore[reportArgumentType]

    names = ("input_ids", "labels", "segment_ids", "position_ids")
    batch = {name: array(jnp.int32, a.length) for name in names}
    batch |= {"label_weights": array(jnp.float32, a.length), "row_ids": array(jnp.uint32, 2)}
    objective = NextTokens(None, True)  # pyright: ignore[reportArgumentType] (it needs no tokenizer here)
    if denoises:
        words = SimpleNamespace(special_ids={"eos": 1})
        sentinels = np.arange(32_099, 31_999, -1, dtype=np.int32)
        objective = SpanCorruption(words, 1e-4, 0, 0.15, sentinels)  # pyright: ignore[reportArgumentType]
        raw = raw_length(a.length, 0.15)
        batch = {name: array(jnp.int32, raw) for name in ("input_ids", "segment_ids")}
        batch |= {"row_ids": array(jnp.uint32, 2)}
    step = parallelism.compile_train(
        partial(train_step, objective=objective, model=model, learner=learner, accumulate=1), learner.specs
    )
    start = time.perf_counter()
    compiled = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()  # pyright: ignore
    memory = compiled.memory_analysis()
    print(
        json.dumps(
            {
                "model": a.model,
                "topology": a.topology,
                "chips": devices.size,
                "parameters": count_parameters(state.params),
                "rows": a.rows,
                "length": a.length,
                "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
                "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 2),
                "compile_s": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
