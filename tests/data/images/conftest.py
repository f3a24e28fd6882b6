"""Small pictures and the files that they come in."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """(array or image, format) -> the bytes of an image file."""

    def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **settings) -> bytes:
        buffer = io.BytesIO()
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **settings)
        return buffer.getvalue()

    return encode


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """(height, width, channels, seed) -> pixels."""

    def draw(height: int = 9, width: int = 7, channels: int = 3, seed: int = 0) -> np.ndarray:
        drawn = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
        return drawn[..., 0] if channels == 1 else drawn

    return draw
