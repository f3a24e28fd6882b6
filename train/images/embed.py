"""Compute vectors of images: `bestiary images embed FOLDER photos/ --out vectors.npy`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...data.files import check_output, replacing
from ...data.images.files import any_images
from ...data.progress import counted
from ...models import load
from ...models.heads.pooling import combine, normalize
from ...models.registry import family_of
from ..arguments import parse_layers
from ..errors import RunError
from ..progress import Progress, Work
from .config import EmbedConfig
from .model import image_family, processor_of
from .prediction import ImageFiles, model_folder


def main(config: EmbedConfig) -> int:
    """Run `bestiary images embed`; return the exit status."""
    paths = any_images(config.images)
    check_output(config.out)
    folder = model_folder(config.model)
    loaded = load(folder, head="encoder")
    model, c = loaded.model, loaded.config
    image_family(family_of(c), str(folder))
    layers = parse_layers(config.layers, c.layers)
    pooling = config.pooling or c.pooling
    if pooling == "cls" and not c.has_cls:
        raise RunError(f"--pooling cls: {folder} has no [CLS] before the patches. Take mean.")

    @jax.jit
    def vectors(params: Any, pixel_values: Array) -> Array:
        encoded = model.apply({"params": params}, pixel_values, every_layer=True)
        hidden = combine(jnp.stack([encoded.every_hidden[layer] for layer in layers]), config.combine)
        pooled = hidden[:, 0] if pooling == "cls" else hidden[:, int(c.has_cls) :].mean(axis=1)
        return normalize(pooled) if config.normalize else pooled

    progress, found = Progress(), []
    work = Work(progress, "embedding", len(paths), "images")
    for numbers, batch in ImageFiles(paths, processor_of(folder, c), folder).batches(config.batch_size):
        found.append(np.asarray(vectors(loaded.params, jnp.asarray(batch["pixel_values"])), np.float32)[: len(numbers)])
        work.update(numbers.stop)
    with replacing(config.out) as unfinished, unfinished.open("wb") as file:
        np.save(file, np.concatenate(found))
    progress.line(f"{counted(len(paths), 'image')}: vectors of {found[0].shape[1]} in {config.out}")
    return 0
