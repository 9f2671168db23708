"""The corruptions: seeded, bounded, graded, and right on cases worked by hand."""

from __future__ import annotations

import colorsys
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption

NAMES = sorted(CORRUPTIONS)


def pictures(channels: int, height: int = 32, width: int = 32, n: int = 24) -> Tensor:
    """Smooth random pictures with dark and bright parts, uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 200 + 20).to(torch.uint8)


def test_the_five_are_there():
    expected = "brightness contrast defocus_blur gaussian_noise impulse_noise"
    assert " ".join(NAMES) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (1, 28, 28), (3, 40, 17)])
def test_any_size_grey_or_colour(name, shape):
    images = pictures(*shape, n=5)
    before, rng = images.clone(), torch.get_rng_state()
    for severity in SEVERITIES:
        worse = corrupt(images, name, severity, seed=3)
        assert worse.shape == images.shape and worse.dtype == torch.uint8
        assert not torch.equal(worse, images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name):
    images = pictures(3)
    torch.manual_seed(1)
    first = corrupt(images, name, 4, seed=9)
    torch.manual_seed(2)
    assert torch.equal(first, corrupt(images, name, 4, seed=9))
    other = corrupt(images, name, 4, seed=10)
    assert torch.equal(first, other) == ("noise" not in name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_higher_severity_is_further_from_the_original(name, channels):
    images = pictures(channels)
    gaps = [
        float((corrupt(images, name, s, seed=0).float() - images.float()).square().mean())
        for s in SEVERITIES
    ]
    assert gaps[0] > 0 and all(low < high for low, high in pairwise(gaps))


def test_gaussian_noise_has_the_published_spread():
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = (corrupt(grey, "gaussian_noise", severity, seed=0).float() - 128) / 255
        assert float(noise.std()) == pytest.approx(sigma, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.002)


def test_impulse_noise_hits_the_published_share():
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    for severity, amount in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        worse = corrupt(grey, "impulse_noise", severity, seed=0)
        assert set(worse.unique().tolist()) == {0, 128, 255}
        assert float((worse == 0).float().mean()) == pytest.approx(amount / 2, rel=0.1)
        assert float((worse == 255).float().mean()) == pytest.approx(amount / 2, rel=0.1)


def test_brightness_is_hsv_value_raised():
    images = pictures(3, n=2)
    images[0, :, 0, 0] = 0  # black has no hue
    images[0, :, 0, 1] = torch.tensor([255, 0, 0])  # pure red cannot get brighter
    worse = corrupt(images, "brightness", 5, seed=0)
    for n, i, j in [(0, 0, 0), (0, 0, 1), (0, 5, 7), (1, 20, 3), (1, 31, 31)]:
        h, s, v = colorsys.rgb_to_hsv(*(images[n, :, i, j] / 255).tolist())
        expected = colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.3))
        assert worse[n, :, i, j].tolist() == pytest.approx([255 * e for e in expected], abs=0.51)


def test_brightness_of_grey_is_addition():
    images = pictures(1)
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    expected = (images.double() + 0.15 * 255).clamp(max=255).round()
    gap = (corrupt(images, "brightness", 3, seed=0).double() - expected).abs()
    assert float(gap.max()) <= 1  # 38.25 more, rounded


def test_contrast_keeps_the_mean_and_shrinks_the_rest():
    images = pictures(3)
    worse = corrupt(images, "contrast", 2, seed=0).double()
    mean = images.double().mean(dim=(2, 3), keepdim=True)
    assert float((worse - (mean + 0.5 * (images - mean))).abs().max()) <= 0.51


def test_defocus_blur_is_the_published_kernel():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 9, 12), generator=generator, dtype=torch.uint8)
    line = np.arange(-8, 9)
    for severity, (radius, sigma) in enumerate(
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)], start=1
    ):
        disk = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).astype(np.float64)
        bell = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * sigma**2))
        kernel = ndimage.convolve(disk / disk.sum(), np.outer(bell, bell) / bell.sum() ** 2)
        expected = ndimage.convolve(
            images.numpy().astype(np.float64), kernel[None, None], mode="mirror"
        )
        worse = corrupt(images, "defocus_blur", severity, seed=0).numpy()
        assert np.abs(worse - expected).max() <= 0.51


def test_flat_pictures_survive_blur_and_contrast():
    flat = torch.arange(0, 256, 5, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    for name in ("defocus_blur", "contrast"):
        for severity in SEVERITIES:
            assert torch.equal(corrupt(flat, name, severity, seed=0), flat)


def test_what_cannot_be_corrupted_is_refused():
    images = pictures(3)
    cases = [
        (images, "fog", 1, "received corruption 'fog'; expected one of gaussian_noise"),
        (images, "contrast", 0, "received severity 0; expected"),
        (images, "contrast", 6, "received severity 6; expected"),
        (images.float(), "contrast", 1, "expected .* uint8"),
        (images[:, :2], "contrast", 1, "expected .* uint8"),
        (images[..., :7], "contrast", 1, "32x7; expected at least 8x8"),
    ]
    for bad, name, severity, message in cases:
        with pytest.raises(EvaluationError, match=message):
            corrupt(bad, name, severity, seed=0)


def test_the_registry_takes_each_name_once_with_five_constants():
    with pytest.raises(ValueError, match="must be new"):
        corruption("contrast", (1, 2, 3, 4, 5))(lambda images, constant, generator: images)
    with pytest.raises(ValueError, match="5 constants"):
        corruption("new", (1, 2))(lambda images, constant, generator: images)
    assert "new" not in CORRUPTIONS
