"""Predict the classes of images: `bestiary images predict runs/mnist photo.png`."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ...data.files import check_output
from ...data.images.decode import decode
from ...data.images.files import any_images
from ...data.images.stream import Batch
from ..errors import RunError
from .attention_map import draw, last_attention
from .config import PredictConfig
from .prediction import open_classifier


def main(config: PredictConfig) -> int:
    """Run `bestiary images predict`; return the exit status."""
    paths = any_images(config.images)
    if config.attention is not None:
        check_output(config.attention)
    opened = open_classifier(config.run, config.parallelism)
    processor, c = opened.processor, opened.model.config
    if processor.output is None:
        raise RunError(f"{config.run}: its preprocessing gives images of several sizes; expected do_resize or a crop.")
    names = c.label_names or tuple(map(str, range(c.num_labels)))
    size = -(-config.batch_size // opened.divisor) * opened.divisor

    look = jax.jit(partial(last_attention, opened.model))

    def read(number: int) -> np.ndarray:
        return processor.fit(decode(paths[number].read_bytes(), str(paths[number]), processor.channels))

    def batches(chosen: list[int]) -> list[Batch]:
        pixels = processor.normalise(np.stack([read(number) for number in chosen]))
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], size - len(pixels), axis=0)])
        return [{"pixel_values": filled, "weights": (np.arange(size) < len(pixels)).astype(np.float32)}]

    for first in range(0, len(paths), size):
        chosen = list(range(first, min(first + size, len(paths))))
        logits = opened.classifier(opened.params, batches(chosen), len(chosen))
        shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        for number, row in zip(chosen, shifted / shifted.sum(axis=-1, keepdims=True), strict=True):
            best = np.argsort(-row, kind="stable")[: config.top].tolist()
            top = {names[label]: round(float(row[label]), 6) for label in best}
            said = {
                "image": str(paths[number]),
                "class": names[best[0]],
                "probability": top[names[best[0]]],
                "top": top,
            }
            print(json.dumps(said, ensure_ascii=False), flush=True)
            if config.attention is not None:
                pixels = read(number)
                weights = look(opened.params, jnp.asarray(processor.normalise(pixels)[None]))
                draw(pixels, np.asarray(weights[0]), f"{paths[number].name}: {said['class']}", config.attention)
    return 0
