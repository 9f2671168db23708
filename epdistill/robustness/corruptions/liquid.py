"""Spatter: drops of water or mud on the lens."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.robustness.corruptions.colour import like
from epdistill.robustness.corruptions.operators import gaussian
from epdistill.robustness.corruptions.registry import corruption

SpatterConstants = tuple[float, float, float, float, float, int]

WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
MUD = (63 / 255, 42 / 255, 20 / 255)
# How far from a drop's outline the light still changes, in pixels.
_DEPTH = 20
# The script's relief: light from the lower right.
_RELIEF = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))


@corruption(
    "spatter",
    (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
)
def spatter(images: Tensor, constants: SpatterConstants, generator: torch.Generator) -> Tensor:
    """Drops where smoothed normal noise exceeds a threshold.

    (mean, spread, sigma, threshold, mix, mud). Water (mud 0) adds pale turquoise, lit
    as by `_water`. Mud (mud 1) covers the image with brown where the drops' mask,
    smoothed by a Gaussian of standard deviation `mix`, is 0.8 or more.
    """
    mean, spread, sigma, threshold, mix, mud = constants
    n, _, height, width = images.shape
    layer = mean + spread * torch.randn((n, 1, height, width), generator=generator)
    layer = gaussian(layer, sigma)
    layer = torch.where(layer < threshold, 0, layer)
    colour = torch.tensor(MUD if mud else WATER)[:, None, None]
    if not mud:
        return images + like(images, mix * _water(layer.clamp(0, 1)) * colour)
    cover = gaussian((layer > threshold).float(), mix)
    cover = torch.where(cover < 0.8, 0, cover)
    return images * (1 - cover) + like(images, cover * colour)


def _water(layer: Tensor) -> Tensor:
    """How brightly drops shine, from their thickness.

    The distance from the drops' outline, cut at 20 pixels, smoothed, equalised over the
    image, embossed and smoothed again, times the thickness, scaled to a maximum of 1
    per image. The script finds the outline by Canny's detector in OpenCV; here it is
    the drops' pixels that have one of their four neighbours outside.

    Args:
        layer: (N,1,H,W) in [0,1], zero outside the drops.

    Returns:
        (N,1,H,W) in [0,1], all zero for an image without drops.
    """
    distance = _outline_distance(layer > 0).clamp(max=_DEPTH)
    relief = _equalise(torch.floor(_mean3(distance)).long()).float()
    kernel = torch.tensor(_RELIEF)[None, None]
    relief = F.conv2d(F.pad(relief, (1,) * 4, mode="reflect"), kernel).clamp(0, 255)
    shine = layer * _mean3(relief)
    return shine / shine.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)


def _outline_distance(inside: Tensor) -> Tensor:
    """Euclidean distance in pixels from the nearest outline pixel of the same image.

    Args:
        inside: (N,1,H,W) bool.

    Returns:
        (N,1,H,W) float32; larger than the image where it has no outline.
    """
    from scipy.ndimage import distance_transform_edt

    n, _, height, width = inside.shape
    # Outside the image counts as inside: a drop cut by the border has no edge there.
    around = F.pad(inside, (1,) * 4, value=True)
    surrounded = (
        around[..., :-2, 1:-1]
        & around[..., 2:, 1:-1]
        & around[..., 1:-1, :-2]
        & around[..., 1:-1, 2:]
    )
    away = np.ones((n + 1, height, width), dtype=bool)
    away[:n] = ~(inside & ~surrounded)[:, 0].numpy()
    # One transform for the whole block: the images lie so far apart that the nearest
    # outline is in the same image, and a last slice full of outline catches the rest.
    away[n] = False
    apart = 4.0 * (height + width)
    distance = distance_transform_edt(away, sampling=(apart, 1, 1))
    return torch.from_numpy(distance[:n]).float()[:, None]


def _equalise(values: Tensor) -> Tensor:
    """Histogram equalisation of each image over 0..255 (OpenCV's rule).

    The smallest value present becomes 0, the largest 255, in between the cumulative
    count decides; an image of one value stays as it is.

    Args:
        values: (N,1,H,W) int64 in 0..20.

    Returns:
        (N,1,H,W) int64 in 0..255.
    """
    flat = values.flatten(1)
    counts = torch.zeros(len(flat), _DEPTH + 1, dtype=torch.int64)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    total = counts.cumsum(dim=1)
    lowest = counts.gather(1, flat.amin(dim=1, keepdim=True))
    rest = flat.shape[1] - lowest
    table = ((total - lowest).double() * 255 / rest.clamp_min(1)).round().long()
    equalised = torch.where(rest > 0, table.gather(1, flat), flat)
    return equalised.reshape(values.shape)


def _mean3(images: Tensor) -> Tensor:
    """The mean over 3x3 pixels, mirrored at the border."""
    return F.avg_pool2d(F.pad(images, (1,) * 4, mode="reflect"), 3, stride=1)
