"""Train a ViT beside the reference implementation, on identical batches from identical weights, and compare the losses.

    uv run python bench/vit_beside.py ours OUT --data DATA    writes the batches, the weights and our losses to OUT
    PEER/bin/python bench/vit_beside.py reference OUT         trains the same in PyTorch with transformers; prints both

DATA is a folder as `bestiary images train` reads it. --start is the folder of a run's model to start from; without it,
weights are new, with a standard deviation of 0.1: with 0.02, a model 64 wide begins on a plateau, where rounding errors
grow. Everything is as that command does it: AdamW with a decay of the kernels independent of the learning rate,
warm-up and cosine, clipping at a norm of 1, random shifts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

STEPS, BATCH, PEAK, DECAY = 100, 64, 1e-3, 1e-4


def ours(data: Path, out: Path, begin: Path | None, sizes: dict[str, Any]) -> None:
    """Train with this package."""
    from functools import partial

    import jax

    from bestiary import models
    from bestiary.data.images.augment import Augmentation
    from bestiary.data.images.reading import read_images
    from bestiary.data.images.stream import Rows
    from bestiary.models.registry import init_params
    from bestiary.train.images.config import AugmentConfig, TrainConfig
    from bestiary.train.images.loop import train_step
    from bestiary.train.images.model import new_model
    from bestiary.train.learner import make_learner
    from bestiary.train.optim.schedule import schedule
    from bestiary.train.sharding import Replicas

    config = TrainConfig(data=data, out=out, augment=AugmentConfig("shift"), patch_size=7, **sizes)
    images = read_images(data)["train"]
    start = new_model(config, images)
    rate = schedule(config.optim, [(STEPS, None)])
    learner = make_learner(partial(init_params, start.model), optim=config.optim, rate=rate, seed=0)
    with jax.default_matmul_precision("highest"):
        state = jax.jit(learner.make)()
        if begin is not None:
            state = state.replace(params=jax.device_put(models.load(begin).params))
        models.save(out / "model", start.model, jax.device_get(state.params), start.processor)
        rows = Rows(images, start.processor, Augmentation("shift", 2), 0)
        step = jax.jit(partial(train_step, replicas=Replicas(), model=start.model, learner=learner, config=config))
        losses, batches = [], []
        for number in range(STEPS):
            batch = rows.batch(range(number * BATCH, (number + 1) * BATCH))
            batches.append(batch)
            state, sums = step(state, batch)
            losses.append(float(sums["loss"][0]) / float(sums["loss"][1]))
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in ("pixel_values", "labels")}
    rates = np.array([float(rate(number)) for number in range(STEPS)])
    np.savez(out / "beside.npz", losses=losses, rates=rates, **stacked)


def reference(out: Path) -> None:
    """Train with the reference, and compare."""
    import torch
    import transformers

    stored = np.load(out / "beside.npz")
    model = transformers.ViTForImageClassification.from_pretrained(out / "model", attn_implementation="eager")
    model.train()
    named = dict(model.named_parameters())
    kernels = [
        p for name, p in named.items() if p.dim() >= 2 and "embeddings.cls" not in name and "position" not in name
    ]
    others = [p for p in named.values() if not any(p is kernel for kernel in kernels)]
    groups = [dict(params=kernels, weight_decay=DECAY / PEAK), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for rate, pixels, labels in zip(stored["rates"], stored["pixel_values"], stored["labels"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        loss = model(pixel_values=pixel_values, labels=torch.from_numpy(labels).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    errors = np.abs(np.array(losses) / stored["losses"] - 1)
    print(
        json.dumps(
            {
                "first": [losses[0], float(stored["losses"][0])],
                "last": [losses[-1], float(stored["losses"][-1])],
                "largest_relative_error": float(errors.max()),
                "step": int(errors.argmax()) + 1,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "reference"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--start", type=Path)
    for name, default in (("width", 64), ("layers", 6), ("heads", 4), ("initializer-range", 0.1)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    a = parser.parse_args()
    if a.side == "reference":
        reference(a.out)
    else:
        given = {name: getattr(a, name) for name in ("width", "layers", "heads", "initializer_range")}
        ours(a.data, a.out, a.start, given)
