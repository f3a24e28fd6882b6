"""Images as rows of patches: cutting them, their places, and the resizing of learnt places to another grid."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

RESIZES = ("bicubic", "bilinear")


def patchify(pixel_values: Array, size: int) -> Array:
    """Cut images into patches.

    Args:
        pixel_values: [B, H, W, C]; H and W are multiples of the size.
        size: side of a patch, in pixels.

    Returns:
        [B, H / size · W / size, size · size · C], patches row by row, and so are the pixels of a patch.
    """
    batch, height, width, channels = pixel_values.shape
    cut = pixel_values.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.swapaxes(cut, 2, 3).reshape(batch, (height // size) * (width // size), size * size * channels)


@dataclass(frozen=True)
class Convolved:
    """The kernel of a convolution whose stride is its size, stored [E, C, P, P], as one of `patchify`'s [P·P·C, E]."""

    size: int
    channels: int
    width: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (self.width, self.channels, self.size, self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size * self.size * self.channels, self.width)

    def load(self, stored: np.ndarray) -> np.ndarray:
        return stored.transpose(2, 3, 1, 0).reshape(self.shape)

    def save(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.reshape(self.size, self.size, self.channels, self.width).transpose(3, 2, 0, 1)


def sines_2d(height: int, width: int, channels: int, temperature: float = 10_000.0) -> np.ndarray:
    """Return sine-cosine positions of a grid (Beyer et al. 2022), [height · width, channels] float32.

    The four quarters of the channels are sines and cosines of the column, then of the row, at frequencies from 1 down
    to 1 / temperature.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        channels: number of channels, a multiple of 4 and at least 8.
        temperature: the largest wavelength divided by 2π.
    """
    count = channels // 4
    frequencies = 1.0 / temperature ** (np.arange(count) / (count - 1))
    rows, columns = (place.reshape(-1, 1) * frequencies for place in np.mgrid[:height, :width])
    return np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1).astype(np.float32)


def resize_positions(table: Array, height: int, width: int, how: str) -> Array:
    """Resize the positions of a square grid to another one.

    Args:
        table: [G·G, E], row by row.
        height: rows of the new grid.
        width: columns of the new grid.
        how: "bicubic" is that of the reference implementation, torch's `interpolate` with align_corners=False;
            "bilinear" is that of the paper's code, scipy's `zoom` of order 1, where corners stay corners.

    Returns:
        [height · width, E]
    """
    side = round(len(table) ** 0.5)
    if (height, width) == (side, side):
        return table
    rows, columns = (jnp.asarray(resize_weights(side, new, how), table.dtype) for new in (height, width))
    grid = table.reshape(side, side, -1)
    return jnp.einsum("yr,xc,rce->yxe", rows, columns, grid, precision="highest").reshape(height * width, -1)


def resize_weights(old: int, new: int, how: str) -> np.ndarray:
    """Return the weights [new, old] float64 of the old places in the new ones; see `resize_positions`."""
    if how == "bilinear":
        at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
        taps, weigh = range(2), lambda distance: np.maximum(0.0, 1.0 - distance)
    else:
        at = (np.arange(new) + 0.5) * old / new - 0.5
        taps, weigh = range(-1, 3), _cubic
    weights = np.zeros((new, old))
    first = np.floor(at).astype(np.int64)
    for tap in taps:
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), weigh(np.abs(at - first - tap)))
    return weights


def _cubic(distance: np.ndarray, slope: float = -0.75) -> np.ndarray:
    """Return Keys's cubic convolution kernel at distances of up to 2, with torch's slope."""
    near = ((slope + 2) * distance - (slope + 3)) * distance**2 + 1
    far = slope * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
