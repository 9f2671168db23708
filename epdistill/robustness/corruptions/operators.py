"""Blurring and zooming along rows and columns as small matrices, and moving pixels.

A separable linear operation on an image is `rows @ image @ columns.T`: the rules
at the borders stand in the matrices once, and a block of images costs two matrix
products whatever the kernel's length.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=64)
def gaussian_matrix(length: int, sigma: float, truncate: float, border: str) -> Tensor:
    """The convolution with a sampled Gaussian along an axis of `length` pixels.

    Args:
        length: n.
        sigma: Standard deviation in pixels, >= 0.
        truncate: The kernel reaches int(truncate * sigma + 0.5) pixels to each side
            (SciPy's rule); 0 pixels make the identity.
        border: `"nearest"` (aaa|abc|ccc) or `"reflect"` (cba|abc|cba).

    Returns:
        (n,n) float32, rows summing to 1.
    """
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return torch.eye(length)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    source = np.arange(length)[:, None] + offsets[None, :]
    if border == "nearest":
        source = source.clip(0, length - 1)
    else:
        source = source % (2 * length)
        source = np.minimum(source, 2 * length - 1 - source)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length)[:, None], source), kernel[None, :])
    return torch.from_numpy(matrix).float()


@lru_cache(maxsize=256)
def zoom_matrix(length: int, factor: float) -> Tensor:
    """Zooming into the middle of an axis by linear interpolation.

    The middle ceil(n / factor) pixels are spread over round(that * factor) samples,
    ends on ends, of which the middle n are kept: `clipped_zoom` of the published
    script along one axis.

    Args:
        length: n.
        factor: >= 1.

    Returns:
        (n,n) float32, rows summing to 1.
    """
    kept = math.ceil(length / factor)
    first = (length - kept) // 2
    samples = round(kept * factor)
    trimmed = (samples - length) // 2
    position = (np.arange(length) + trimmed) * (kept - 1) / max(samples - 1, 1)
    low = np.minimum(np.floor(position).astype(int), kept - 1)
    high = np.minimum(low + 1, kept - 1)
    share = position - low
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length), first + low), 1 - share)
    np.add.at(matrix, (np.arange(length), first + high), share)
    return torch.from_numpy(matrix).float()


def apply_separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ image @ columns.T` for (...,H,W) images, (H,H) rows and (W,W) columns."""
    return rows @ (images @ columns.T)


def gaussian(images: Tensor, sigma: float, truncate: float = 4, border: str = "nearest") -> Tensor:
    """Gaussian blur of (...,H,W) images; the defaults are those of scikit-image's `gaussian`."""
    height, width = images.shape[-2:]
    return apply_separable(
        images,
        gaussian_matrix(height, sigma, truncate, border),
        gaussian_matrix(width, sigma, truncate, border),
    )


def fetch(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take each pixel from a place of its own, the same for all channels.

    Args:
        images: (N,C,H,W).
        rows: int64, broadcastable to (N,H,W), each in 0..H-1.
        columns: int64, broadcastable to (N,H,W), each in 0..W-1.

    Returns:
        (N,C,H,W): pixel (i,j) of image n is its pixel (rows[n,i,j], columns[n,i,j]).
    """
    n, channels, height, width = images.shape
    place = (rows * width + columns).expand(n, height, width).reshape(n, 1, -1)
    taken = images.reshape(n, channels, -1).gather(2, place.expand(-1, channels, -1))
    return taken.reshape(images.shape)


def motion_kernel(radius: float, sigma: float) -> Tensor:
    """The weights of ImageMagick's motion blur along its line, from the pixel outwards.

    A half Gaussian over 2 ceil(radius) + 1 pixels, summing to 1. Beyond five standard
    deviations a weight is under 4e-6, less than 8 bits can show: left out.

    Returns:
        (T,) float64.
    """
    taps = min(2 * math.ceil(radius) + 1, math.ceil(5 * sigma) + 1)
    kernel = torch.exp(-0.5 * (torch.arange(taps, dtype=torch.float64) / sigma) ** 2)
    return kernel / kernel.sum()


def motion(images: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Blur each image along a line of its own: ImageMagick's `MotionBlurImage`.

    Weight t of `motion_kernel` falls on the pixel at t * (cos, sin) of the angle (right
    and down), each coordinate rounded by ceil(. - 1/2); beyond the border the border's
    pixel is taken.

    Args:
        images: (N,C,H,W).
        radius: In pixels.
        sigma: In pixels.
        degrees: (N,) angles.

    Returns:
        (N,C,H,W).
    """
    height, width = images.shape[2:]
    angle = torch.deg2rad(degrees.double())
    across, down = torch.cos(angle), torch.sin(angle)
    i, j = torch.arange(height), torch.arange(width)
    result = torch.zeros_like(images)
    for t, weight in enumerate(motion_kernel(radius, sigma).tolist()):
        dy = torch.ceil(t * down - 0.5).long()
        dx = torch.ceil(t * across - 0.5).long()
        rows = (i + dy[:, None]).clamp(0, height - 1)
        columns = (j + dx[:, None]).clamp(0, width - 1)
        result += weight * fetch(images, rows[:, :, None], columns[:, None, :])
    return result
