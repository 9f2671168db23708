"""Places in input space: seeded, inside [0,1] and the ball, and what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epdistill.students.inputs import PARTS, climb, corrupted, noisy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 1, 8, 8, generator=generator(4))


def test_noise(images: Tensor) -> None:
    def placed(inputs: str, seed: int = 0) -> Tensor:
        return noisy(images, inputs, 0.3, generator(seed))

    assert torch.equal(placed("clean"), images)
    everywhere = placed("noise")
    assert all(not torch.equal(a, b) for a, b in zip(everywhere, images, strict=True))
    mixed = placed("mix")
    assert torch.equal(mixed[::2], images[::2])
    assert not torch.equal(mixed[1::2], images[1::2])
    assert everywhere.min() >= 0
    assert everywhere.max() <= 1
    assert torch.equal(everywhere, placed("noise"))
    assert not torch.equal(everywhere, placed("noise", 1))


def test_corruptions(images: Tensor) -> None:
    types = ("speckle_noise", "brightness", "pixelate")
    worse = corrupted(images, types, generator())
    assert worse.shape == images.shape
    assert worse.min() >= 0
    assert worse.max() <= 1
    assert all(not torch.equal(a, b) for a, b in zip(worse, images, strict=True))
    assert torch.equal(worse, corrupted(images, types, generator()))
    assert not torch.equal(worse, corrupted(images, types, generator(1)))
    # Only the parts are alike: with one type of five severities they still differ.
    flat = torch.full((64, 1, 8, 8), 0.2)
    levels = corrupted(flat, ("brightness",), generator(2)).mean((1, 2, 3)).view(PARTS, -1)
    assert torch.equal(levels, levels[:, :1].expand_as(levels))
    assert len(set(levels[:, 0].tolist())) > 1
    assert (levels > 0.2).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_search_climbs_and_stays_inside(norm: str, images: Tensor) -> None:
    slope = torch.randn(images.shape, generator=generator(5))

    def loss(x: Tensor) -> Tensor:
        return (x * slope).sum()

    grey = 0.5 * torch.ones_like(images)
    eps = 0.1
    found = climb(loss, grey, norm, eps, 20, generator())
    delta = found - grey
    # The best a linear loss allows, from the dual norm.
    if norm == "linf":
        assert delta.abs().max() <= eps + 1e-6
        best = eps * slope.abs().sum()
    else:
        assert delta.flatten(1).norm(dim=1).max() <= eps + 1e-6
        best = eps * slope.flatten(1).norm(dim=1).sum()
    assert float(loss(delta)) == pytest.approx(float(best), rel=1e-2)
    assert torch.equal(found, climb(loss, grey, norm, eps, 20, generator()))
    assert not found.requires_grad


def test_the_search_starts_at_random(images: Tensor) -> None:
    found = [
        climb(lambda x: (0 * x).sum(), images, norm, 0.1, 1, generator(seed))
        for norm in ("linf", "l2")
        for seed in (0, 1)
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])
    assert not torch.equal(found[0], images)
