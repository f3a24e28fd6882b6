"""ViT's patches, positions and sizes; what the reference computes is compared by its fixtures in test_parity.py."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import linen as nn

from bestiary import models
from bestiary.models import registry
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.tables import flatten
from bestiary.models.images.patches import Convolved, patchify, resize_weights, sines_2d
from bestiary.models.images.plain_vit import FAMILY as PLAIN
from bestiary.models.images.plain_vit import PlainViTConfig
from bestiary.models.images.vit import FAMILY, ViTConfig, resized

SIZES: dict[str, Any] = dict(
    width=16,
    layers=2,
    heads=2,
    feed_forward=24,
    image_size=8,
    patch_size=4,
    channels=1,
    num_labels=3,
    label_names=("a", "b", "c"),
)


def drawn(model: Any, scale: float = 0.3) -> Any:
    """Parameters that are all different from zero."""
    shapes = jax.eval_shape(lambda: nn.unbox(registry.init_params(model, jax.random.key(0))))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(random.normal(size=leaf.shape) * scale), shapes)


@partial(jax.jit, static_argnums=0)
def run(model: Any, params: Any, pixels: jax.Array) -> jax.Array:
    """What a model computes."""
    return model.apply({"params": params}, pixels)


def images(side: int = 8, channels: int = 1, count: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (count, side, side, channels))


def test_patches_are_those_of_a_convolution():
    """By its definition: each patch times the kernel, at the patch's own place."""
    random = np.random.default_rng(0)
    stored = random.normal(size=(5, 3, 2, 2)).astype(np.float32)
    layout = Convolved(2, 3, 5)
    kernel = layout.load(stored)
    pixels = random.normal(size=(1, 4, 6, 3)).astype(np.float32)
    found = np.asarray(patchify(jnp.asarray(pixels), 2)) @ kernel
    for row, column in np.ndindex(2, 3):
        patch = pixels[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_allclose(found[0, 3 * row + column], np.einsum("yxc,ecyx->e", patch, stored), rtol=1e-4)
    np.testing.assert_array_equal(layout.save(kernel), stored)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (5, 5), (3, 1)])
def test_bilinear_resizing_is_scipys_zoom(old, new):
    places = np.random.default_rng(0).normal(size=old)
    expected = scipy.ndimage.zoom(places, new / old, order=1)
    np.testing.assert_allclose(resize_weights(old, new, "bilinear") @ places, expected, atol=1e-12)


@pytest.mark.parametrize("how", ["bicubic", "bilinear"])
def test_resizing_keeps_what_is_constant(how):
    for old, new in ((4, 9), (9, 4), (1, 3)):
        np.testing.assert_allclose(resize_weights(old, new, how).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(resize_weights(6, 6, how), np.eye(6), atol=1e-12)


def test_sine_positions_are_the_baselines():
    """Beyer et al. 2022, the released code: sine and cosine of x, then of y."""
    found = sines_2d(2, 3, 8)
    omega = 1 / 10_000 ** (np.arange(2) / 1)
    for row, column in np.ndindex(2, 3):
        x, y = column * omega, row * omega
        expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
        np.testing.assert_allclose(found[3 * row + column], expected, atol=1e-6)


def head_and_patch(model: Any) -> tuple[Any, Any]:
    """New kernels of the last layer and of the first."""
    params = nn.unbox(registry.init_params(model, jax.random.key(0)))
    return params["classifier"]["kernel"], params["encoder"]["embeddings"]["patch"]["kernel"]


def test_a_new_head_is_zero():
    for family in (FAMILY, PLAIN):
        model = family.build("classification", family.config(**SIZES))
        head, patch = jax.jit(head_and_patch, static_argnums=0)(model)
        assert not np.any(head)
        assert np.all(patch)


@pytest.mark.parametrize(
    ("config", "size"),
    [(ViTConfig(**SIZES), 12), (PlainViTConfig(**SIZES, pool="cls", positions_kind="learnt"), 4)],
    ids=lambda value: str(value)[:8],
)
def test_images_of_another_size_are_as_with_resized_positions(config, size):
    model = registry.family_of(config).build("classification", config)
    params = drawn(model)
    pixels = images(size)
    other, moved = resized(model, params, size)
    assert other.config.image_size == size
    np.testing.assert_allclose(run(other, moved, pixels), run(model, params, pixels), atol=1e-5)
    shapes = {entry.path: entry.shape for entry in registry.family_of(config).checkpoint_table(other).entries}
    assert {path: leaf.shape for path, leaf in flatten(moved)} == shapes


def test_every_parameter_has_a_name_a_depth_and_a_part():
    for family in (FAMILY, PLAIN):
        for changes in ({}, {"qkv_bias": False}, *([{"pool": "cls", "positions_kind": "learnt"}] * (family is PLAIN))):
            for architecture in family.architectures:
                model = architecture.build(family.config(**SIZES, **changes))
                shapes = jax.eval_shape(lambda m=model: nn.unbox(registry.init_params(m, jax.random.key(0))))
                leaves = {path: leaf.shape for path, leaf in flatten(shapes)}
                assert leaves == {entry.path: entry.shape for entry in architecture.table(model.config).entries}
                depths = family.depths(model)
                assert depths[("encoder",) * ("encoder" in shapes) + ("embeddings", "patch")] == 0
                assert registry.family_of_model(model) == (family, architecture)


def test_a_plain_vit_is_saved_and_loaded(tmp_path):
    model = PLAIN.build("classification", PlainViTConfig(**SIZES))
    params = drawn(model)
    models.save(tmp_path / "plain", model, params)
    again, read, config, tokenizer = models.load(tmp_path / "plain")
    assert (again, config, tokenizer) == (model, model.config, None)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_scanned_and_unrolled_layers_agree():
    config = ViTConfig(**SIZES)
    model = FAMILY.build("classification", config)
    params, pixels = drawn(model), images()
    unrolled = FAMILY.build("classification", dataclasses.replace(config, scan_layers=False, remat=True))
    np.testing.assert_allclose(run(unrolled, params, pixels), run(model, params, pixels), atol=1e-5)


def test_images_that_do_not_fit_are_refused():
    model = FAMILY.build("encoder", ViTConfig(**SIZES))
    with pytest.raises(ValueError, match="images of 8 x 8 x 3: expected 1 channels"):
        jax.eval_shape(model.init, jax.random.key(0), images(channels=3))
    with pytest.raises(ValueError, match="images of 10 x 10 x 1"):
        jax.eval_shape(model.init, jax.random.key(0), images(10))
    with pytest.raises(ValueError, match="image size 9 is not a multiple of patch size 4"):
        ViTConfig(**SIZES | {"image_size": 9})


def test_configs_survive_json_and_refuse_what_is_not_implemented():
    for config in (ViTConfig(**SIZES, qkv_bias=False), PlainViTConfig(**SIZES, pool="cls", positions_kind="learnt")):
        assert type(config).from_json(config.to_json()) == config
    for changes in ({"pooler_act": "relu"}, {"pooler_output_size": 5}, {"image_size": [8, 8]}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            ViTConfig.from_json(ViTConfig(**SIZES).to_json() | changes)
    with pytest.raises(ConfigError, match="pool"):
        PlainViTConfig.from_json(PlainViTConfig(**SIZES).to_json() | {"pool": "max"})
