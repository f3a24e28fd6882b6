"""Compile a ViT's training step for a chip that is not here, and print the memory and the operations that it needs.

    uv pip install libtpu jax-cuda13-plugin jax-cuda13-pjrt
    JAX_PLATFORMS=cpu python bench/vit_ahead.py --chip v5e --batch 256
    JAX_PLATFORMS=cpu python bench/vit_ahead.py --chip h200 --batch 256

The step is that of `bestiary images train` in bfloat16 on one chip, with AdamW; attention is this package's kernel for
the chip.
"""

import argparse
import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bestiary.kernels.bench.tune import H200
from bestiary.kernels.hopper import backend as hopper
from bestiary.kernels.tpu import backend as tpu
from bestiary.models.registry import init_params, presets
from bestiary.train.images.config import TrainConfig
from bestiary.train.images.loop import train_step
from bestiary.train.learner import count_parameters, make_learner
from bestiary.train.optim.schedule import schedule
from bestiary.train.sharding import BATCH_AXES, MESH_AXES, Parallelism

# Name -> backend of attention, its module, target of the compiler, bfloat16 peak in TFLOP/s as published.
CHIPS: dict[str, tuple[str, Any, dict[str, Any], float]] = {
    "h200": ("hopper", hopper, {"platform": "cuda", "topology": "1x1x1", "target_config": H200}, 989.0),
    "v5e": ("tpu", tpu, {"platform": "tpu", "topology_name": "v5e:2x2"}, 197.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-base")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--remat", action="store_true")
    a = parser.parse_args()
    attention, backend, target, peak = CHIPS[a.chip]
    family = presets()[a.model]
    fields = dict(dtype="bfloat16", remat=a.remat, attention_implementation=attention)
    config: Any = dataclasses.replace(family.config.preset(a.model), **fields)  # pyright: ignore[reportArgumentType]
    model = family.build("classification", config)
    settings = TrainConfig(data=Path("unread"), out=Path("unwritten"), batch_size=a.batch)
    one = np.array(topologies.get_topology_desc(**target).devices[:1]).reshape((1,) * len(MESH_AXES))
    mesh = Mesh(one, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    parallelism = Parallelism(mesh)
    rate = schedule(settings.optim, [(1000, None)])
    by_rows = NamedSharding(mesh, P(BATCH_AXES))
    side = config.image_size
    shapes = {
        "pixel_values": ((a.batch, side, side, config.channels), jnp.float32),
        "labels": ((a.batch,), jnp.int32),
        "rows": ((a.batch,), jnp.uint32),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows) for name, (shape, dtype) in shapes.items()}
    with backend.compiling():
        learner = make_learner(partial(init_params, model), optim=settings.optim, rate=rate, seed=0)
        state = parallelism.abstract(learner.make, learner.specs)
        step = parallelism.compile_train(
            partial(train_step, model=model, learner=learner, config=settings), learner.specs
        )
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).trace(state, batch).lower(lowering_platforms=(target["platform"],))
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    tokens = config.positions * a.batch
    # Products with parameters, three times (forward, and backward by inputs and by parameters); scores and their
    # products with the values, likewise.
    kernels = config.layers * (4 * config.width**2 + 2 * config.width * config.feed_forward)
    operations = 6 * tokens * kernels + 12 * config.layers * tokens * config.positions * config.width
    print(
        json.dumps(
            {
                "model": a.model,
                "chip": a.chip,
                "batch": a.batch,
                "parameters": count_parameters(state.params),
                "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
                "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 2),
                "gflop_an_image": round(operations / a.batch / 1e9, 1),
                "images_a_second_at_40_percent_of_peak": round(0.4 * peak * 1e12 / (operations / a.batch)),
                "compile_s": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
