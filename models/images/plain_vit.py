"""The plain ViT: the baseline to which changes of ViT are compared.

Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k", and its released code.

What sets it apart from vit.py: fixed sine-cosine positions, no [CLS] but the mean over the patches, a tanh layer before
the classes, the tanh GELU, and kernels of Xavier's uniform distribution. [CLS] and learnt positions are options,
added as in the released code: a position for each patch, none for [CLS].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
from jax.nn.initializers import Initializer

from ..family import Family
from ..heads.with_head import Form, architectures
from ..layers.linear import xavier
from .vit import PARTS, ViT, ViTConfig, pixels


@dataclass(frozen=True)
class PlainViTConfig(ViTConfig):
    """Sizes and settings of a plain ViT. The reference implementation has no such model."""

    MODEL_TYPE: ClassVar[str] = "plain-vit"
    KEYS: ClassVar[Mapping[str, str]] = {**ViTConfig.KEYS, "pool": "pool", "positions_kind": "positions_kind"}
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ViTConfig.REQUIRED,
        "pool": ("mean", "cls"),
        "positions_kind": ("sines", "learnt"),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"plain-{name}": fields
        for name, fields in ViTConfig.PRESETS.items()
        if name in ("vit-tiny", "vit-small", "vit-base")
    }

    activation: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-6
    resize: str = "bilinear"
    pool: str = "mean"
    """what the classes are computed from: "mean", over the patches, or "cls" """
    positions_kind: str = "sines"
    """kind of positions: "sines", fixed for any image size, or "learnt" """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4 or self.width < 8:
            raise ValueError(f"PlainViTConfig: width {self.width} is not a multiple of 4, and at least 8")

    @property
    def pooling(self) -> str:
        """What heads over whole images read."""
        return self.pool

    @property
    def cls_position(self) -> bool:
        """Whether [CLS] has a position too."""
        return False

    @property
    def learnt_positions(self) -> bool:
        """Whether positions are parameters."""
        return self.positions_kind == "learnt"

    @property
    def initializer(self) -> Initializer:
        """Initialiser of new kernels: Xavier's, uniform, of the map from and to all heads together."""
        return xavier(self.width)

    @property
    def input_initializers(self) -> tuple[Initializer, Initializer, Initializer]:
        """Initialisers of the patches' linear map, of [CLS] and of learnt positions."""
        draw = nn.initializers
        return draw.lecun_normal(), draw.zeros_init(), draw.normal(self.width**-0.5)


class PlainViT(ViT):
    """The encoder of a plain ViT, which has no pooler."""

    pooler: bool = False


FAMILY = Family(
    config=PlainViTConfig,
    title="Plain ViT",
    paper="Beyer et al. 2022",
    reads="images",
    architectures=architectures(
        PARTS._replace(build=PlainViT, classes="PlainViT", pooler=False),
        {"classification": Form(transform="tanh", names=("pre_logits", "classifier"))},
    ),
    example=pixels,
    above=("final_norm",),
)
