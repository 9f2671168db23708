"""The names, constants and functions of the corruption family.

A further corruption joins by the decorator:

    @corruption("name", (severity 1, ..., severity 5))
    def name(images, constant, generator): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epdistill.errors import EvaluationError

FAMILY = "cifar10c-style"
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8

# The order, the names and the split are those of the published arrays.
MAIN = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

# (images (B,C,H,W) float32 in [0,1], the severity's constant, generator) -> same shape.
# Each image of the block is treated on its own, and how many random numbers are
# drawn depends on the shape alone, never on the pixels.
Corrupt = Callable[[Tensor, Any, torch.Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """A corruption and its constants for the severities 1..5."""

    name: str
    constants: tuple[Any, ...]
    function: Corrupt


CORRUPTIONS: dict[str, Corruption] = {}


def corruption(name: str, constants: tuple[Any, ...]) -> Callable[[Corrupt], Corrupt]:
    """Register a corruption under `name`, with one constant per severity 1..5.

    The function it decorates gets images (B,C,H,W) float32 in [0,1], the severity's
    constant and a generator, and returns the same shape (values outside [0,1] are
    clipped for it). It must treat each image on its own, and draw a number of random
    numbers that depends on the shape alone: that is what makes the bytes of an image
    independent of the images around it.

    Raises:
        ValueError: The name is taken, or there are not five constants.
    """

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
