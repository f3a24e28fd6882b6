"""Predict the classes of images: `bestiary images predict runs/mnist photo.png`."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ...data.files import check_output
from ...data.images.files import any_images
from ...models.checkpoints.config import distinct_names
from .attention_map import draw, last_attention
from .config import PredictConfig
from .prediction import ImageFiles, open_classifier


def main(config: PredictConfig) -> int:
    """Run `bestiary images predict`; return the exit status."""
    paths = any_images(config.images)
    if config.attention is not None:
        check_output(config.attention)
    opened = open_classifier(config.run, config.parallelism)
    processor, c = opened.processor, opened.model.config
    files = ImageFiles(paths, processor, config.run)
    names = distinct_names(c.label_names or tuple(map(str, range(c.num_labels))))
    look = jax.jit(partial(last_attention, opened.model))
    for numbers, batch in files.batches(-(-config.batch_size // opened.divisor) * opened.divisor):
        logits = opened.classifier(opened.params, [batch], len(numbers))
        shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        for number, row in zip(numbers, shifted / shifted.sum(axis=-1, keepdims=True), strict=True):
            best = np.argsort(-row, kind="stable")[: config.top].tolist()
            top = {names[label]: round(float(row[label]), 6) for label in best}
            found = names[best[0]]
            said = {"image": str(paths[number]), "class": found, "probability": top[found], "top": top}
            print(json.dumps(said, ensure_ascii=False), flush=True)
            if config.attention is not None:
                pixels = files.fitted(number)
                weights = look(opened.params, jnp.asarray(processor.normalise(pixels)[None]))
                draw(pixels, np.asarray(weights[0]), f"{paths[number].name}: {found}", config.attention)
    return 0
