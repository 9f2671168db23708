"""Defocus, glass, motion, zoom and Gaussian blur."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.robustness.corruptions.operators import fetch, gaussian, motion, zoom_matrix
from epdistill.robustness.corruptions.registry import corruption


@corruption("defocus_blur", ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)))
def defocus_blur(images: Tensor, disk: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Convolution with a disk (radius, smoothing sigma), mirrored at the borders."""
    kernel = _disk(*disk)
    channels, pad = images.shape[1], kernel.shape[0] // 2
    weight = kernel.to(images)[None, None].expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(images, (pad,) * 4, mode="reflect"), weight, groups=channels)


@corruption("glass_blur", ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)))
def glass_blur(images: Tensor, glass: tuple[float, int, int], generator: torch.Generator) -> Tensor:
    """Frosted glass: Gaussian blur, pixels displaced at random, Gaussian blur again.

    (sigma, reach, rounds). In each round every pixel but those of the first rows and
    columns takes the value of one at most `reach` above and to the left, each
    displacement -reach..reach-1 as the script draws it (so -1 or 0 here). The script
    means to swap the two, but its tuple assignment acts on views of one array and
    copies; walking from the last pixel to the first, it never reads what it has
    written. So a round is a lookup, which is what the published arrays hold.
    """
    sigma, reach, rounds = glass
    n, _, height, width = images.shape
    i, j = torch.arange(height)[:, None], torch.arange(width)
    moved = (i > reach) & (i <= height - reach) & (j > reach) & (j <= width - reach)
    images = gaussian(images, sigma)
    for _ in range(rounds):
        shift = torch.randint(-reach, reach, (2, n, height, width), generator=generator)
        shift = torch.where(moved, shift, 0)
        images = fetch(images, i + shift[0], j + shift[1])
    return gaussian(images, sigma)


@corruption("motion_blur", ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)))
def motion_blur(images: Tensor, line: tuple[int, float], generator: torch.Generator) -> Tensor:
    """A moving camera: ImageMagick's motion blur (radius, sigma), angle uniform in +-45 degrees."""
    degrees = torch.rand(len(images), generator=generator) * 90 - 45
    return motion(images, *line, degrees)


@corruption("zoom_blur", (1.06, 1.11, 1.16, 1.21, 1.26))
def zoom_blur(images: Tensor, end: float, generator: torch.Generator) -> Tensor:
    """A camera moving towards the scene: the mean of the image and its zooms 1, 1.01, ... to `end`.

    Which factors `arange(1, end, 0.01)` holds is left to floating point, as in the
    script: the end is among them for 1.06 and 1.11.
    """
    height, width = images.shape[2:]
    factors = np.arange(1, end, 0.01).tolist()
    # All zooms at once: one product per axis. Shapes: columns (W, Z*W), rows (H, H*Z).
    columns = torch.cat([zoom_matrix(width, factor).T for factor in factors], dim=1)
    rows = torch.stack([zoom_matrix(height, factor) for factor in factors], dim=2).flatten(1)
    wide = images @ columns
    total = rows @ wide.reshape(*images.shape[:2], height * len(factors), width)
    return (images + total) / (len(factors) + 1)


@corruption("gaussian_blur", (0.4, 0.6, 0.7, 0.8, 1.0))
def gaussian_blur(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Convolution with a Gaussian, the border's pixels repeated outside."""
    return gaussian(images, sigma)


def _disk(radius: float, sigma: float) -> Tensor:
    """The defocus kernel: a disk on the pixel grid, smoothed by a 3x3 Gaussian."""
    reach = int(radius) + 1  # the smoothing adds one pixel on each side
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).double()
    bell = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / (2 * sigma**2))
    bell = bell / bell.sum()
    smoothing = bell[:, None] * bell[None, :]
    kernel = F.conv2d((disk / disk.sum())[None, None], smoothing[None, None], padding=1)[0, 0]
    return kernel / kernel.sum()
