"""Elastic deformation, pixelation and JPEG compression."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from epdistill.robustness.corruptions.operators import gaussian
from epdistill.robustness.corruptions.registry import corruption


@corruption(
    "elastic_transform",
    ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
)
def elastic_transform(
    images: Tensor, shares: tuple[float, float, float], generator: torch.Generator
) -> Tensor:
    """A random affine map, then a random smooth displacement (Simard et al., 2003).

    The constants (strength, smoothness, affine) are shares of the image's shorter side.
    Affine: three points, a third of that side from the centre, move by up to `affine`
    along each axis. Displacement: uniform noise in [-1,1] per pixel, smoothed by a
    Gaussian of standard deviation `smoothness`, times `strength`. Each step resamples
    linearly; the image is mirrored at its border.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    strength, smoothness, affine = (share * side for share in shares)
    images = _affine(images, affine, generator)
    if strength == 0:
        return images
    noise = torch.rand((len(images), 2, height, width), generator=generator) * 2 - 1
    shift = strength * gaussian(noise, smoothness, truncate=3, border="reflect")
    i, j = torch.arange(height)[:, None], torch.arange(width)
    # align_corners=False mirrors about the pixels' outer edge, as SciPy's "reflect" does.
    return _sample(images, i + shift[:, 0], j + shift[:, 1], align_corners=False)


@corruption("pixelate", (0.95, 0.90, 0.85, 0.75, 0.65))
def pixelate(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Fewer pixels: Pillow's box filter down to int(share H) x int(share W) and back up.

    What `Image.resize(..., BOX)` does, for a whole block at once: along the width, then
    along the height, each result rounded to 8 bits. Bit for bit for square images; for
    others Pillow may begin with the height, and a rounding differ by one level.
    """
    pixels = (images * 255).round().int()
    for axis in (3, 2):
        first, last, back = _box_windows(images.shape[axis], share)
        mean = pixels.index_select(axis, first) + pixels.index_select(axis, last) + 1
        pixels = (mean // 2).index_select(axis, back)
    return pixels.to(images.dtype) / 255


@corruption("jpeg_compression", (80, 65, 58, 50, 40))
def jpeg_compression(images: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    """Saved as JPEG by Pillow and read again. The bytes depend on the build of libjpeg."""
    pixels = (images * 255).round().to(torch.uint8).movedim(1, 3).contiguous().numpy()
    result = np.empty_like(pixels)
    for image, decoded in zip(pixels, result, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        file.seek(0)
        with Image.open(file) as opened:
            decoded[...] = np.asarray(opened).reshape(image.shape)
    return torch.from_numpy(result).movedim(3, 1).to(images.dtype) / 255


def _affine(images: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """Move three points of each image by up to `reach` pixels, and the image with them."""
    n, _, height, width = images.shape
    arm = min(height, width) // 3
    centre = torch.tensor([width // 2, height // 2], dtype=torch.float64)
    # Where the points (+,+), (+,-), (-,-) go, as displacements (x, y); each (N,2).
    moves = (torch.rand((3, n, 2), generator=generator, dtype=torch.float64) * 2 - 1) * reach
    # x' = x + L (x - p1) + m1 with the columns of L read off the two arms of length 2 arm.
    right, down = (moves[1] - moves[2]) / (2 * arm), (moves[0] - moves[1]) / (2 * arm)
    linear = torch.stack([right, down], dim=2) + torch.eye(2, dtype=torch.float64)
    a, b, c, d = linear[:, 0, 0], linear[:, 0, 1], linear[:, 1, 0], linear[:, 1, 1]
    determinant = (a * d - b * c)[:, None, None]
    anchor = centre + torch.tensor([arm, -arm], dtype=torch.float64)
    moved = anchor + moves[1]
    # The pixel seen at (x, y) comes from anchor + L^-1 ((x, y) - moved).
    x = torch.arange(width, dtype=torch.float64) - moved[:, 0, None, None]
    y = torch.arange(height, dtype=torch.float64)[:, None] - moved[:, 1, None, None]
    a, b, c, d = (entry[:, None, None] for entry in (a, b, c, d))
    columns = anchor[0] + (d * x - b * y) / determinant
    rows = anchor[1] + (a * y - c * x) / determinant
    # align_corners=True mirrors about the border pixels' centres, as OpenCV's REFLECT_101 does.
    return _sample(images, rows.float(), columns.float(), align_corners=True)


def _sample(images: Tensor, rows: Tensor, columns: Tensor, *, align_corners: bool) -> Tensor:
    """Linear interpolation at (N,H,W) pixel coordinates, mirrored at the border."""
    height, width = images.shape[2:]
    if align_corners:
        grid = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], dim=3)
    else:
        grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=3)
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=align_corners
    )


@lru_cache(maxsize=64)
def _box_windows(length: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which pixels Pillow's box filter averages on the way down, and repeats on the way up.

    Pillow gives equal weight to the pixels whose centre falls inside the window of an
    output pixel. The window is under two pixels wide here, so they are one or two.

    Returns:
        first, last: (m,) int64, the ends of each window.
        back: (n,) int64, the small pixel that each large one shows.
    """
    small = int(length * share)
    windows = [_window(length, small, k) for k in range(small)]
    first = torch.tensor([window[0] for window in windows])
    last = torch.tensor([window[-1] for window in windows])
    back = torch.tensor([_window(small, length, k)[0] for k in range(length)])
    return first, last, back


def _window(source: int, target: int, k: int) -> list[int]:
    """The source pixels of output pixel `k`, in Pillow's own order of rounding."""
    scale = source / target
    width = max(scale, 1.0)
    centre = (k + 0.5) * scale
    low = max(int(centre - 0.5 * width + 0.5), 0)
    high = min(int(centre + 0.5 * width + 0.5), source)
    return [p for p in range(low, high) if -0.5 < (p - centre + 0.5) * (1 / width) <= 0.5]
