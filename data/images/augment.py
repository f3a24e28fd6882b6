"""Augmentation of training images: crops, flips, RandAugment and mixup, each a function of random numbers.

The random numbers are those of a row's own stream, so that a row is the same on any host and in a resumed run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..random import RandomStream
from .processor import Processor, resize

Crop = Literal["none", "shift", "inception"]
TRIES = 10  # of a crop with a random shape


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images at random.

    Attributes:
        crop: "shift" moves the image by up to `shift` pixels, filled up with zeros; "inception" cuts out a part of
            `least_area` to all of the area, with sides of a ratio of 3/4 to 4/3, and resizes it (Szegedy et al. 2015).
        shift: largest shift, in pixels.
        least_area: least fraction of the area.
        flip: mirror every other image.
        operations: number of operations of RandAugment (Cubuk et al. 2019); 0 for none.
        magnitude: their strength, from 0 to 10 (or, as in the baseline's code, above).
        mixup: parameter of mixup's Beta distribution (Zhang et al. 2018); 0 for none.
    """

    crop: Crop = "none"
    shift: int = 0
    least_area: float = 0.05
    flip: bool = False
    operations: int = 0
    magnitude: float = 10.0
    mixup: float = 0.0

    def __call__(self, pixels: np.ndarray, stream: RandomStream, processor: Processor) -> np.ndarray:
        """Augment an image, all but mixup, and fit it to the model; it stays uint8.

        Args:
            pixels: [height, width, channels] uint8, as it is in the data.
            stream: the row's random numbers.
            processor: fits images to the model.
        """
        if self.crop == "inception" and processor.output is not None:
            part = _random_part(pixels, stream, self.least_area)
            pixels = resize(part, *processor.output, processor.resampling)
        else:
            pixels = processor.fit(pixels)
        if self.crop == "shift":
            pixels = _shifted(pixels, stream, self.shift)
        if self.flip and stream.uniforms(1)[0] < 0.5:
            pixels = pixels[:, ::-1]
        for _ in range(self.operations):
            pixels = _operation(pixels, stream.uniforms(3), self.magnitude)
        return pixels


def mixing_share(stream: RandomStream, alpha: float) -> float:
    """Draw the share of a row's own image in mixup, from Beta(alpha, alpha), by Jöhnk's method; at least 1/2.

    It draws again until a pair suits, on average 6 times for an alpha of 2, and far more often for larger ones.
    """
    while True:
        first, second = (math.log(u) / alpha if u else -math.inf for u in stream.uniforms(2))
        top = max(first, second)
        if top > -math.inf and top + math.log1p(math.exp(-abs(first - second))) <= 0:
            share = 1 / (1 + math.exp(min(700.0, second - first)))
            return max(share, 1 - share)


def _shifted(pixels: np.ndarray, stream: RandomStream, most: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    down, right = (int(u * (2 * most + 1)) for u in stream.uniforms(2))
    return np.pad(pixels, [(most, most), (most, most), (0, 0)])[down : down + height, right : right + width]


def _random_part(pixels: np.ndarray, stream: RandomStream, least_area: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    for u_area, u_ratio, u_top, u_left in stream.uniforms(4 * TRIES).reshape(TRIES, 4).tolist():
        area = height * width * (least_area + (1 - least_area) * u_area)
        ratio = math.exp(math.log(3 / 4) + u_ratio * 2 * math.log(4 / 3))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(u_top * (height - rows + 1)), int(u_left * (width - columns + 1))
            return pixels[top : top + rows, left : left + columns]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


# --- RandAugment ------------------------------------------------------------------------------------------------------


def _affine(image: Any, *coefficients: float) -> Any:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _enhanced(image: Any, kind: str, factor: float) -> Any:
    from PIL import ImageEnhance

    return getattr(ImageEnhance, kind)(image).enhance(factor)


def _changed(image: Any, kind: str, *arguments: Any) -> Any:
    from PIL import ImageOps

    return getattr(ImageOps, kind)(image, *arguments)


# Name -> (image, strength from 0 to 1, sign) -> image, with the largest strengths of Cubuk et al. 2019.
OPERATIONS: dict[str, Callable[[Any, float, int], Any]] = {
    "identity": lambda image, level, sign: image,
    "auto contrast": lambda image, level, sign: _changed(image, "autocontrast"),
    "equalize": lambda image, level, sign: _changed(image, "equalize"),
    "invert": lambda image, level, sign: _changed(image, "invert"),
    "posterize": lambda image, level, sign: _changed(image, "posterize", max(1, 8 - round(4 * level))),
    "solarize": lambda image, level, sign: _changed(image, "solarize", round(256 * (1 - min(level, 1.0)))),
    "rotate": lambda image, level, sign: image.rotate(30 * level * sign, resample=2),
    "shear x": lambda image, level, sign: _affine(image, 1, 0.3 * level * sign, 0, 0, 1, 0),
    "shear y": lambda image, level, sign: _affine(image, 1, 0, 0, 0.3 * level * sign, 1, 0),
    "translate x": lambda image, level, sign: _affine(image, 1, 0, 0.45 * level * sign * image.width, 0, 1, 0),
    "translate y": lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, 0.45 * level * sign * image.height),
    "color": lambda image, level, sign: _enhanced(image, "Color", max(0.0, 1 + 0.9 * level * sign)),
    "contrast": lambda image, level, sign: _enhanced(image, "Contrast", max(0.0, 1 + 0.9 * level * sign)),
    "brightness": lambda image, level, sign: _enhanced(image, "Brightness", max(0.0, 1 + 0.9 * level * sign)),
    "sharpness": lambda image, level, sign: _enhanced(image, "Sharpness", max(0.0, 1 + 0.9 * level * sign)),
}


def _operation(pixels: np.ndarray, uniforms: np.ndarray, magnitude: float) -> np.ndarray:
    from PIL import Image

    grey = pixels.shape[-1] == 1
    chosen = list(OPERATIONS.values())[int(uniforms[0] * len(OPERATIONS))]
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
    found = np.asarray(chosen(image, magnitude / 10, 1 if uniforms[1] < 0.5 else -1))
    return found[..., None] if grey else found
