"""Decode image files to arrays of bytes, whatever their mode, within limits that are checked before decoding."""

from __future__ import annotations

import io

import numpy as np

from ..errors import DataError

MOST_PIXELS = 50_000_000
"""Largest number of pixels of an image."""
MOST_BYTES = 200_000_000
"""Largest size of an encoded image."""


def decode(data: bytes, where: str, channels: int | None = 3) -> np.ndarray:
    """Decode an image of any format that Pillow reads.

    It is rotated as its EXIF orientation says. Values of 16 bits are reduced to their upper 8, transparency is dropped
    as in the reference implementation, and of an animation the first frame is taken.

    Args:
        data: the file's content.
        where: what it is, for messages.
        channels: 3 for colours, 1 for grey, None for 1 if the image is grey and else 3.

    Returns:
        [height, width, channels] uint8.

    Raises:
        DataError: it is no image, damaged, truncated, without pixels, or larger than `MOST_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(data) > MOST_BYTES:
        raise DataError(f"{where}: {len(data):,} bytes, beyond the limit of {MOST_BYTES:,} for an image.")
    size = None
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            _check_size(size, where)
            return _pixels(ImageOps.exif_transpose(image), where, channels)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        what = "an empty file" if not data else f"it begins with {data[:8]!r}"
        raise DataError(f"{where}: not an image that can be read ({what}).") from None
    except Exception as error:  # decoders raise anything for damaged data
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise DataError(f"{where}: more than the limit of {MOST_PIXELS:,} pixels.") from None
        what = "not an image that can be read" if size is None else "damaged or truncated"
        raise DataError(f"{where}: {what} ({str(error) or type(error).__name__}).") from None


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if not width or not height:
        raise DataError(f"{where}: an image of {width} x {height} pixels.")
    if width * height > MOST_PIXELS:
        raise DataError(f"{where}: {width:,} x {height:,} pixels, beyond the limit of {MOST_PIXELS:,}. Shrink it.")


GREY = ("1", "L", "LA", "La", "I", "F")


def _pixels(image, where: str, channels: int | None) -> np.ndarray:
    """Return the pixels of an open image; see `decode`."""
    from PIL import Image

    if channels is None:
        channels = 1 if image.mode in GREY or image.mode.startswith("I;16") else 3
    if image.mode == "F":
        raise DataError(f"{where}: its values are floating-point numbers; expected 8 or 16 bits.")
    if image.mode in ("LAB", "HSV"):
        raise DataError(f"{where}: its colours are in {image.mode}; expected grey, RGB, CMYK or YCbCr. Convert it.")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65_535:
            raise DataError(f"{where}: values from {low} to {high}; expected 8 or 16 bits.")
        image = Image.fromarray((values >> 8 if image.mode != "I" or high > 255 else values).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    found = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return found.reshape(*found.shape[:2], channels)
