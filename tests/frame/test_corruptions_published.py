"""The corruptions that draw nothing or little, against their published definitions.

What is exact is compared exactly (to the rounding of 8 bits); definitions are
written again here, with SciPy, Pillow and the standard library.
"""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from epdistill.robustness.corruptions import SEVERITIES, corrupt
from epdistill.robustness.corruptions.operators import motion, zoom_matrix

# Rounding to 8 bits, and float32.
ROUNDED = 0.51
DISKS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
SIGMAS = (0.4, 0.6, 0.7, 0.8, 1.0)


def noisy(*shape: int) -> Tensor:
    """White noise, uint8: every frequency is there."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def gap(worse: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(worse.numpy() - expected).max())


def disk_kernel(radius: float, sigma: float) -> np.ndarray:
    line = np.arange(-3, 4)
    disk = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).astype(np.float64)
    bell = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * sigma**2))
    bell /= bell.sum()
    return ndimage.convolve(disk / disk.sum(), np.outer(bell, bell), mode="constant")


@pytest.mark.parametrize("shape", [(3, 3, 9, 12), (2, 1, 32, 32)])
def test_defocus_blur_is_the_published_kernel(shape: tuple[int, ...]) -> None:
    images = noisy(*shape)
    for severity, disk in zip(SEVERITIES, DISKS, strict=True):
        kernel = disk_kernel(*disk)[None, None]
        expected = ndimage.convolve(images.numpy().astype(np.float64), kernel, mode="mirror")
        assert gap(corrupt(images, "defocus_blur", severity, seed=0), expected) <= ROUNDED


@pytest.mark.parametrize("shape", [(3, 3, 9, 12), (2, 1, 32, 32)])
def test_gaussian_blur_is_a_gaussian(shape: tuple[int, ...]) -> None:
    images = noisy(*shape)
    for severity, sigma in zip(SEVERITIES, SIGMAS, strict=True):
        expected = ndimage.gaussian_filter(
            images.numpy().astype(np.float64), (0, 0, sigma, sigma), mode="nearest", truncate=4
        )
        assert gap(corrupt(images, "gaussian_blur", severity, seed=0), expected) <= ROUNDED


@pytest.mark.parametrize("name", ["defocus_blur", "gaussian_blur"])
def test_transfer_function_of_the_blurs(name: str) -> None:
    """Gratings keep the amplitude that the sampled kernel's transform says, within .01."""
    cycles = np.arange(1, 16)
    columns = np.arange(96)
    waves = 127.5 + 120 * np.cos(2 * np.pi * cycles[:, None] * columns / 32)
    images = torch.from_numpy(waves.round().astype(np.uint8))[:, None, None].expand(-1, 1, 16, -1)
    line = np.arange(-3, 4)
    for severity in SEVERITIES:
        if name == "defocus_blur":
            kernel = disk_kernel(*DISKS[severity - 1]).sum(axis=0)
        else:
            kernel = np.exp(-0.5 * (line / SIGMAS[severity - 1]) ** 2)
            kernel /= kernel.sum()
        expected = (kernel * np.cos(2 * np.pi * cycles[:, None] * line / 32)).sum(axis=1)
        inside = corrupt(images, name, severity, seed=0)[:, 0, 8, 32:64].double().numpy()
        found = np.fft.rfft(inside, axis=1).real[np.arange(15), cycles] / (16 * 120)
        assert np.abs(found - expected).max() < 0.01


def magick(image: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """ImageMagick's MotionBlurImage, written out pixel by pixel, with all its weights."""
    height, width = image.shape
    weights = [math.exp(-(t**2) / (2 * sigma**2)) for t in range(2 * math.ceil(radius) + 1)]
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            for t, weight in enumerate(weights):
                row = i + math.ceil(t * math.sin(math.radians(degrees)) - 0.5)
                column = j + math.ceil(t * math.cos(math.radians(degrees)) - 0.5)
                row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
                result[i, j] += weight / sum(weights) * image[row, column]
    return result


@pytest.mark.parametrize(("radius", "sigma"), [(6, 1.0), (9, 2.5), (14, 12.0)])
def test_motion_is_imagemagicks(radius: int, sigma: float) -> None:
    images = noisy(6, 1, 12, 15)
    degrees = torch.tensor([-44.0, 0.0, 31.0, -91.3, -134.0, -60.0])
    moved = motion(images.float(), radius, sigma, degrees)
    for image, angle, worse in zip(images, degrees.tolist(), moved, strict=True):
        expected = magick(image[0].double().numpy(), radius, sigma, angle)
        assert gap(worse[0], expected) < 0.01


def test_motion_blur_has_the_published_reach_and_angles() -> None:
    """A point becomes a streak: its weight, its mean length (3 %), its angles (uniform)."""
    images = torch.zeros(1024, 1, 33, 33, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    away = torch.arange(33.0) - 16
    for severity, (radius, sigma) in enumerate(
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), start=1
    ):
        streaks = corrupt(images, "motion_blur", severity, seed=0).float()[:, 0] / 255
        assert float(streaks.sum(dim=(1, 2)).mean()) == pytest.approx(1, abs=0.02)
        # On the pixel grid a streak's mean length depends on its angle.
        angles = np.radians(np.arange(-45, 45, 0.25) + 0.125)[:, None]
        t = np.arange(2 * radius + 1)
        weights = np.exp(-(t**2) / (2 * sigma**2))
        weights /= weights.sum()
        ends = [np.ceil(t * side(angles) - 0.5) @ weights for side in (np.cos, np.sin)]
        length = float(np.hypot(*ends).mean())
        # The pixel at the point is seen from those behind it.
        across = -(streaks * away).sum(dim=(1, 2))
        down = -(streaks * away[:, None]).sum(dim=(1, 2))
        assert float(torch.hypot(across, down).mean()) == pytest.approx(length, rel=0.03)
        turned = torch.rad2deg(torch.atan2(down, across))
        assert -50 < float(turned.min()) < -40 and 40 < float(turned.max()) < 50
        assert float(turned.mean()) == pytest.approx(0, abs=3)
        assert float(turned.std()) == pytest.approx(90 / math.sqrt(12), rel=0.15)


def zoomed(image: np.ndarray, factor: float) -> np.ndarray:
    """The published `clipped_zoom` of a square image (H,H)."""
    side = len(image)
    kept = math.ceil(side / factor)
    first = (side - kept) // 2
    wide = ndimage.zoom(image[first : first + kept, first : first + kept], factor, order=1)
    trim = (len(wide) - side) // 2
    return wide[trim : trim + side, trim : trim + side]


def test_zoom_blur_is_the_mean_of_the_published_zooms() -> None:
    images = noisy(2, 1, 32, 32)
    for severity, end in zip(SEVERITIES, (1.06, 1.11, 1.16, 1.21, 1.26), strict=True):
        factors = np.arange(1, end, 0.01)
        for image, worse in zip(
            images[:, 0].double().numpy(),
            corrupt(images, "zoom_blur", severity, seed=0)[:, 0],
            strict=True,
        ):
            total = sum(zoomed(image, factor) for factor in factors)
            assert gap(worse, (image + total) / (len(factors) + 1)) <= ROUNDED


@pytest.mark.parametrize("factor", [1.25, 1.75, 2.25])
def test_zoom_matrix_is_the_published_zoom(factor: float) -> None:
    image = noisy(32, 32).double()
    matrix = zoom_matrix(32, factor).double()
    assert gap(matrix @ image @ matrix.T, zoomed(image.numpy(), factor)) < 1e-3


def test_brightness_is_hsv_value_raised() -> None:
    images = noisy(1, 3, 8, 8)
    images[0, :, 0, 0] = 0  # black has no hue
    images[0, :, 0, 1] = torch.tensor([255, 0, 0])  # pure red cannot get brighter
    for severity, amount in zip(SEVERITIES, (0.05, 0.10, 0.15, 0.20, 0.30), strict=True):
        worse = corrupt(images, "brightness", severity, seed=0)
        for i, j in np.ndindex(8, 8):
            h, s, v = colorsys.rgb_to_hsv(*(images[0, :, i, j] / 255).tolist())
            expected = colorsys.hsv_to_rgb(h, s, min(1.0, v + amount))
            assert gap(worse[0, :, i, j], 255 * np.array(expected)) <= ROUNDED


def test_brightness_of_grey_is_addition() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = np.minimum(images.numpy() + 0.15 * 255, 255)
    assert gap(corrupt(images, "brightness", 3, seed=0), expected) <= ROUNDED


def test_contrast_keeps_the_mean_and_shrinks_the_rest() -> None:
    images = noisy(4, 3, 16, 16)
    mean = images.double().mean(dim=(2, 3), keepdim=True)
    for severity, factor in zip(SEVERITIES, (0.75, 0.50, 0.40, 0.30, 0.15), strict=True):
        worse = corrupt(images, "contrast", severity, seed=0)
        assert gap(worse, (mean + factor * (images - mean)).numpy()) <= ROUNDED


def test_saturate_is_hsv_saturation_changed() -> None:
    images = noisy(1, 3, 8, 8)
    images[0, :, 0, 0] = 0
    images[0, :, 0, 1] = 90  # grey has hue 0 by convention
    lines = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))
    for severity, (factor, offset) in enumerate(lines, start=1):
        worse = corrupt(images, "saturate", severity, seed=0)
        for i, j in np.ndindex(8, 8):
            h, s, v = colorsys.rgb_to_hsv(*(images[0, :, i, j] / 255).tolist())
            expected = colorsys.hsv_to_rgb(h, min(1.0, factor * s + offset), v)
            assert gap(worse[0, :, i, j], 255 * np.array(expected)) <= ROUNDED


def test_saturate_on_grey_is_the_luma_of_the_tint() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for severity, offset in zip(SEVERITIES, (0, 0, 0, 0.1, 0.2), strict=True):
        expected = images.numpy() * (0.299 + 0.701 * (1 - offset))
        assert gap(corrupt(images, "saturate", severity, seed=0), expected) <= ROUNDED


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (37, 37), (224, 224), (41, 17), (17, 41)])
def test_pixelate_is_pillows_box_filter(channels: int, mode: str, shape: tuple[int, int]) -> None:
    images = noisy(1, channels, *shape)
    height, width = shape
    original = Image.fromarray(images[0].movedim(0, 2).squeeze(2).numpy())
    assert original.mode == mode
    for severity, share in zip(SEVERITIES, (0.95, 0.90, 0.85, 0.75, 0.65), strict=True):
        small = original.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
        large = np.asarray(small.resize((width, height), Image.Resampling.BOX))
        worse = corrupt(images, "pixelate", severity, seed=0)[0].movedim(0, 2)
        difference = np.abs(worse.numpy().reshape(large.shape) - large.astype(int))
        assert difference.max() <= (height != width)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_compression_is_pillows(channels: int) -> None:
    images = noisy(2, channels, 20, 24)
    for severity, quality in zip(SEVERITIES, (80, 65, 58, 50, 40), strict=True):
        worse = corrupt(images, "jpeg_compression", severity, seed=0)
        for image, found in zip(images, worse, strict=True):
            file = io.BytesIO()
            pixels = image.movedim(0, 2).squeeze(2).numpy()
            Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
            decoded = np.asarray(Image.open(io.BytesIO(file.getvalue())))
            assert np.array_equal(found.movedim(0, 2).numpy().reshape(decoded.shape), decoded)
