"""Random crops and flips of whole batches, drawn from an explicit generator.

Nothing here reads or changes the global random state: the state of the generator
alone reproduces an augmentation. Numbers are drawn on the generator's device and
moved to the images', so a CPU generator gives the same crops and flips on every
device. For a shard of a batch, the whole batch's numbers are drawn and the shard's
are used: however a batch is divided, its images come out the same. Pixels are only
moved, never mixed: any dtype goes in and comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from epdistill.distributed import Shard
from epdistill.errors import RecipeError

PaddingMode = Literal["reflect", "edge", "zeros"]


def _check(padding: int, mode: str) -> None:
    if padding < 0:
        raise RecipeError(f"crop padding is {padding}; expected 0 (no crop) or more pixels")
    if mode not in get_args(PaddingMode):
        known = ", ".join(get_args(PaddingMode))
        raise RecipeError(f"padding mode is {mode!r}; expected one of {known}")


def random_crop(
    images: Tensor,
    padding: int,
    generator: torch.Generator,
    mode: PaddingMode = "reflect",
    shard: Shard | None = None,
) -> Tensor:
    """Pad every image on all sides and cut a window of the old size at a random place.

    Each image gets its own offset, uniform over the (2 padding + 1)^2 places.

    Args:
        images: (N, C, H, W), any dtype.
        padding: Pixels; 0 returns `images` and draws nothing.
        generator: The source of the offsets.
        mode: What lies outside: "reflect" (mirrored without repeating the border),
            "edge" (the border repeated) or "zeros".
        shard: Which rows of a batch the images are; the whole of it without.

    Returns:
        (N, C, H, W), same dtype and device.

    Raises:
        RecipeError: A negative padding, an unknown mode, or a reflection wider than
            the image (it needs padding < H and padding < W).
    """
    _check(padding, mode)
    count, _, height, width = images.shape
    if mode == "reflect" and padding >= min(height, width):
        raise RecipeError(
            f"crop padding is {padding} for images of {height}x{width}; reflection needs less "
            f"than {min(height, width)}: take less padding, or padding mode edge or zeros"
        )
    if padding == 0:
        return images
    shard = shard or Shard(0, count, count)
    draws = torch.randint(
        0, 2 * padding + 1, (2, shard.count), generator=generator, device=generator.device
    )
    top, left = draws[:, shard.rows].to(images.device)
    padded = _pad(images, padding, mode)
    # All windows (N, C, 2 padding + 1, 2 padding + 1, H, W) as a view; one per image is copied.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, top, left]


def _pad(images: Tensor, padding: int, mode: PaddingMode) -> Tensor:
    """(N, C, H, W) padded on all sides; torch's own reflection does not take uint8."""
    if mode == "zeros":
        return torch.nn.functional.pad(images, (padding,) * 4)
    for axis in (2, 3):
        last = images.shape[axis] - 1
        places = torch.arange(-padding, last + padding + 1, device=images.device)
        if mode == "reflect":
            places = last - (last - places.abs()).abs()
        images = images.index_select(axis, places.clamp(0, last))
    return images


def random_flip(images: Tensor, generator: torch.Generator, shard: Shard | None = None) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (N, C, H, W), any dtype.
        generator: The source of the coins, one per image of the batch.
        shard: Which rows of a batch the images are; the whole of it without.

    Returns:
        (N, C, H, W), same dtype and device.
    """
    shard = shard or Shard(0, len(images), len(images))
    coins = torch.randint(0, 2, (shard.count,), generator=generator, device=generator.device)
    flipped = coins[shard.rows].to(images.device, torch.bool)[:, None, None, None]
    return torch.where(flipped, images.flip(3), images)


@dataclass(frozen=True)
class Augmentation:
    """A crop, then a flip; with nothing on, the identity, which draws nothing.

    Attributes:
        crop_padding: Pixels of padding for `random_crop`; 0 is off.
        flip: Whether `random_flip` is on.
        padding_mode: "reflect", "edge" or "zeros".
    """

    crop_padding: int = 0
    flip: bool = False
    padding_mode: PaddingMode = "reflect"

    def __post_init__(self) -> None:
        _check(self.crop_padding, self.padding_mode)

    def __call__(
        self, images: Tensor, generator: torch.Generator, shard: Shard | None = None
    ) -> Tensor:
        """Augment a batch (N, C, H, W), or its shard; `generator`'s state alone decides how."""
        images = random_crop(images, self.crop_padding, generator, self.padding_mode, shard)
        return random_flip(images, generator, shard) if self.flip else images
