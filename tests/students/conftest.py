"""What the tests of the students share: small teachers on digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epdistill.data import DataSet, load
from epdistill.recipes import Recipe, load_recipe
from epdistill.students.spec import Goal
from epdistill.teachers.architecture import Architecture, layers_for
from epdistill.teachers.model import EPCNN
from epdistill.teachers.targets import Targets
from epdistill.teachers.teach import build_teacher
from epdistill.training import Batch, generator_of


class Plain(nn.Module):
    """An ordinary teacher whose last state is not what its answer is linear in."""

    stochastic = False
    in_channels, image_size, classes = 1, 8, 10

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Conv2d(1, 3, 3, stride=2, padding=1)
            self.second = nn.Conv2d(3, 5, 4)
            self.hidden = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 10))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.3))
        self.register_buffer("std", torch.full((1, 1, 1, 1), 0.4))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        return (3, 4, 4), (5, 1, 1)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Targets:
        below = self.scale * self.first((images - self.mean) / self.std).relu()
        top = self.second(below).relu()
        return Targets([below, top], self.hidden(top.flatten(1)), torch.ones(len(images)) > 0)

    def linear_readout(self) -> None:
        return None


@pytest.fixture(scope="session")
def data() -> DataSet:
    return load("digits", limit=96)


def recipe_for(**changes: object) -> Recipe:
    """The digits recipe with a tiny teacher, and changes to its student."""
    student = {f"student.{key}": value for key, value in changes.items()}
    own: dict[str, Any] = {
        "teacher.channels": [4, 6], "student.name": "cnn", "student.width": 4,
    }  # fmt: skip
    return load_recipe("digits", {**own, **student}, {})


@pytest.fixture(scope="session")
def recipe() -> Callable[..., Recipe]:
    return recipe_for


@pytest.fixture(scope="session")
def plain() -> Callable[..., Plain]:
    return Plain


@pytest.fixture(scope="session")
def teacher(data: DataSet) -> EPCNN:
    return build_teacher(recipe_for(), data).eval()


@pytest.fixture(scope="session")
def goal() -> Callable[..., Goal]:
    """An EP-CNN's outward shape, by image size, channels and width."""

    def make(size: int, channels: int = 1, width: int = 4) -> Goal:
        layers = layers_for(size, width=width)
        return Goal.of_architecture(
            Architecture(channels, size, layers, 5, (0.5,) * channels, (0.25,) * channels)
        )

    return make


@pytest.fixture(scope="session")
def batch_of(data: DataSet) -> Callable[..., Batch]:
    """The step-th batch of 16 training images, in the given epoch of ten."""

    def make(step: int = 0, epoch: int = 0) -> Batch:
        index = torch.arange(16 * step, 16 * (step + 1))
        images = data.train.images[index].float() / 255
        generator = generator_of(7, epoch, step)
        labels = data.train.labels[index]
        return Batch(images, labels, step + 5 * epoch, 50, epoch, 10, generator, index)

    return make
