"""Images of every mode become bytes; what is damaged, empty or enormous is refused, and named."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bestiary.data.errors import DataError
from bestiary.data.images.decode import MOST_PIXELS, decode


def test_colours_and_grey(encoded, picture):
    colours, grey = picture(), picture(channels=1)
    np.testing.assert_array_equal(decode(encoded(colours), "a.png"), colours)
    np.testing.assert_array_equal(decode(encoded(grey), "a.png", None), grey[..., None])
    np.testing.assert_array_equal(decode(encoded(grey), "a.png"), np.repeat(grey[..., None], 3, axis=-1))
    assert decode(encoded(colours), "a.png", None).shape == (9, 7, 3)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    np.testing.assert_array_equal(decode(encoded(colours), "a.png", 1)[..., 0], expected)


def test_sixteen_bits_keep_the_upper_eight(encoded):
    deep = np.array([[0, 255, 256], [32_768, 65_535, 511]], np.uint16)
    found = decode(encoded(deep), "deep.png", 1)[..., 0]
    np.testing.assert_array_equal(found, deep >> 8)


def test_palettes_and_transparency(encoded, picture):
    colours = np.tile(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), (4, 4, 1))
    palette = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    np.testing.assert_array_equal(decode(encoded(palette), "p.png"), colours)
    np.testing.assert_array_equal(decode(encoded(palette, transparency=b"\0\xff"), "p.png"), colours)
    see_through = np.concatenate([picture(), np.zeros((9, 7, 1), np.uint8)], axis=-1)
    np.testing.assert_array_equal(decode(encoded(see_through), "alpha.png"), picture())


def test_exif_rotation(encoded, picture):
    image = Image.fromarray(picture(8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is the right side
    assert decode(encoded(image, "JPEG", exif=exif), "photo.jpg").shape == (4, 8, 3)
    np.testing.assert_array_equal(decode(encoded(image, exif=exif), "photo.png"), np.rot90(picture(8, 4), -1))


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"x\.png: not an image that can be read \(an empty file\)"),
        (b"hello", r"x\.png: not an image that can be read \(it begins with b'hello'\)"),
        (png_of(10_000, MOST_PIXELS // 10_000 + 1), r"x.png: 10,000 x 5,001 pixels, beyond the limit of 50,000,000"),
        (png_of(60_000, 60_000), "x.png: more than the limit of 50,000,000 pixels"),
        (png_of(0, 5), "x.png: (an image of 0 x 5 pixels|not an image)"),
        (png_of(5, 5), "x.png: damaged or truncated"),
    ],
)
def test_what_is_no_image_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        decode(data, "x.png")


def test_truncated_files_are_refused(encoded, picture):
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        whole = encoded(picture(40, 40), kind)
        with pytest.raises(DataError, match=r"y: (damaged or truncated|not an image)"):
            decode(whole[: len(whole) // 2], "y")


def test_other_colour_spaces_are_refused(encoded):
    with pytest.raises(DataError, match=r"lab\.tif: its colours are in LAB; expected grey, RGB, CMYK or YCbCr"):
        decode(encoded(Image.new("LAB", (2, 2)), "TIFF"), "lab.tif")


def test_floats_are_refused(encoded):
    with pytest.raises(DataError, match=r"f\.tif: its values are floating-point numbers"):
        decode(encoded(np.ones((2, 2), np.float32), "TIFF"), "f.tif")
