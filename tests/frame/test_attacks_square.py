"""Square: from answers alone, on every pixel and images of any shape."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.robustness.attacks import (
    SquareSettings,
    square_l2,
    square_linf,
)
from epdistill.robustness.attacks.square import LocalSquare


def accuracy(net, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("attack", [square_linf, square_l2])
def test_square_needs_answers_only(attack, trained, batch, capsys):
    images, labels = batch
    asked = 0

    def answers(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        assert not torch.is_grad_enabled()
        return torch.from_numpy(trained(x).numpy().copy())

    how = SquareSettings(queries=150)
    eps = 0.25 if attack is square_linf else 1.5
    found = attack(answers, images, labels, eps, seed=0, settings=how)
    assert asked <= 151
    assert accuracy(trained, found, labels) < 0.5
    assert capsys.readouterr().out == ""  # torchattacks prints about missing parameters


def test_square_leaves_the_models_own_tensor_alone():
    kept = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    images, labels = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    square_linf(lambda x: kept[: len(x)], images, labels, 0.1, seed=0)
    assert torch.equal(kept, torch.tensor([[1.0, 0.0]]).repeat(3, 1))


def test_square_does_not_rest_on_a_tie():
    # At the start all logits are equal, which reads as class 0, the label: an
    # attack that takes this for a success stops at once. Broken is an image whose
    # last two pixels are both bright.
    images, labels = torch.full((8, 1, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64)

    def model(x: Tensor) -> Tensor:
        corner = (x[:, 0, -1, -2:].sum(dim=1) > 1.15).float()
        return torch.stack([torch.zeros_like(corner), corner], dim=1)

    found = square_linf(model, images, labels, 0.1, seed=0, settings=SquareSettings(300))
    assert accuracy(model, found, labels) == 0.0


def test_squares_reach_every_pixel():
    class Spy(LocalSquare):
        def __init__(self) -> None:
            self.device = None
            self.shared = torch.Generator().manual_seed(0)

    spy = Spy()
    drawn = {int(spy.random_int(0, 3)) for _ in range(100)}
    assert drawn == {0, 1, 2, 3}
    assert int(spy.random_int(0, -5)) == 0


@pytest.mark.parametrize("shape", [(14, 14), (4, 4), (2, 9), (1, 1), (30, 12)])
def test_square_l2_takes_images_of_any_shape(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 2, *shape, generator=generator)
    w = torch.randn(2 * shape[0] * shape[1], 3, generator=generator)

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ w

    labels = model(images).argmax(dim=1)
    how = SquareSettings(300)
    found = square_l2(model, images, labels, 1.0, seed=0, settings=how)
    # Broken are those whose nearest boundary lies within reach, most of the time.
    leads = (model(images).amax(1, keepdim=True) - model(images)).masked_fill(
        F.one_hot(labels, 3).bool(), torch.inf
    )
    slopes = (w[:, labels].T[:, :, None] - w).norm(dim=1)
    easy = (leads / slopes).amin(dim=1) < 0.3
    broken = model(found).argmax(dim=1) != labels
    assert bool(broken[easy].float().mean() >= 0.5) if bool(easy.any()) else not broken.all()


def test_torchattacks_square_l2_fails_on_14_pixels():
    images = torch.rand(2, 1, 14, 14)
    net = nn.Sequential(nn.Flatten(), nn.Linear(196, 3)).eval()
    # Right answers, or there is nothing to attack.
    labels = net(images).argmax(1)
    with torch.random.fork_rng(devices=[]), pytest.raises(RuntimeError):
        torchattacks.Square(net, norm="L2", eps=1.0, n_queries=2)(images, labels)
