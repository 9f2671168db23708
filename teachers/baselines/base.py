"""What all baselines share: normalisation, stages, a linear head, and the answer to a student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epdistill.errors import RecipeError
from epdistill.teachers.targets import Shape, Targets


@dataclass(frozen=True)
class ImageSpec:
    """The images a network is built for.

    Attributes:
        in_channels: Image channels.
        image_size: Side of the square images, in pixels.
        classes: Number of classes.
        mean: Per-channel mean in [0,1], subtracted inside the model.
        std: Per-channel divisor, applied inside the model.
    """

    in_channels: int
    image_size: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that there is a mean and a divisor for every channel.

        Raises:
            RecipeError: There is not.
        """
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise RecipeError(
                f"mean has {len(self.mean)} and std {len(self.std)} numbers for images of "
                f"{self.in_channels} channels; expected one each per channel"
            )


class Baseline(nn.Module, ABC):
    """A feedforward classifier whose logits are linear in its last stage.

    A subclass builds its layers, gives them in `stages`, and ends with `finish`.

    Args:
        images: What it is built for.
        shape: The subclass' own arguments, JSON values only; they rebuild the network.
    """

    mean: Tensor
    std: Tensor
    head: nn.Linear
    stochastic = False

    def __init__(self, images: ImageSpec, shape: Mapping[str, Any]) -> None:
        super().__init__()
        self.images, self.shape = images, dict(shape)
        view = (1, images.in_channels, 1, 1)
        self.register_buffer("mean", torch.tensor(images.mean).view(view))
        self.register_buffer("std", torch.tensor(images.std).view(view))

    def finish(self) -> None:
        """Find the stages' shapes by a dry run, and add the head on top of the last one."""
        side, training = self.images.image_size, self.training
        self.eval()
        with torch.no_grad():
            states = self.stages(torch.zeros(1, self.images.in_channels, side, side))
        self.train(training)
        self.shapes: tuple[Shape, ...] = tuple(
            (state.shape[1], state.shape[2], state.shape[3]) for state in states
        )
        self.head = nn.Linear(states[-1].numel(), self.images.classes)

    @abstractmethod
    def stages(self, x: Tensor) -> list[Tensor]:
        """Normalised images (N, C, H, W) -> the output of every stage, (N, c, h, w) each."""

    @property
    def in_channels(self) -> int:
        """Image channels."""
        return self.images.in_channels

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.images.image_size

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.images.classes

    def normalise(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0,1] -> what the first layer sees."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes)."""
        logits: Tensor = self.head(self.stages(self.normalise(images))[-1].flatten(1))
        return logits

    @torch.no_grad()
    def targets(self, images: Tensor) -> Targets:
        """The stages' outputs for images (N, C, H, W) in [0,1], and the logits without noise."""
        states = self.stages(self.normalise(images))
        settled = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return Targets(states, self.head(states[-1].flatten(1)), settled)

    def linear_readout(self) -> tuple[Tensor, Tensor]:
        """V (classes, d) and c (classes,), detached, of logits = V vec(s_L) + c."""
        return self.head.weight.detach(), self.head.bias.detach()

    def describe(self) -> dict[str, Any]:
        """What rebuilds the network: JSON values only."""
        return {"images": asdict(self.images), "shape": self.shape}
