"""Crops and flips against per-image references, and what they may not touch."""

import numpy as np
import pytest
import torch

from epdistill.augment import Augmentation, random_crop, random_flip
from epdistill.errors import RecipeError

NUMPY_MODES = {"reflect": "reflect", "edge": "edge", "zeros": "constant"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(dtype: torch.dtype = torch.uint8, shape=(40, 3, 7, 9)) -> torch.Tensor:
    return torch.randint(1, 256, shape, generator=seeded(99)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("mode", NUMPY_MODES)
def test_crop_equals_the_reference_made_one_image_at_a_time(mode, dtype):
    images, padding = some_images(dtype), 3
    cropped = random_crop(images, padding, seeded(5), mode)

    offsets = torch.randint(0, 2 * padding + 1, (2, len(images)), generator=seeded(5))
    for image, result, (top, left) in zip(images, cropped, offsets.T.tolist(), strict=True):
        padded = np.pad(
            image.numpy(), ((0, 0), (padding, padding), (padding, padding)), NUMPY_MODES[mode]
        )
        assert np.array_equal(result.numpy(), padded[:, top : top + 7, left : left + 9])
    assert cropped.dtype == dtype
    assert len({tuple(pair) for pair in offsets.T.tolist()}) > 10  # each image its own place


def test_every_offset_occurs():
    images = torch.arange(25, dtype=torch.uint8).reshape(1, 1, 5, 5).repeat(300, 1, 1, 1)
    centres = random_crop(images, 1, seeded(), "edge")[:, 0, 2, 2]
    assert set(centres.tolist()) == {6, 7, 8, 11, 12, 13, 16, 17, 18}


def test_flip_equals_the_reference_made_one_image_at_a_time():
    images = some_images()
    flipped = random_flip(images, seeded(3))
    coins = torch.randint(0, 2, (len(images),), generator=seeded(3)).tolist()
    for image, result, coin in zip(images, flipped, coins, strict=True):
        expected = image.numpy()[:, :, ::-1] if coin else image.numpy()
        assert np.array_equal(result.numpy(), expected)
    assert 10 < sum(coins) < 30


def test_the_generator_alone_decides_and_only_it_is_advanced():
    augment = Augmentation(crop_padding=2, flip=True)
    images = some_images()
    kept, before = images.clone(), torch.get_rng_state()
    generator = seeded(1)
    first = augment(images, generator)
    second = augment(images, generator)

    torch.manual_seed(1234)
    state = torch.get_rng_state()
    generator = seeded(1)
    assert torch.equal(augment(images, generator), first)
    noted = generator.get_state()
    assert torch.equal(augment(images, generator), second)
    generator.set_state(noted)
    assert torch.equal(augment(images, generator), second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert torch.equal(images, kept)
    torch.set_rng_state(before)


def test_a_crop_then_a_flip():
    images = some_images()
    generator = seeded(8)
    expected = random_flip(random_crop(images, 2, generator, "zeros"), generator)
    result = Augmentation(crop_padding=2, flip=True, padding_mode="zeros")(images, seeded(8))
    assert torch.equal(result, expected)


def test_nothing_on_is_the_identity_and_draws_nothing():
    images, generator = some_images(), seeded(4)
    assert Augmentation()(images, generator) is images
    assert torch.equal(generator.get_state(), seeded(4).get_state())


def test_reflection_reaches_just_below_the_size():
    images = some_images(shape=(4, 1, 5, 8))
    assert random_crop(images, 4, seeded()).shape == images.shape
    with pytest.raises(RecipeError, match=r"padding is 5 for images of 5x8.*less than 5"):
        random_crop(images, 5, seeded())
    assert random_crop(images, 20, seeded(), "edge").shape == images.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_padding": -1}, "crop padding is -1; expected 0"),
        ({"padding_mode": "mirror"}, "'mirror'; expected one of reflect, edge, zeros"),
    ],
)
def test_impossible_augmentations_are_refused_when_made(arguments, message):
    with pytest.raises(RecipeError, match=message) as raised:
        Augmentation(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cpu_generator_gives_the_same_bytes_on_a_gpu():
    augment, images = Augmentation(crop_padding=2, flip=True), some_images()
    on_gpu = augment(images.cuda(), seeded(6))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), augment(images, seeded(6)))
