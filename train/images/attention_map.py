"""Draw where a classifier looks: the attention of the last layer over the picture, as a PNG."""

from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from ...data.files import replacing
from ...models.attention_maps import attention_maps


def last_attention(model: Any, params: Any, pixel_values: Array) -> Array:
    """Compute the last layer's attention to the patches, the mean over its heads.

    Args:
        model: a classifier of the family ViT or plain ViT.
        params: its parameters.
        pixel_values: [B, H, W, C] float32.

    Returns:
        [B, rows, columns] float32, from [CLS], or without one the mean over all patches.
    """
    c = model.config
    encoder = model.parts.encoder(c, pooler=model.form.pooler)
    weights = attention_maps(encoder, params["encoder"], {"pixel_values": pixel_values}, layers=[-1])[0].mean(axis=1)
    found = weights[:, 0, 1:] if c.has_cls else weights.mean(axis=1)
    return found.reshape(len(found), pixel_values.shape[1] // c.patch_size, pixel_values.shape[2] // c.patch_size)


def draw(pixels: np.ndarray, weights: np.ndarray, title: str, path: Path) -> None:
    """Draw a picture [H, W, C] uint8, and beside it the same under its attention weights [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    plain, under = figure.subplots(1, 2)
    height, width = pixels.shape[:2]
    shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    for axes in (plain, under):
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        axes.set_axis_off()
    drawn = under.imshow(weights, cmap="inferno", alpha=0.6, interpolation="bilinear", extent=(0, width, height, 0))
    figure.colorbar(drawn, ax=under, label="attention, mean over heads")
    figure.suptitle(title)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
