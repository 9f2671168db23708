"""The corruptions as a family: any size, seeded, independent of the cut, graded, refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions import (
    CORRUPTIONS,
    EXTRA,
    MAIN,
    SEVERITIES,
    block_length,
    contact_sheet,
    corrupt,
    corruption,
    variants,
)

NAMES = (*MAIN, *EXTRA)
# What draws no random numbers.
STEADY = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
}
# Their constants are not ordered by distance from the original: see the package's docstring.
NOT_BY_DISTANCE = {
    "glass_blur",
    "motion_blur",
    "frost",
    "elastic_transform",
    "spatter",
    "saturate",
}


def pictures(channels: int, height: int = 32, width: int = 32, n: int = 24) -> Tensor:
    """Random pictures (n,channels,height,width) uint8: large shapes, and less and less of small."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(n, channels, height, width)
    for cells, weight in ((3, 0.6), (8, 0.25), (32, 0.15)):
        coarse = torch.rand(n, channels, cells, cells, generator=generator)
        total += weight * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (total * 220 + 20).to(torch.uint8)


def test_all_nineteen_are_there_in_the_published_order() -> None:
    assert tuple(CORRUPTIONS) == NAMES
    assert (len(MAIN), len(EXTRA), len(set(NAMES))) == (15, 4, 19)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 40, 17), (3, 9, 64), (3, 224, 224)]
)
def test_any_size_grey_or_colour(name: str, shape: tuple[int, int, int]) -> None:
    images = pictures(*shape, n=2)
    before, rng, threads = images.clone(), torch.get_rng_state(), torch.get_num_threads()
    for severity in SEVERITIES:
        worse = corrupt(images, name, severity, seed=3)
        assert worse.shape == images.shape and worse.dtype == torch.uint8
    assert not torch.equal(worse, images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name: str) -> None:
    images = pictures(3)
    torch.manual_seed(1)
    first = corrupt(images, name, 4, seed=9)
    torch.manual_seed(2)
    assert torch.equal(first, corrupt(images, name, 4, seed=9))
    assert torch.equal(first, corrupt(images, name, 4, seed=10)) == (name in STEADY)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_the_images_around_it(name: str) -> None:
    length = block_length(32, 32)
    images = pictures(3, n=length + 20)
    whole = corrupt(images, name, 5, seed=4)
    cuts = (0, 7, length - 1, length + 3, len(images))
    parts = [corrupt(images[a:b], name, 5, seed=4, start=a) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    others = images.flip(0)
    others[11] = images[11]
    assert torch.equal(corrupt(others, name, 5, seed=4)[11], whole[11])


@pytest.mark.parametrize("name", sorted(set(NAMES) - STEADY))
def test_each_image_gets_noise_of_its_own(name: str) -> None:
    length = block_length(32, 32)
    same = pictures(3, n=1).expand(length + 1, -1, -1, -1)
    worse = corrupt(same, name, 5, seed=0)
    assert not torch.equal(worse[0], worse[1])
    assert not torch.equal(worse[0], worse[length])  # the same place of the next block


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_BY_DISTANCE))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_higher_severity_is_further_from_the_original(name: str, channels: int) -> None:
    images = pictures(channels, n=64)
    gaps = [
        float((corrupt(images, name, s, seed=0).float() - images.float()).square().mean())
        for s in SEVERITIES
    ]
    assert gaps[0] > 0 and all(low < high for low, high in pairwise(gaps))


def test_frost_hides_more_and_more_of_the_image() -> None:
    images = pictures(3, n=256)
    alike = []
    for severity in SEVERITIES:
        worse = corrupt(images, "frost", severity, seed=0)
        both = torch.stack([images.flatten(), worse.flatten()]).double()
        alike.append(float(torch.corrcoef(both)[0, 1]))
    assert all(low > high for low, high in pairwise(alike))


def test_motion_blur_takes_more_and_more_detail() -> None:
    # The constants of 3 and 4 differ in reach only, where the weights have vanished.
    images = pictures(1, n=256)
    left = []
    for severity in SEVERITIES:
        worse = corrupt(images, "motion_blur", severity, seed=0).double()
        left.append(float(worse.diff(dim=3).square().mean()))
    assert left[0] > 1.2 * left[1] > 1.2 * left[2] and left[3] > 1.1 * left[4]
    assert left[3] == pytest.approx(left[2], rel=0.05)


def test_flat_pictures_survive_what_moves_or_averages_pixels() -> None:
    flat = torch.arange(0, 256, 5, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 16, 16)
    for name in NAMES:
        if "blur" in name or name in ("contrast", "elastic_transform", "pixelate"):
            for severity in SEVERITIES:
                assert torch.equal(corrupt(flat, name, severity, seed=0), flat), name


def test_variants_are_those_of_corrupt_in_order() -> None:
    images = pictures(1, 8, 8, n=3)
    made = list(variants(images, seed=5))
    assert [(name, severity) for name, severity, _ in made] == [
        (name, severity) for name in NAMES for severity in SEVERITIES
    ]
    for name, severity, worse in made[::7]:
        assert torch.equal(worse, corrupt(images, name, severity, seed=5))
    with pytest.raises(EvaluationError, match="received 0 workers; expected at least 1"):
        list(variants(images, seed=5, workers=0))


@pytest.mark.slow
def test_variants_are_the_same_from_several_processes() -> None:
    images, names = pictures(3, n=70), ("fog", "motion_blur")
    alone = list(variants(images, seed=5, names=names))
    together = list(variants(images, seed=5, names=names, workers=2))
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 20, 120)])
def test_the_contact_sheet_shows_every_variant(shape: tuple[int, int, int], tmp_path: Path) -> None:
    image = pictures(*shape, n=1)[0]
    contact_sheet(image, tmp_path / "sheet.png", seed=2)
    with Image.open(tmp_path / "sheet.png") as opened:
        assert opened.format == "PNG"
        sheet = np.asarray(opened.convert("RGB"))
    height, width = shape[1:]
    factor = -(-96 // max(height, width))

    def tile(row: int, column: int) -> np.ndarray:
        top = 34 + row * (factor * height + 6) + (6 if row >= len(MAIN) else 0)
        left = 190 + column * (factor * width + 6)
        return sheet[top : top + factor * height : factor, left : left + factor * width : factor]

    for row, name in enumerate(NAMES):
        assert np.array_equal(tile(row, 0), image.expand(3, -1, -1).movedim(0, 2)), name
        for severity in SEVERITIES:
            worse = corrupt(image[None], name, severity, seed=2)[0].expand(3, -1, -1)
            assert np.array_equal(tile(row, severity), worse.movedim(0, 2)), (name, severity)


def test_a_batch_is_no_contact_sheet(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"expected \(C,H,W\) uint8"):
        contact_sheet(pictures(3), tmp_path / "sheet.png", seed=0)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_corrupted_is_refused() -> None:
    images = pictures(3)
    cases = [
        (images, "rain", 1, 0, "received corruption 'rain'; expected one of gaussian_noise"),
        (images, "contrast", 0, 0, "received severity 0; expected"),
        (images, "contrast", 6, 0, "received severity 6; expected"),
        (images.float(), "contrast", 1, 0, "expected .* uint8"),
        (images[:, :2], "contrast", 1, 0, "expected .* uint8"),
        (images[0], "contrast", 1, 0, "expected .* uint8"),
        (images[..., :7], "contrast", 1, 0, "32x7; expected at least 8x8"),
        (images, "contrast", 1, -1, "received start -1"),
    ]
    for bad, name, severity, start, message in cases:
        with pytest.raises(EvaluationError, match=message):
            corrupt(bad, name, severity, seed=0, start=start)
    assert corrupt(images[:0], "fog", 1, seed=0).shape == (0, 3, 32, 32)


def test_the_registry_takes_each_name_once_with_five_constants() -> None:
    with pytest.raises(ValueError, match="must be new"):
        corruption("contrast", (1, 2, 3, 4, 5))(lambda images, constant, generator: images)
    with pytest.raises(ValueError, match="5 constants"):
        corruption("new", (1, 2))(lambda images, constant, generator: images)
    assert "new" not in CORRUPTIONS
