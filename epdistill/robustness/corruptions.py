"""Five of CIFAR-10-C's corruptions, seeded, for any image size and for grey or colour.

The family is called `cifar10c-style`: the constants are those of Hendrycks and
Dietterich's `make_cifar_c.py` (ICLR 2019), but the published arrays cannot be
reproduced from it (it never seeds, and its results depend on third-party
builds), so numbers from here are comparable among themselves only. One more
difference: results are rounded to 8 bits, where the script truncates.

A further corruption joins by the decorator:

    @corruption("name", (severity 1, ..., severity 5))
    def name(images, constant, generator): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import derive_seed

FAMILY = "cifar10c-style"
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8

# (images (N,C,H,W) float32 in [0,1], the severity's constant, generator) -> same shape
Corrupt = Callable[[Tensor, Any, torch.Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """A corruption and its constants for the severities 1..5."""

    name: str
    constants: tuple[Any, ...]
    function: Corrupt


CORRUPTIONS: dict[str, Corruption] = {}


def corruption(name: str, constants: tuple[Any, ...]) -> Callable[[Corrupt], Corrupt]:
    """Register a corruption under `name`, with one constant per severity 1..5."""

    def register(function: Corrupt) -> Corrupt:
        if name in CORRUPTIONS or len(constants) != len(SEVERITIES):
            raise ValueError(f"{name!r} must be new and have {len(SEVERITIES)} constants")
        CORRUPTIONS[name] = Corruption(name, constants, function)
        return function

    return register


def check_corruption(name: str, severity: int) -> None:
    """Refuse an unknown corruption or severity.

    Raises:
        EvaluationError: `name` is not registered or `severity` is not in 1..5.
    """
    if name not in CORRUPTIONS:
        raise EvaluationError(
            f"received corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}"
        )
    if severity not in SEVERITIES:
        raise EvaluationError(f"received severity {severity}; expected one of 1, 2, 3, 4, 5")


def corrupt(images: Tensor, name: str, severity: int, *, seed: int) -> Tensor:
    """Corrupt 8-bit images.

    The noise of the whole tensor is drawn from one generator, so give all images
    at once and cut the result into batches: same seed, same bytes.

    Args:
        images: (N,C,H,W) uint8, C of 1 or 3, H and W at least 8.
        name: A key of `CORRUPTIONS`.
        severity: 1..5.
        seed: Fixes the noise, for each corruption and severity on its own.

    Returns:
        (N,C,H,W) uint8, on the images' device.

    Raises:
        EvaluationError: An unknown corruption or severity, or images that do not fit.
    """
    check_corruption(name, severity)
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] not in (1, 3):
        raise EvaluationError(
            f"received images of shape {shape} and type {images.dtype}; expected (N,1,H,W) or "
            "(N,3,H,W) uint8"
        )
    if min(shape[2:]) < SMALLEST:
        raise EvaluationError(
            f"received images of {shape[2]}x{shape[3]}; expected at least {SMALLEST}x{SMALLEST}"
        )
    chosen = CORRUPTIONS[name]
    generator = torch.Generator().manual_seed(derive_seed(seed, FAMILY, name, severity))
    unit = images.cpu().float() / 255
    result = chosen.function(unit, chosen.constants[severity - 1], generator)
    return (result.clamp(0, 1) * 255).round().to(torch.uint8).to(images.device)


@corruption("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10))
def gaussian_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Sensor noise: x + sigma N(0, 1), each channel of each pixel on its own."""
    return images + sigma * torch.randn(images.shape, generator=generator)


@corruption("impulse_noise", (0.01, 0.02, 0.03, 0.05, 0.07))
def impulse_noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper: a share `amount` of the channel values becomes 0 or 1, half each."""
    hit = torch.rand(images.shape, generator=generator) < amount
    salt = torch.rand(images.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(images.dtype), images)


@corruption("defocus_blur", ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)))
def defocus_blur(images: Tensor, disk: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Convolution with a disk (radius, smoothing sigma), mirrored at the borders."""
    kernel = _disk(*disk)
    channels, pad = images.shape[1], kernel.shape[0] // 2
    weight = kernel.to(images)[None, None].expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(images, (pad,) * 4, mode="reflect"), weight, groups=channels)


@corruption("brightness", (0.05, 0.10, 0.15, 0.20, 0.30))
def brightness(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """HSV's V raised by `amount` with hue and saturation held; for grey, plain addition.

    With H and S fixed the three channels are proportional to V = max(R, G, B), so
    no detour through HSV is needed; black has no hue and becomes grey.
    """
    value = images.amax(dim=1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


@corruption("contrast", (0.75, 0.50, 0.40, 0.30, 0.15))
def contrast(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Distances from each channel's mean over the image, shrunk by `factor`."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + factor * (images - mean)


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
