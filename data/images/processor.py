"""The preprocessing of a released folder, `preprocessor_config.json`: resizing, cropping, rescaling, normalisation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import DataError
from ..json_files import read_object, value_of, write_json

FILE = "preprocessor_config.json"
RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Processor:
    """What is done to an image before the model, in the order of the fields; None for a step that is left out.

    Attributes:
        size: (height, width) to resize to, or one number for the shorter edge.
        crop: (height, width) to cut from the middle, filled up with zeros where the image is smaller.
        resampling: how to resize, a number of Pillow's (`RESAMPLINGS`).
        scale: factor of the bytes.
        mean: mean of each channel, subtracted after scaling.
        std: standard deviation of each channel, divided by.
        channels: 1 for grey images, 3 for colours.
        extra: other entries of the file as JSON text, written back.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None = None
    resampling: int = 2
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    channels: int = 3
    extra: tuple[tuple[str, str], ...] = ()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Preprocess an image [height, width, channels] uint8 -> [height, width, channels] float32."""
        return self.normalise(self.fit(pixels))

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop an image; it stays uint8."""
        if self.size is not None:
            height, width = pixels.shape[:2]
            if isinstance(self.size, int):
                short = min(height, width)
                height, width = (int(self.size * side / short) for side in (height, width))
            else:
                height, width = self.size
            pixels = resize(pixels, height, width, self.resampling)
        return pixels if self.crop is None else _centre(pixels, *self.crop)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Rescale and normalise images [..., channels] -> float32."""
        values = pixels.astype(np.float32)
        if self.scale is not None:
            values *= np.float32(self.scale)
        if self.mean is not None and self.std is not None:
            values -= np.array(self.mean, np.float32)
            values /= np.array(self.std, np.float32)
        return values

    @property
    def output(self) -> tuple[int, int] | None:
        """(height, width) of what comes out, if it is the same for all images."""
        return self.crop if self.crop is not None else self.size if isinstance(self.size, tuple) else None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the file of a checkpoint folder; None if there is none. Errors as in `from_json`."""
        path = folder / FILE
        return cls.from_json(read_object(path), str(path)) if path.is_file() else None

    @classmethod
    def from_json(cls, stored: dict[str, Any], where: str) -> Self:
        """Make a processor from the content of a file.

        Args:
            stored: the content.
            where: the file, for messages.

        Raises:
            DataError: a setting is not implemented, or inconsistent.
        """

        def on(key: str, default: bool) -> bool:
            return bool(value_of(stored, key, bool | None, where, default))

        if on("do_pad", False):
            raise DataError(f"{where}: do_pad is not implemented.")
        scaled, normalised = on("do_rescale", True), on("do_normalize", True)
        mean, std = (_numbers(stored, key, where) if normalised else None for key in ("image_mean", "image_std"))
        if mean is not None and std is not None and (len(mean) != len(std) or not all(std)):
            raise DataError(f"{where}: image_mean and image_std: expected as many numbers, none of image_std zero.")
        resampling = value_of(stored, "resample", int | None, where, 2)
        if resampling is None:
            resampling = 2
        if resampling not in RESAMPLINGS:
            raise DataError(f"{where}: resample: expected one of {RESAMPLINGS}, found {resampling}.")
        channels = 3 if mean is None else len(mean)
        if channels not in (1, 3):
            raise DataError(f"{where}: image_mean: expected 1 or 3 numbers, found {channels}.")
        return cls(
            size=_size(stored, "size", where, edge=True) if on("do_resize", True) else None,
            crop=_box(_size(stored, "crop_size", where, edge=False)) if on("do_center_crop", False) else None,
            resampling=resampling,
            scale=value_of(stored, "rescale_factor", float, where, 1 / 255) if scaled else None,
            mean=mean,
            std=std,
            channels=channels,
            extra=tuple((key, json.dumps(value)) for key, value in stored.items() if key not in _KEYS),
        )

    def save(self, folder: Path) -> None:
        """Write the file into a folder."""
        write_json(folder / FILE, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file, as the reference implementation reads it."""
        stored: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            **{key: json.loads(text) for key, text in self.extra},
            "do_resize": self.size is not None,
            "do_center_crop": self.crop is not None,
            "do_rescale": self.scale is not None,
            "do_normalize": self.mean is not None,
            "resample": self.resampling,
        }
        if self.size is not None:
            stored["size"] = {"shortest_edge": self.size} if isinstance(self.size, int) else _stored(self.size)
        if self.crop is not None:
            stored["crop_size"] = _stored(self.crop)
        if self.scale is not None:
            stored["rescale_factor"] = self.scale
        if self.mean is not None and self.std is not None:
            stored |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        return stored


_KEYS = {
    *("do_resize", "size", "do_center_crop", "crop_size", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
}


def _stored(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _box(size: tuple[int, int] | int | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _numbers(stored: dict[str, Any], key: str, where: str) -> tuple[float, ...]:
    found = value_of(stored, key, list[float] | float | None, where, None)
    if found is None:
        return (0.5, 0.5, 0.5)
    return tuple(map(float, found)) if isinstance(found, list) else (float(found),) * 3


def _size(stored: dict[str, Any], key: str, where: str, *, edge: bool) -> tuple[int, int] | int:
    """Read a size: {"height", "width"}, {"shortest_edge"} where `edge`, or one number for a square."""
    found = value_of(stored, key, dict[str, int] | int | None, where, None)
    found = 224 if found is None else found
    sides = [found, found] if isinstance(found, int) else [found.get(side, 0) for side in ("height", "width")]
    if edge and isinstance(found, dict) and set(found) == {"shortest_edge"} and found["shortest_edge"] > 0:
        return found["shortest_edge"]
    if min(sides) < 1 or (isinstance(found, dict) and set(found) != {"height", "width"}):
        raise DataError(
            f"{where}: {key}: expected height and width{' or shortest_edge' if edge else ''}, found {found}."
        )
    return sides[0], sides[1]


def resize(pixels: np.ndarray, height: int, width: int, resampling: int = 2) -> np.ndarray:
    """Resize an image [h, w, channels] uint8 with Pillow, whose filters take in all pixels when they shrink."""
    if pixels.shape[:2] == (height, width):
        return pixels
    from PIL import Image

    grey = pixels.shape[-1] == 1
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    found = np.asarray(image.resize((width, height), Image.Resampling(resampling)))
    return found[..., None] if grey else found


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the middle out of an image, which is filled up with zeros where it is smaller."""
    short = [max(0, want - have) for want, have in zip((height, width), pixels.shape[:2], strict=True)]
    if any(short):
        pixels = np.pad(pixels, [*((-(-more // 2), more // 2) for more in short), (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
