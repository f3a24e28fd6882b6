"""A ViT on a convolutional stem: its convolutions by their definition, and that its checkpoints are read again."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.images.conv_vit import FAMILY, ConvViTConfig, neighbours
from bestiary.models.images.patches import Convolved

SIZES: dict[str, Any] = dict(
    width=16,
    layers=1,
    heads=2,
    feed_forward=24,
    image_size=8,
    patch_size=4,
    channels=2,
    num_labels=3,
    label_names=tuple("abc"),
)


def test_a_product_with_the_neighbours_is_a_convolution_of_stride_two():
    random = np.random.default_rng(0)
    stored = random.normal(size=(5, 2, 3, 3)).astype(np.float32)  # as PyTorch's Conv2d
    pixels = random.normal(size=(1, 4, 6, 2)).astype(np.float32)
    found = np.asarray(neighbours(jnp.asarray(pixels))) @ Convolved(3, 2, 5).load(stored)
    padded = np.pad(pixels, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for row, column in np.ndindex(2, 3):
        part = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
        np.testing.assert_allclose(found[0, row, column], np.einsum("yxc,ecyx->e", part, stored), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_read_as_it_was_saved(random_params, tmp_path: Path):
    model = FAMILY.build("classification", ConvViTConfig(**SIZES))
    assert model.config.stem_widths == (8, 16)
    params = random_params(model)
    models.save(tmp_path / "model", model, params)
    loaded = models.load(tmp_path / "model")
    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_patches_are_halved_pixels():
    with pytest.raises(ValueError, match="patch size 6 is not a power of two"):
        ConvViTConfig(**{**SIZES, "patch_size": 6, "image_size": 12})
