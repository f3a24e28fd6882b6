"""ViT: an encoder of images, whose tokens are patches of pixels.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; the sizes tiny and small are those of Steiner et al. 2021,
"How to train your ViT?".

What sets it apart from its neighbours: patches through one linear map, a learnt [CLS] before them, learnt positions;
layers of normalised inputs (pre-norm) and a norm after the last one; classes from [CLS] by a layer that is zero at
first. Images of another size have as many patches as they have, and positions resized to their grid.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.config import ConfigError
from ..checkpoints.tables import Entry, Reshaped, linear_entries, norm_entries, same
from ..encoder import Encoded, StackEncoder
from ..family import Family, StackConfig
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed, Linear
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments, row_numbers
from .patches import RESIZES, Convolved, patchify, resize_positions, sines_2d


def _size(width: int, layers: int, heads: int, patch_size: int = 16) -> dict[str, Any]:
    """Return the fields of a size. The inner width is four times the width, the classes are ImageNet's."""
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "feed_forward": 4 * width,
        "patch_size": patch_size,
        "num_labels": 1000,
    }


@dataclass(frozen=True)
class ViTConfig(StackConfig):
    """Sizes and settings of a ViT. The defaults are those of ViT-B/16 of 224 pixels."""

    MODEL_TYPE: ClassVar[str] = "vit"
    KEYS: ClassVar[Mapping[str, str]] = {
        **StackConfig.KEYS,
        "image_size": "image_size",
        "patch_size": "patch_size",
        "channels": "num_channels",
        "qkv_bias": "qkv_bias",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**StackConfig.REQUIRED, "pooler_act": ("tanh",)}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vit-tiny": _size(192, 12, 3),
        "vit-small": _size(384, 12, 6),
        "vit-base": _size(768, 12, 12),
        "vit-base-patch32": _size(768, 12, 12, 32),
        "vit-large": _size(1024, 24, 16),
        "vit-large-patch32": _size(1024, 24, 16, 32),
        "vit-huge": _size(1280, 32, 16, 14),
    }

    dropout: float = 0.0
    attention_dropout: float = 0.0
    image_size: int = 224
    """side of the square images that the positions are for, in pixels; a multiple of the patch size"""
    patch_size: int = 16
    """side of a patch, in pixels"""
    channels: int = 3
    """colour channels of a pixel, C"""
    qkv_bias: bool = True
    """queries, keys and values have biases"""
    resize: str = "bicubic"
    """how learnt positions are resized to another image size, see `resize_positions`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: image size {self.image_size} is not a multiple of patch size {self.patch_size}"
            )
        if self.resize not in RESIZES:
            raise ValueError(f"{type(self).__name__}: resize: expected {' or '.join(RESIZES)}, found {self.resize!r}")

    @property
    def positions(self) -> int:
        """Number of learnt positions: of the patches of an image of `image_size` and, if it has one, of [CLS]."""
        return (self.image_size // self.patch_size) ** 2 + (self.has_cls and self.cls_position)

    @property
    def has_cls(self) -> bool:
        """Whether a [CLS] token is before the patches."""
        return self.pooling == "cls"

    @property
    def cls_position(self) -> bool:
        """Whether [CLS] has a position too, the first row of the table."""
        return True

    @property
    def learnt_positions(self) -> bool:
        """Whether positions are parameters."""
        return True

    @property
    def input_initializers(self) -> tuple[Initializer, Initializer, Initializer]:
        """Initialisers of the patches' linear map, of [CLS] and of learnt positions."""
        return self.initializer, self.initializer, self.initializer

    @property
    def head_initializer(self) -> Initializer:
        """Initialiser of the last linear map: zeros (Dosovitskiy et al. 2021, 3.2)."""
        return nn.initializers.zeros_init()

    def head_dropout(self, head: str) -> float:
        """See `StackConfig.head_dropout`."""
        del head
        return 0.0

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        config = super().from_json(stored, **more)
        pooled = stored.get("pooler_output_size")
        if pooled not in (None, config.width):
            raise ConfigError(f"config.json:\n  pooler_output_size: only that of hidden_size, {config.width}, "
                              f"is implemented, found {pooled}")  # fmt: skip
        return config


class Embeddings(nn.Module):
    """Patches through a linear map, [CLS] before them, and positions (Dosovitskiy et al. 2021, equation 1)."""

    config: ViTConfig

    def setup(self) -> None:
        c = self.config
        patch_init, cls_init, position_init = c.input_initializers
        self.patch = Linear((c.width,), ("pixels", "embed"), patch_init, c.dtype)
        if c.has_cls:
            self.cls = Embed(1, c.width, "positions", cls_init, c.dtype)
        if c.learnt_positions:
            self.position = Embed(c.positions, c.width, "positions", position_init, c.dtype)
        self.drop = Dropout(c.dropout)

    def patches(self, pixel_values: Array) -> Array:
        """Compute a vector of each patch, [B, H, W, C] -> [B, patches, E], row by row."""
        return self.patch(patchify(pixel_values, self.config.patch_size).astype(self.config.dtype))

    def __call__(self, pixel_values: Array, *, rows: Rows, deterministic: bool) -> Array:
        """Embed images [B, H, W, C] -> [B, L, E]."""
        c = self.config
        height, width, channels = pixel_values.shape[1:]
        if channels != c.channels or height % c.patch_size or width % c.patch_size or not height * width:
            raise ValueError(
                f"images of {height} x {width} x {channels}: expected {c.channels} channels, and a height and a width "
                f"that are multiples of the patch size {c.patch_size}"
            )
        grid = height // c.patch_size, width // c.patch_size
        hidden = self.patches(pixel_values)
        first: list[Array] = [self.cls(jnp.zeros((1,), jnp.int32))] if c.has_cls else []
        if c.learnt_positions:
            table = self.position.embedding
            if first and c.cls_position:
                first, table = [first[0] + table[:1]], table[1:]
            places = resize_positions(table, *grid, c.resize)
        else:
            places = jnp.asarray(sines_2d(*grid, c.width))
        hidden = hidden + places[None].astype(c.dtype)
        if first:
            cls = jnp.broadcast_to(first[0].astype(c.dtype), (len(hidden), 1, c.width))
            hidden = jnp.concatenate([cls, hidden], axis=1)
        return self.drop(hidden, rows, deterministic=deterministic)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each of normalised inputs and then added (equations 2 and 3)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, hidden: Array, segment_ids: Segments, rows: Rows, *, deterministic: bool) -> Array:
        """Transform hidden states [B, L, E] -> [B, L, E]."""
        c = self.config
        attention = Attention(
            c.width,
            c.heads,
            c.attention_dropout,
            c.initializer,
            c.dtype,
            c.attention_implementation,
            use_bias=c.qkv_bias,
            name="attention",
        )
        feed_forward = FeedForward(c.feed_forward, c.activation, c.initializer, c.dtype, name="feed_forward")

        normed = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden)
        attended = attention(normed, segment_ids, rows, deterministic=deterministic)
        hidden = hidden + Dropout(c.dropout)(attended, rows, deterministic=deterministic)
        normed = LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden)
        return hidden + Dropout(c.dropout)(feed_forward(normed), rows, deterministic=deterministic)


class ViT(StackEncoder):
    """The encoder, with its pooler if `pooler` is on."""

    config: ViTConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

    def setup(self) -> None:
        c = self.config
        self.embeddings = self.make_embeddings()
        self.layers = Block(c)
        self.final_norm = LayerNorm(c.norm_epsilon, c.dtype)
        if self.pooler:
            self.pool = self.make_pooler()

    def make_embeddings(self) -> Embeddings:
        """Return what embeds images."""
        return Embeddings(self.config)

    def leave(self, hidden: Array) -> Array:
        """Compute the encoder's output from the last layer's."""
        return self.final_norm(hidden)

    def __call__(
        self,
        pixel_values: Array,
        *,
        cls_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
        every_layer: bool = False,
        cls_only: bool = False,
    ) -> Encoded:
        """Encode images.

        Args:
            pixel_values: [B, H, W, C] float32, normalised as the checkpoint's `preprocessor_config.json` says; the
                sides are multiples of the patch size. Tokens are [CLS], if there is one, and the patches, row by row.
            cls_positions: see `Encoder`, as the other arguments.
            rows: [B] uint32, row numbers, or None.
            deterministic: disable dropout.
            every_layer: also return the embeddings and every layer's hidden states.
            cls_only: let the last layer compute only the first token.

        Raises:
            ValueError: the images have other channels, or a side that patches do not fill.
        """
        rows = row_numbers(rows, pixel_values)
        return self.encode(
            self.embeddings(pixel_values, rows=rows, deterministic=deterministic),
            None,
            None,
            cls_positions=cls_positions,
            rows=rows,
            deterministic=deterministic,
            every_layer=every_layer,
            cls_only=cls_only,
        )


def resized(model: Any, params: Mapping[str, Any], image_size: int) -> tuple[Any, dict[str, Any]]:
    """Return a model and its parameters for another image size, with its learnt positions resized.

    Args:
        model: a ViT with a head, or without.
        params: its parameters, unboxed.
        image_size: new side of the images, in pixels.

    Raises:
        ValueError: patches do not fill the images.
    """
    c: ViTConfig = model.config
    new = dataclasses.replace(c, image_size=image_size)
    tree = {**params}
    encoder = dict(tree["encoder"]) if "encoder" in tree else tree
    if c.learnt_positions:
        table = jnp.asarray(encoder["embeddings"]["position"]["embedding"])
        kept = int(c.has_cls and c.cls_position)
        side = image_size // c.patch_size
        places = jnp.concatenate([table[:kept], resize_positions(table[kept:], side, side, c.resize)])
        encoder["embeddings"] = {**encoder["embeddings"], "position": {"embedding": np.asarray(places)}}
    if "encoder" in tree:
        tree["encoder"] = encoder
    return model.clone(config=new), tree


# The two-way table between the parameters and the released checkpoints' names.


def patch_entries(c: ViTConfig, prefix: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the entries of the patches' linear map, with stored names under `prefix`, of the embeddings at `path`."""
    name = f"{prefix}embeddings.patch_embeddings.projection"
    return [
        Entry(f"{name}.weight", (*path, "patch", "kernel"), Convolved(c.patch_size, c.channels, c.width)),
        Entry(f"{name}.bias", (*path, "patch", "bias"), same(c.width)),
    ]


def encoder_entries(
    c: ViTConfig,
    prefix: str,
    path: tuple[str, ...],
    *,
    pooler: bool,
    patches: Callable[..., list[Entry]] = patch_entries,
) -> list[Entry]:
    """Return the encoder's entries, with stored names under `prefix` and parameters at `path`."""
    n, width, heads, inner = c.layers, (c.width,), (c.heads, c.width // c.heads), (c.feed_forward,)
    layer, at, embeddings = f"{prefix}encoder.layer.{{layer}}.", (*path, "layers"), (*path, "embeddings")
    entries = patches(c, prefix, embeddings)
    if c.has_cls:
        token = Reshaped((1, 1, c.width), (1, c.width))
        entries.append(Entry(f"{prefix}embeddings.cls_token", (*embeddings, "cls", "embedding"), token))
    if c.learnt_positions:
        table = Reshaped((1, c.positions, c.width), (c.positions, c.width))
        entries.append(Entry(f"{prefix}embeddings.position_embeddings", (*embeddings, "position", "embedding"), table))
    project = partial(linear_entries, inputs=width, outputs=heads, layers=n, bias=c.qkv_bias)
    return [
        *entries,
        *(
            entry
            for part in ("query", "key", "value")
            for entry in project(f"{layer}attention.attention.{part}", (*at, "attention", part))
        ),
        *linear_entries(f"{layer}attention.output.dense", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}layernorm_before", (*at, "attention_norm"), c.width, n),
        *norm_entries(f"{layer}layernorm_after", (*at, "feed_forward_norm"), c.width, n),
        *linear_entries(f"{layer}intermediate.dense", (*at, "feed_forward", "inner"), width, inner, n),
        *linear_entries(f"{layer}output.dense", (*at, "feed_forward", "outer"), inner, width, n),
        *norm_entries(f"{prefix}layernorm", (*path, "final_norm"), c.width),
        *(linear_entries(f"{prefix}pooler.dense", (*path, "pooler"), width, width) if pooler else []),
    ]


def no_buffers(config: ViTConfig, prefix: str) -> dict[str, np.ndarray]:
    """Return the constants of older checkpoints: there are none."""
    del config, prefix
    return {}


def pixels(config: ViTConfig) -> tuple[Any, ...]:
    """Return the input shape of a model that reads images: one image, float32."""
    return (jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), jnp.float32),)


# The reference names the parts of a layer otherwise in memory, and so in its gradients, than in checkpoints.
IN_MEMORY = tuple(
    (rf"\blayers\.(\d+)\.{ours}\.", rf"encoder.layer.\1.{stored}.")
    for ours, stored in {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "layernorm_before": "layernorm_before",
        "layernorm_after": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items()
)
PARTS = EncoderParts(
    ViT,
    encoder_entries,
    prefix="vit.",
    classes="ViT",
    renamed=IN_MEMORY,
    buffers=no_buffers,
    endings=(("classification", "ForImageClassification"),),
)
FAMILY = Family(
    config=ViTConfig,
    title="ViT",
    paper="Dosovitskiy et al. 2021",
    reads="images",
    architectures=architectures(PARTS, {"classification": Form()}),
    example=pixels,
    above=("final_norm",),
)
