"""The random corruptions: mean, variance and spectrum against the published definitions.

Each definition is written again here, with NumPy and SciPy, one image at a time;
tolerances stand beside the comparisons and hold for the sample sizes used.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import poisson
from torch import Tensor

from epdistill.robustness.corruptions import SEVERITIES, corrupt
from epdistill.robustness.corruptions.frost_plates import frost_plates

GENERATOR = 12


def flat(level: int, n: int = 64, channels: int = 3) -> Tensor:
    return torch.full((n, channels, 32, 32), level, dtype=torch.uint8)


def change(name: str, severity: int, images: Tensor) -> Tensor:
    """What a corruption adds, in units of the full range."""
    return (corrupt(images, name, severity, seed=0).float() - images) / 255


def bands(fields: np.ndarray) -> np.ndarray:
    """Mean power of (N,H,W) fields in four bands of spatial frequency, the mean left out."""
    height, width = fields.shape[1:]
    power = (np.abs(np.fft.fft2(fields)) ** 2).mean(axis=0)
    cycles = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    rings = pairwise((0.01, 0.1, 0.2, 0.35, 0.8))
    return np.array([power[(low <= cycles) & (cycles < high)].mean() for low, high in rings])


def assert_white(noise: Tensor) -> None:
    """A level spectrum (12 %), and channels that know nothing of each other."""
    power = bands(noise.flatten(0, 1).double().numpy())
    assert power / power.mean() == pytest.approx(np.ones(4), abs=0.12)
    both = noise[:, :2].transpose(0, 1).reshape(2, -1)
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02


def assert_alike(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Mean and standard deviation of (N,H,W) fields; their spectrum within three times as much.

    Both in levels 0..255; what is expected is rounded as pixels are.
    """
    pixels, expected = found.double().numpy(), expected.round()
    assert pixels.mean() == pytest.approx(expected.mean(), rel=tolerance)
    assert pixels.std() == pytest.approx(expected.std(), rel=tolerance)
    assert bands(pixels) == pytest.approx(bands(expected), rel=3 * tolerance)


def test_gaussian_noise_has_the_published_spread() -> None:
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = change("gaussian_noise", severity, flat(128))
        assert float(noise.std()) == pytest.approx(sigma, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.002)
        # Normal, not merely of this spread: 4.55 % lie beyond two deviations.
        assert float((noise.abs() > 2 * sigma).float().mean()) == pytest.approx(0.0455, abs=0.006)
        assert_white(noise)


@pytest.mark.parametrize("level", [20, 60, 120])
def test_shot_noise_is_poisson(level: int) -> None:
    """Mean, variance (x / rate, and rounding) and skewness of Poisson(rate x) / rate."""
    for severity, rate in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        worse = corrupt(flat(level), "shot_noise", severity, seed=0).double()
        counts = np.arange(rate + 1)
        chance = poisson.pmf(counts, rate * level / 255)
        shown = (counts / rate * 255).round()
        mean = (chance * shown).sum()
        variance = (chance * (shown - mean) ** 2).sum()
        skewness = (chance * (shown - mean) ** 3).sum() / variance**1.5
        assert set(worse.unique().tolist()) <= set(shown.tolist())
        assert float(worse.mean()) == pytest.approx(mean, abs=0.3)
        assert float(worse.var()) == pytest.approx(variance, rel=0.03)
        assert variance == pytest.approx(255 * level / rate, rel=0.1)
        noise = worse - worse.mean()
        assert float((noise**3).mean()) / float(noise.std()) ** 3 == pytest.approx(
            skewness, abs=0.04
        )
        assert_white(noise)


def test_impulse_noise_hits_the_published_share() -> None:
    for severity, amount in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        worse = corrupt(flat(128), "impulse_noise", severity, seed=0)
        assert set(worse.unique().tolist()) == {0, 128, 255}
        assert float((worse == 0).float().mean()) == pytest.approx(amount / 2, rel=0.1)
        assert float((worse == 255).float().mean()) == pytest.approx(amount / 2, rel=0.1)
        assert_white((worse.float() - 128) / 255)


@pytest.mark.parametrize("level", [40, 128])
def test_speckle_noise_grows_with_the_light(level: int) -> None:
    for severity, sigma in zip(SEVERITIES, (0.06, 0.10, 0.12, 0.16, 0.20), strict=True):
        noise = change("speckle_noise", severity, flat(level))
        assert float(noise.std()) == pytest.approx(sigma * level / 255, rel=0.03)
        assert float(noise.mean()) == pytest.approx(0, abs=0.002)
        assert_white(noise)


def places(n: int) -> Tensor:
    """Images whose first two channels say where a pixel stands: 8 levels per row and column."""
    line = torch.arange(32) * 8
    rows, columns = line[:, None].expand(32, 32), line.expand(32, 32)
    return torch.stack([rows, columns, rows]).to(torch.uint8).expand(n, -1, -1, -1)


@pytest.mark.parametrize(("severity", "shares"), [(1, (0.5, 0.5)), (4, (0.25, 0.5, 0.25))])
def test_glass_blur_moves_pixels_up_and_left(severity: int, shares: tuple[float, ...]) -> None:
    """Each round looks 0 or 1 pixel back along each axis, half the time each."""
    images = places(64)
    worse = corrupt(images, "glass_blur", severity, seed=0)
    steps = ((images.float() - worse) / 8).round()[:, :2]
    inside = steps[:, :, 8:24, 8:24]
    for back, share in enumerate(shares):
        assert float((inside == back).float().mean()) == pytest.approx(share, abs=0.02)
    assert float(torch.corrcoef(inside.transpose(0, 1).reshape(2, -1))[0, 1]) == pytest.approx(
        0, abs=0.03
    )
    # The first two rows and columns are out of reach.
    assert not steps[:, :, :2].any() and not steps[:, :, :, :2].any()


@pytest.mark.parametrize(
    ("severity", "sigma", "rounds"),
    [(1, 0.05, 1), (2, 0.25, 1), (3, 0.4, 1), (4, 0.25, 2), (5, 0.4, 2)],
)
def test_glass_blur_is_the_published_walk(severity: int, sigma: float, rounds: int) -> None:
    """On noise and on a ramp: the change has the mean and the spread (5 %), and the spectrum."""
    random = np.random.default_rng(GENERATOR)
    noise = torch.from_numpy(random.integers(0, 256, (48, 1, 32, 32), dtype=np.uint8))
    for images in (noise, places(48)[:, :1]):
        expected = []
        for image in images.movedim(1, 3).double().numpy():
            walked = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
            for _ in range(rounds):
                for h in range(31, 1, -1):
                    for w in range(31, 1, -1):
                        dx, dy = random.integers(-1, 1, 2)
                        # The script's swap, on views of one array: the second half of it
                        # writes back what the first has just written.
                        walked[h, w], walked[h + dy, w + dx] = walked[h + dy, w + dx], walked[h, w]
            walked = ndimage.gaussian_filter(walked, (sigma, sigma, 0), mode="nearest")
            expected.append(walked[..., 0])
        worse = corrupt(images, "glass_blur", severity, seed=0)[:, 0].double()
        # 1000 keeps the relative mean of changes about 0 in bounds.
        original = images[:, 0].double() - 1000
        assert_alike(worse - original, np.array(expected) - original.numpy(), 0.05)


def pulled(reach: float, at: tuple[int, int]) -> float:
    """Variance of the published affine map's displacement at a pixel (x, y), mean of both axes.

    Three points go to places up to `reach` away; a pixel is fetched by the inverse map.
    """
    points = np.array([[26, 26, 1], [26, 6, 1], [6, 6, 1]]).T
    moves = np.zeros((20_000, 3, 3))
    moves[:, :2] = np.random.default_rng(GENERATOR).uniform(-reach, reach, (20_000, 2, 3))
    forward = (points + moves) @ np.linalg.inv(points)
    pixel = np.array([*at, 1])
    return float((np.linalg.inv(forward) @ pixel - pixel)[:, :2].var(axis=0).mean())


@pytest.mark.parametrize(
    ("severity", "strength", "smoothness", "affine"),
    [
        (1, 0, 0, 0.08),
        (2, 0.05, 0.2, 0.07),
        (3, 0.08, 0.06, 0.06),
        (4, 0.1, 0.04, 0.05),
        (5, 0.1, 0.03, 0.03),
    ],
)
def test_elastic_transform_moves_as_far_as_published(
    severity: int, strength: float, smoothness: float, affine: float
) -> None:
    """Displacements, read off a ramp: zero mean, variance 8 %, roughness 12 %."""
    images = places(2048)
    worse = corrupt(images, "elastic_transform", severity, seed=0)
    shift = (worse.double() - images)[:, :2] / 8
    kernel = np.ones(1)
    if smoothness:
        line = np.arange(-int(96 * smoothness + 0.5), int(96 * smoothness + 0.5) + 1)
        kernel = np.exp(-0.5 * (line / (32 * smoothness)) ** 2)
        kernel /= kernel.sum()
    padded = np.pad(kernel, 8)
    overlap = [(padded[k:] * padded[: len(padded) - k]).sum() for k in (0, 4, 8)]
    noise = (32 * strength) ** 2 / 3 * overlap[0]
    for x, y in ((16, 16), (26, 6), (6, 6)):
        here = shift[:, :, y, x]
        expected = pulled(32 * affine, (x, y)) + noise * overlap[0]
        assert float(here.var()) == pytest.approx(expected, rel=0.08)
        assert float(here.mean()) == pytest.approx(0, abs=0.1)
    bend = shift[:, :, 16, 12] - 2 * shift[:, :, 16, 16] + shift[:, :, 16, 20]
    rough = noise * (6 * overlap[0] - 8 * overlap[1] + 2 * overlap[2])
    rounding = 6 / 12 / 8**2
    assert float(bend.var()) == pytest.approx(rough + rounding, rel=0.12)


def clipped_zoom(layer: np.ndarray, factor: float) -> np.ndarray:
    kept = math.ceil(32 / factor)
    first = (32 - kept) // 2
    wide = ndimage.zoom(layer[first : first + kept, first : first + kept], factor, order=1)
    trim = (len(wide) - 32) // 2
    return wide[trim : trim + 32, trim : trim + 32]


def streaked(layer: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    total = np.zeros_like(layer)
    for t, weight in enumerate(weights / weights.sum()):
        dy = math.ceil(t * math.sin(math.radians(degrees)) - 0.5)
        dx = math.ceil(t * math.cos(math.radians(degrees)) - 0.5)
        rows, columns = np.clip(np.arange(32) + dy, 0, 31), np.clip(np.arange(32) + dx, 0, 31)
        total += weight * layer[rows][:, columns]
    return total


SNOW = (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_is_as_thick_and_as_streaked_as_published(severity: int) -> None:
    """On black: mean and spread 6 %, spectrum 18 %."""
    mean, spread, zoom, threshold, radius, sigma, share = SNOW[severity - 1]
    random = np.random.default_rng(GENERATOR)
    expected = []
    for _ in range(768):
        layer = clipped_zoom(random.normal(mean, spread, (32, 32)), zoom)
        layer = np.where(layer < threshold, 0, layer).clip(0, 1)
        layer = streaked(layer, radius, sigma, random.uniform(-135, -45))
        expected.append(np.minimum((1 - share) * 0.5 + layer + layer[::-1, ::-1], 1))
    worse = corrupt(flat(0, 2048, 1), "snow", severity, seed=0)
    # One layer, and the same turned by half a turn: rotated, the picture is itself.
    assert int((worse.int() - worse.flip(2, 3).int()).abs().max()) <= 1
    assert_alike(worse[:, 0], 255 * np.array(expected), 0.06)


def test_snow_pales_the_scene() -> None:
    """Where no flake fell: share x + (1 - share) max(x, 1.5 luma + 0.5)."""
    images = flat(0, 64)
    images[:, 0], images[:, 1], images[:, 2] = 40, 90, 20
    colour = np.array([40, 90, 20]) / 255
    pale = np.maximum(colour, 1.5 * colour @ [0.299, 0.587, 0.114] + 0.5)
    for severity, share in zip(SEVERITIES, (0.95, 0.9, 0.9, 0.85, 0.8), strict=True):
        lowest = corrupt(images, "snow", severity, seed=0).amin(dim=(0, 2, 3)).numpy()
        expected = 255 * (share * colour + (1 - share) * pale)
        assert np.abs(lowest - expected).max() < 2


def test_frost_is_a_share_of_the_image_and_a_share_of_a_plate() -> None:
    """Mean and spread of ice on grey: 4 %; spectrum 12 %, against random pieces of the plates."""
    random = np.random.default_rng(GENERATOR)
    plates = frost_plates(256).numpy()
    pieces = np.array(
        [
            plates[random.integers(5), top : top + 32, left : left + 32]
            for top, left in random.integers(0, 225, (1024, 2))
        ]
    )
    shares = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    for severity, (keep, ice) in enumerate(shares, start=1):
        worse = corrupt(flat(64, 1024), "frost", severity, seed=0)
        for channel in range(3):
            expected = keep * 64 + ice * 255 * pieces[..., channel]
            assert_alike(worse[:, channel], expected, 0.04)


def test_the_plates_hold_bright_bluish_ice_on_dark_glass() -> None:
    plates = frost_plates(256)
    assert plates.shape == (5, 256, 256, 3)
    assert float(plates.min()) >= 0 and float(plates.max()) <= 1
    for plate in plates:
        red, blue = plate[..., 0], plate[..., 2]
        assert bool((blue > red).all())
        assert float(red.quantile(0.1)) < 0.35 and float(red.quantile(0.9)) > 0.75
        # A piece of 32 pixels shows ice and glass, not one of them.
        pieces = red.unfold(0, 32, 32).unfold(1, 32, 32).flatten(2)
        assert float(pieces.std(dim=2).amin()) > 0.05
    assert len({float(plate.mean()) for plate in plates}) == 5


def clouds(n: int, decay: float) -> np.ndarray:
    """Diamond-square on a torus, point by point; noise falls by decay^2 with each halving."""
    random = np.random.default_rng(GENERATOR)
    field = np.zeros((32, 32, n))
    step, reach = 32, 1.0

    def settle(i: int, j: int, around: list[tuple[int, int]]) -> None:
        mean = sum(field[a % 32, b % 32] for a, b in around) / 4
        field[i, j] = mean + random.uniform(-reach, reach, n)

    while step > 1:
        half = step // 2
        for i in range(half, 32, step):
            for j in range(half, 32, step):
                settle(i, j, [(i + a, j + b) for a in (-half, half) for b in (-half, half)])
        for i in range(0, 32, half):
            for j in range((i + half) % step, 32, step):
                settle(i, j, [(i - half, j), (i + half, j), (i, j - half), (i, j + half)])
        step, reach = half, reach / decay**2
    field -= field.min(axis=(0, 1))
    return (field / field.max(axis=(0, 1))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("severity", "weight", "decay"),
    [(1, 0.2, 3), (2, 0.5, 3), (3, 0.75, 2.5), (4, 1, 2), (5, 1.5, 1.75)],
)
def test_fog_is_the_published_cloud(severity: int, weight: float, decay: float) -> None:
    """Clouds on grey: mean and spread 4 %, spectrum 12 %."""
    value = 200 / 255
    expected = 255 * (value + weight * clouds(1024, decay)) * value / (value + weight)
    worse = corrupt(flat(200, 1024, 1), "fog", severity, seed=0)[:, 0]
    assert_alike(worse, expected, 0.04)
    # The thickest point of the cloud keeps the image's maximum.
    assert set(worse.amax(dim=(1, 2)).tolist()) == {200}


SPATTER = (
    (0.62, 0.1, 0.7, 0.7, 0.5),
    (0.65, 0.1, 0.8, 0.7, 0.5),
    (0.65, 0.3, 1, 0.69, 0.5),
    (0.65, 0.1, 0.7, 0.69, 0.6),
    (0.65, 0.1, 0.5, 0.68, 0.6),
)


def drops(severity: int, n: int) -> np.ndarray:
    """Thickness of the published drops, (n,32,32), 0 outside them."""
    mean, spread, sigma, threshold, _ = SPATTER[severity - 1]
    layer = np.random.default_rng(GENERATOR).normal(mean, spread, (n, 32, 32))
    layer = ndimage.gaussian_filter(layer, (0, sigma, sigma), mode="nearest")
    return np.where(layer < threshold, 0, layer)


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_covers_as_much_as_published(severity: int) -> None:
    """Mean and spread on white: 4 %; spectrum 12 %."""
    *_, threshold, mix = SPATTER[severity - 1]
    layer = drops(severity, 2048)
    cover = ndimage.gaussian_filter(
        (layer > threshold).astype(float), (0, mix, mix), mode="nearest"
    )
    cover[cover < 0.8] = 0
    worse = corrupt(flat(255, 2048), "spatter", severity, seed=0)
    for channel, mud in enumerate((63, 42, 20)):
        assert_alike(255 - worse[:, channel], cover * (255 - mud), 0.04)


def shine(layer: np.ndarray) -> np.ndarray:
    """How brightly the drops of one image (32,32) shine: distance, equalised, embossed."""
    inside = np.pad(layer > 0, 1, constant_values=True)
    middle = ndimage.binary_erosion(inside, border_value=1)[1:-1, 1:-1]
    outline = (layer > 0) & ~middle
    # Without an outline all is equally far.
    far = ndimage.distance_transform_edt(~outline) if outline.any() else np.full((32, 32), 20.0)
    far = np.floor(ndimage.uniform_filter(far.clip(max=20), 3, mode="mirror") + 1e-9)
    below = np.searchsorted(np.sort(far, axis=None), far, side="right")
    fewest = below.min()
    if fewest < far.size:
        far = ((below - fewest) / (far.size - fewest) * 255).round()
    relief = ndimage.correlate(far, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], mode="mirror")
    lit = layer * ndimage.uniform_filter(relief.clip(0, 255), 3, mode="mirror")
    return lit / max(lit.max(), 1e-12)


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_shines_as_defined(severity: int) -> None:
    """On black: mean and spread 5 %, spectrum 15 %; brightest point: the mix; pale turquoise."""
    mix = SPATTER[severity - 1][-1]
    worse = corrupt(flat(0, 2048), "spatter", severity, seed=0)
    lit = np.array([mix * shine(layer) for layer in drops(severity, 512)])
    for channel, colour in enumerate((175, 238, 238)):
        assert_alike(worse[:, channel], lit * colour, 0.05)
    peaks = worse[:, 1].amax(dim=(1, 2))
    assert set(peaks.tolist()) <= {0, round(mix * 238)}
