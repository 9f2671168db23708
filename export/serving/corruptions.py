"""A few corruptions in numpy and Pillow, for the playground, where torch is not installed.

The types, constants and order of operations of `epdistill.robustness.corruptions` (family
`cifar10c-style`, constants of Hendrycks and Dietterich, ICLR 2019), for those that are a
few lines. The two that draw random numbers draw other ones, so their pictures differ from
those of an evaluation, with the same statistics. At a model's image size, as there.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from epdistill.images import Pixels, to_pixels

Array = npt.NDArray[np.float32]


def gaussian_noise(image: Array, sigma: float, generator: np.random.Generator) -> Array:
    """x + sigma N(0, 1)."""
    return image + np.float32(sigma) * generator.standard_normal(image.shape, np.float32)


def impulse_noise(image: Array, amount: float, generator: np.random.Generator) -> Array:
    """A share `amount` of the channel values becomes 0 or 1, half each."""
    hit = generator.random(image.shape) < amount
    salt = generator.random(image.shape) < 0.5
    return np.where(hit, salt.astype(np.float32), image)


def gaussian_blur(image: Array, sigma: float, generator: np.random.Generator) -> Array:
    """Convolution with a Gaussian cut at 4 sigma, the border's pixels repeated outside."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        size = image.shape[axis]
        around = np.arange(-reach, size + reach).clip(0, size - 1)
        wide = image.take(around, axis=axis)
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * reach + 1, axis=axis)
        image = (windows @ kernel).astype(np.float32)
    return image


def brightness(image: Array, amount: float, generator: np.random.Generator) -> Array:
    """HSV's V raised by `amount` with hue and saturation held; black becomes grey."""
    value = image.max(axis=0, keepdims=True)
    raised = (value + np.float32(amount)).clip(max=1)
    return np.asarray(np.where(value > 0, image * (raised / value.clip(min=1e-12)), raised))


def contrast(image: Array, factor: float, generator: np.random.Generator) -> Array:
    """Distances from each channel's mean, shrunk by `factor`."""
    mean: Array = image.mean(axis=(1, 2), keepdims=True)
    return mean + np.float32(factor) * (image - mean)


def pixelate(image: Array, share: float, generator: np.random.Generator) -> Array:
    """Pillow's box filter down to a share of the side, and back up."""
    picture = _picture(image)
    small = (int(picture.width * share), int(picture.height * share))
    box = Image.Resampling.BOX
    return _floats(picture.resize(small, box).resize(picture.size, box))


def jpeg_compression(image: Array, quality: int, generator: np.random.Generator) -> Array:
    """Saved as JPEG by Pillow and read again."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    file.seek(0)
    with Image.open(file, formats=["JPEG"]) as opened:
        return _floats(opened)


# (C, H, W) float32 in [0,1], the severity's constant, generator -> same shape.
Corrupt = Callable[[Array, Any, np.random.Generator], Array]

# Constants for the severities 1..5.
CORRUPTIONS: dict[str, tuple[Corrupt, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": (contrast, (0.75, 0.50, 0.40, 0.30, 0.15)),
    "pixelate": (pixelate, (0.95, 0.90, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}


def corrupt(pixels: Pixels, name: str, severity: int, *, seed: int) -> Pixels:
    """Corrupt one picture.

    Args:
        pixels: uint8 (C, H, W), C 1 or 3.
        name: A key of `CORRUPTIONS`.
        severity: 1..5.
        seed: Fixes the noise; the same at every severity, so that a slider only scales it.

    Returns:
        uint8 (C, H, W), clipped and rounded to the nearest level.
    """
    function, constants = CORRUPTIONS[name]
    image = pixels.astype(np.float32) / np.float32(255)
    worse = function(image, constants[severity - 1], np.random.default_rng(seed))
    levels: Pixels = np.rint(worse.clip(0, 1) * 255).astype(np.uint8)
    return levels


def _picture(image: Array) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _floats(picture: Image.Image) -> Array:
    return to_pixels(picture).astype(np.float32) / np.float32(255)
