"""Snow, frost and fog."""

from __future__ import annotations

import torch
from torch import Tensor

from epdistill.robustness.corruptions.colour import like, luma
from epdistill.robustness.corruptions.frost_plates import frost_plates, plate_side
from epdistill.robustness.corruptions.operators import apply_separable, motion, zoom_matrix
from epdistill.robustness.corruptions.registry import corruption

SnowConstants = tuple[float, float, float, float, float, float, float]


@corruption(
    "snow",
    (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
)
def snow(images: Tensor, constants: SnowConstants, generator: torch.Generator) -> Tensor:
    """Flakes drawn out by their fall, over a scene that has lost colour.

    (mean, spread, zoom, threshold, radius, sigma, share): normal noise, zoomed into, cut
    below the threshold, and blurred by ImageMagick's motion blur at an angle uniform
    in -135..-45 degrees; it is added once as it is and once turned by half a turn. The
    scene keeps `share` of itself and for the rest is lifted to 1.5 luma + 0.5.
    """
    mean, spread, zoom, threshold, radius, sigma, share = constants
    n, _, height, width = images.shape
    layer = mean + spread * torch.randn((n, 1, height, width), generator=generator)
    layer = apply_separable(layer, zoom_matrix(height, zoom), zoom_matrix(width, zoom))
    layer = torch.where(layer < threshold, 0, layer).clamp(0, 1)
    layer = motion(layer, radius, sigma, torch.rand(n, generator=generator) * 90 - 135)
    pale = torch.maximum(images, 1.5 * luma(images) + 0.5)
    return share * images + (1 - share) * pale + layer + layer.rot90(2, dims=(2, 3))


@corruption("frost", ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)))
def frost(images: Tensor, shares: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Ice on the lens: a share of the image plus a share of a piece of a frost plate.

    The published arrays use five photographs; here five plates are grown
    (`frost_plates`), and each image gets a random piece of one of them.
    """
    keep, ice = shares
    n, _, height, width = images.shape
    plates = frost_plates(plate_side(max(height, width)))
    plate = torch.randint(len(plates), (n, 1, 1), generator=generator)
    top = torch.randint(plates.shape[1] - height + 1, (n, 1, 1), generator=generator)
    left = torch.randint(plates.shape[2] - width + 1, (n, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height)[:, None], left + torch.arange(width)
    piece = plates[plate, rows, columns].movedim(3, 1)
    return keep * images + ice * like(images, piece)


@corruption("fog", ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)))
def fog(images: Tensor, veil: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Haze of uneven thickness: x + weight * plasma, scaled back to the image's own maximum.

    (weight, decay); a smaller decay makes finer clouds.
    """
    weight, decay = veil
    n, _, height, width = images.shape
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    side = 1 << (max(height, width) - 1).bit_length()
    cloud = plasma(n, side, decay, generator)[:, None, :height, :width]
    return (images + weight * cloud) * brightest / (brightest + weight)


def plasma(n: int, side: int, decay: float, generator: torch.Generator) -> Tensor:
    """Random clouds by the diamond-square algorithm on a torus (Fournier et al., 1982).

    Each halving of the grid adds uniform noise; its amplitude falls by decay^2 from
    one to the next, because the published script multiplies its amplitude by itself.

    Args:
        n: How many.
        side: A power of two, at least 2.
        decay: > 1.
        generator: Of the noise.

    Returns:
        (n,side,side) float32, each scaled to fill [0,1].
    """

    def mean_and_noise(total: Tensor) -> Tensor:
        noise = torch.rand(total.shape, generator=generator) * 2 - 1
        return total / 4 + amplitude * noise

    cloud = torch.zeros(n, side, side)
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        pairs = corners + corners.roll(-1, dims=1)
        centres = mean_and_noise(pairs + pairs.roll(-1, dims=2))
        cloud[:, half::step, half::step] = centres
        # The middle of an edge lies between two corners and two centres.
        above = centres + centres.roll(1, dims=1) + corners + corners.roll(-1, dims=2)
        beside = centres + centres.roll(1, dims=2) + corners + corners.roll(-1, dims=1)
        cloud[:, ::step, half::step] = mean_and_noise(above)
        cloud[:, half::step, ::step] = mean_and_noise(beside)
        step, amplitude = half, amplitude / decay**2
    cloud = cloud - cloud.amin(dim=(1, 2), keepdim=True)
    return cloud / cloud.amax(dim=(1, 2), keepdim=True)
