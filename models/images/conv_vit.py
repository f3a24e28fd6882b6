"""A ViT on a convolutional stem: what a small model learns from few images.

Xiao et al. 2021, "Early Convolutions Help Transformers See Better".

What sets it apart from plain_vit.py, whose sine-cosine positions, layers and mean over the patches it has: instead of
one linear map of each patch, convolutions of 3 x 3 pixels that halve the sides until a pixel is a patch. Their norm is
layer normalisation over the channels of a pixel, not the paper's over a batch, which an accumulated or divided batch
would change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, linear_entries, norm_entries, same
from ..family import Family
from ..heads.with_head import Form, architectures
from ..layers.linear import Linear
from ..layers.norms import LayerNorm
from .patches import Convolved
from .plain_vit import PlainViT, PlainViTConfig
from .vit import PARTS, Embeddings, ViTConfig, encoder_entries, pixels

KERNEL = 3  # pixels along a side


@dataclass(frozen=True)
class ConvViTConfig(PlainViTConfig):
    """Sizes and settings of a ViT on a convolutional stem. The reference implementation has no such model."""

    MODEL_TYPE: ClassVar[str] = "conv-vit"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"conv-{name}": fields for name, fields in ViTConfig.PRESETS.items() if name in ("vit-tiny", "vit-small")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"ConvViTConfig: patch size {self.patch_size} is not a power of two, and at least 2")

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Channels after each convolution: the width after the last one, and half of the next one's before it."""
        count = self.patch_size.bit_length() - 1
        return tuple(max(8, self.width >> (count - 1 - number)) for number in range(count))


class Stem(nn.Module):
    """Convolutions of stride 2, each normalised and rectified, then a linear map (Xiao et al. 2021, 4)."""

    config: ConvViTConfig

    @nn.compact
    def __call__(self, pixel_values: Array) -> Array:
        """Embed images [B, H, W, C] -> [B, patches, E]."""
        c = self.config
        linear = partial(Linear, kernel_init=nn.initializers.he_normal(), dtype=c.dtype)
        hidden = pixel_values.astype(c.dtype)
        for number, width in enumerate(c.stem_widths):
            hidden = linear((width,), ("pixels", "embed"), name=f"convolution_{number}")(neighbours(hidden))
            hidden = jax.nn.relu(LayerNorm(c.norm_epsilon, c.dtype, name=f"norm_{number}")(hidden))
        flat = hidden.reshape(len(hidden), -1, hidden.shape[-1])
        return linear((c.width,), ("pixels", "embed"), name="last")(flat)


def neighbours(hidden: Array) -> Array:
    """Return every other pixel with those around it, [B, H, W, C] -> [B, H / 2, W / 2, 9 C], zeros outside."""
    height, width = hidden.shape[1:3]
    padded = jnp.pad(hidden, [(0, 0), (1, 1), (1, 1), (0, 0)])
    taps = [padded[:, y : y + height : 2, x : x + width : 2] for y in range(KERNEL) for x in range(KERNEL)]
    return jnp.concatenate(taps, axis=-1)


class StemEmbeddings(Embeddings):
    """The stem's output, and positions."""

    config: ConvViTConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

    def setup(self) -> None:
        super().setup()
        self.stem = Stem(self.config)

    def patches(self, pixel_values: Array) -> Array:
        """See `Embeddings.patches`."""
        return self.stem(pixel_values)


class ConvViT(PlainViT):
    """The encoder."""

    config: ConvViTConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

    def make_embeddings(self) -> Embeddings:
        """See `ViT.make_embeddings`."""
        return StemEmbeddings(self.config)


def stem_entries(c: ConvViTConfig, prefix: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the stem's entries, with stored names under `prefix`, of the embeddings at `path`."""
    entries: list[Entry] = []
    channels, path = c.channels, (*path, "stem")
    for number, width in enumerate(c.stem_widths):
        name = f"{prefix}embeddings.stem.convolution.{number}"
        at = (*path, f"convolution_{number}")
        entries.append(Entry(f"{name}.weight", (*at, "kernel"), Convolved(KERNEL, channels, width)))
        entries.append(Entry(f"{name}.bias", (*at, "bias"), same(width)))
        entries += norm_entries(f"{prefix}embeddings.stem.norm.{number}", (*path, f"norm_{number}"), width)
        channels = width
    return [*entries, *linear_entries(f"{prefix}embeddings.stem.last", (*path, "last"), (channels,), (c.width,))]


FAMILY = Family(
    config=ConvViTConfig,
    title="ViT on a convolutional stem",
    paper="Xiao et al. 2021",
    reads="images",
    architectures=architectures(
        PARTS._replace(
            build=ConvViT,
            entries=partial(encoder_entries, patches=stem_entries),
            classes="ConvViT",
            pooler=False,
        ),
        {"classification": Form(transform="tanh", names=("pre_logits", "classifier"))},
    ),
    example=pixels,
    above=("final_norm",),
)
