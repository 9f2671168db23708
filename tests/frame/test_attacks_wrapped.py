"""Models in wrappers: answers counted, and random ones averaged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    NoiseSettings,
    PGDSettings,
    SquareSettings,
    counted,
    expectation,
    noise_linf,
    pgd_l2,
    pgd_linf,
    square_linf,
)


def accuracy(net, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def test_counting_changes_nothing_else(trained, batch):
    images, labels = batch
    model = counted(trained)
    found = pgd_linf(model, images, labels, 0.1, seed=0, settings=PGDSettings(5, 2))
    assert (model.queries, model.calls) == (64 * 12, 12)
    plain = pgd_linf(trained, images, labels, 0.1, seed=0, settings=PGDSettings(5, 2))
    assert torch.equal(found, plain)
    model.reset()
    noise_linf(model, images, labels, 0.02, seed=0, settings=NoiseSettings(10))
    assert model.calls == 10 and 320 < model.queries <= 640  # broken images ask no further
    bare = counted(lambda x: x.flatten(1)[:, :10])
    square_linf(bare, images, labels, 0.1, seed=0, settings=SquareSettings(3))
    assert bare.calls <= 4 and bare.queries <= 4 * 64


class _Noisy(nn.Module):
    """Answers on an image blurred by much noise, in evaluation mode too."""

    def __init__(self, net: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x + 0.5 * torch.randn_like(x))


def test_expectation_is_a_function_of_the_images(trained, batch):
    images, _ = batch
    assert torch.allclose(expectation(trained, 3)(images), trained(images), atol=1e-5)
    mean = expectation(_Noisy(trained), 400, seed=1)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, again = mean(images), mean(images)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, again)
        assert not torch.equal(first, expectation(_Noisy(trained), 400, seed=2)(images))
        # Other images get other noise, not the same noise again.
        shifted = mean((images + 1e-6).clamp(0, 1))
        assert float((first - shifted).abs().max()) > 1e-3
        generator = torch.Generator().manual_seed(0)
        noise = 0.5 * torch.randn(400, *images.shape, generator=generator)
        draws = torch.stack([trained(images + one) for one in noise])
    # Two means of 400 draws each.
    assert bool(((first - draws.mean(0)).abs() <= 5 * draws.std(0) / 20 * 2**0.5).all())
    with pytest.raises(EvaluationError, match="at least 1"):
        expectation(trained, 0)


def test_attacks_on_the_expectation_are_stronger(trained, batch):
    images, labels = batch
    judge = expectation(_Noisy(trained), 100, seed=9)
    how = PGDSettings(10, random_start=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        single = pgd_l2(_Noisy(trained), images, labels, 0.9, seed=0, settings=how)
    view = expectation(_Noisy(trained), 20, seed=0)
    mean = pgd_l2(view, images, labels, 0.9, seed=0, settings=how)
    assert accuracy(judge, images, labels) > 0.8
    assert accuracy(judge, mean, labels) < accuracy(judge, single, labels) - 0.05


def test_confident_random_models_keep_their_gradient(trained, batch):
    images, labels = batch
    view = expectation(_Noisy(trained, 1000.0), 5)
    found = pgd_linf(view, images, labels, 0.3, seed=0, settings=PGDSettings(10))
    assert accuracy(trained, found, labels) < 0.2
