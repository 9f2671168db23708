"""What a student is taught by: the answer of any teacher, stage by stage.

An EP-CNN answers with its fixed points, an ordinary network with the outputs of its
stages. Whoever distills needs no more than this of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Targets:
    """A teacher's answer to N images, detached.

    Attributes:
        states: One per stage, from the image upwards, each (N, C, h, w): an EP-CNN's fixed
            points, a network's stage outputs after their activation.
        logits: (N, classes). Of a stochastic teacher, their expectation.
        settled: (N,) bool; False where the states are not those of an equilibrium.
        sweeps: (N,) int64, sweeps spent on each image; None if nothing was relaxed.
    """

    states: list[Tensor]
    logits: Tensor
    settled: Tensor
    sweeps: Tensor | None = None


class Teacher(Protocol):
    """What distillation asks of a teacher, which is an `nn.Module` from images to logits.

    Attributes:
        mean: Per-channel mean of the images, (1, C, 1, 1); normalisation happens inside.
        std: Per-channel divisor, (1, C, 1, 1).
    """

    mean: Tensor
    std: Tensor

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(channels, height, width) of every state."""

    @property
    def in_channels(self) -> int:
        """Image channels."""

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def stochastic(self) -> bool:
        """Whether the forward pass answers at random."""

    def targets(self, images: Tensor) -> Targets:
        """The answer to images (N, C, H, W), float in [0,1]."""

    def linear_readout(self) -> tuple[Tensor, Tensor] | None:
        """V (classes, d) and c (classes,), detached, of logits = V vec(s_L) + c.

        None if the logits are no such function of the last state.
        """
