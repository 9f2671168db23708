"""The attacks along gradients: as strong as they claim, on confident models too."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    APGDSettings,
    FGSMSettings,
    PGDSettings,
    apgd_l2,
    apgd_linf,
    fgsm,
    noise_l2,
    noise_linf,
    pgd_l2,
    pgd_linf,
)
from epdistill.robustness.attacks.common import margin_of_cross_entropy


def accuracy(net, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def test_pgd_breaks_a_plain_model(trained, batch):
    images, labels = batch
    assert accuracy(trained, images, labels) == 1.0
    linf = pgd_linf(trained, images, labels, 0.25, seed=0)
    l2 = pgd_l2(trained, images, labels, 1.5, seed=0)
    assert accuracy(trained, linf, labels) <= 0.02
    assert accuracy(trained, l2, labels) <= 0.02
    # The control: as much noise, but random, does next to nothing.
    signs = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    assert accuracy(trained, (images + 0.1 * signs).clamp(0, 1), labels) > 0.8


def test_the_stronger_the_attack_the_lower_the_accuracy(trained, unseen):
    images, labels = (part[:200] for part in unseen)
    shown = (trained, images, labels)
    linf, l2 = 0.15, 0.9
    # On the loss that PGD climbs: another may well suit a model less.
    steep = APGDSettings(loss="ce")
    left = {
        "noise": accuracy(trained, noise_linf(*shown, linf, seed=0), labels),
        "fgsm": accuracy(trained, fgsm(*shown, linf, seed=0), labels),
        "pgd": accuracy(trained, pgd_linf(*shown, linf, seed=0), labels),
        "apgd": accuracy(trained, apgd_linf(*shown, linf, seed=0, settings=steep), labels),
        "noise l2": accuracy(trained, noise_l2(*shown, l2, seed=0), labels),
        "pgd l2": accuracy(trained, pgd_l2(*shown, l2, seed=0), labels),
        "apgd l2": accuracy(trained, apgd_l2(*shown, l2, seed=0, settings=steep), labels),
    }
    assert left["noise"] > left["fgsm"] + 0.1 and left["fgsm"] >= left["pgd"], left
    assert left["noise l2"] > left["pgd l2"] + 0.3, left
    assert left["apgd"] <= left["pgd"] and left["apgd l2"] <= left["pgd l2"], left


@pytest.mark.parametrize("attack", [pgd_linf, fgsm, apgd_linf])
def test_the_optimum_of_a_linear_two_class_model_is_reached(attack):
    # There the worst image is known: each pixel eps along -sign(w), cut at the box.
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 8, 8, generator=generator)
    labels = torch.randint(2, (20,), generator=generator)
    w = torch.randn(64, generator=generator)

    def model(x: Tensor) -> Tensor:
        score = x.flatten(1) @ w
        return torch.stack([score, -score], dim=1)

    away = torch.where(labels == 0, -1.0, 1.0)[:, None] * w.sign()
    best = (images + 0.1 * away.view_as(images)).clamp(0, 1)
    how = {apgd_linf: APGDSettings(loss="ce"), fgsm: FGSMSettings(), pgd_linf: PGDSettings()}
    found = attack(model, images, labels, 0.1, seed=0, settings=how[attack])
    assert torch.allclose(found, best, atol=1e-5)


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2])
def test_the_best_iterate_is_returned(attack):
    # A rippled loss and long steps: the last iterate is seldom the best.
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 8, 8, generator=generator)
    labels = torch.zeros(40, dtype=torch.int64)
    w = torch.randn(64, 3, generator=generator)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        return torch.sin(6 * (x.flatten(1) @ w))

    def spy(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    found = attack(spy, images, labels, 0.3, seed=0, settings=PGDSettings(steps=9, restarts=2))
    assert len(seen) == 2 * (9 + 1)
    loss = torch.stack([margin_of_cross_entropy(model(x), labels) for x in seen])
    wrong = torch.stack([model(x).argmax(1) != labels for x in seen])
    returned = margin_of_cross_entropy(model(found), labels)
    returned_wrong = model(found).argmax(1) != labels
    assert torch.equal(returned_wrong, wrong.any(dim=0))
    among = torch.where(wrong == returned_wrong, loss, -torch.inf).amax(dim=0)
    assert torch.allclose(returned, among)
    same = wrong[-1] == returned_wrong
    assert bool((returned >= loss[-1])[same].all())
    assert bool((returned > loss[-1] + 0.1).any())  # else this test would prove nothing


@pytest.mark.parametrize("attack", [apgd_linf, apgd_l2])
def test_apgd_returns_the_best_iterate_and_spends_its_budget(attack):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(30, 1, 8, 8, generator=generator)
    labels = torch.zeros(30, dtype=torch.int64)
    w = torch.randn(64, 3, generator=generator)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        # The label leads everywhere: no image ever leaves the batch.
        return torch.sin(6 * (x.flatten(1) @ w)) + torch.tensor([3.0, 0.0, 0.0])

    def spy(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    how = APGDSettings(steps=30, loss="ce", restarts=2)
    found = attack(spy, images, labels, 0.3, seed=0, settings=how)
    assert len(seen) == 2 * (30 + 1)
    loss = torch.stack([margin_of_cross_entropy(model(x), labels) for x in seen])
    returned = margin_of_cross_entropy(model(found), labels)
    assert torch.allclose(returned, loss.amax(dim=0))
    assert bool((returned > loss[-1] + 0.1).any())  # else this test would prove nothing


def test_apgd_halves_its_step_where_it_does_not_climb():
    # A ridge that long steps keep jumping over: only shorter ones get near its top.
    images, labels = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    target = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1

    def model(x: Tensor) -> Tensor:
        away = ((x.flatten(1) - 0.5 - target) ** 2).sum(dim=1)
        return torch.stack([10 + away, -away], dim=1)

    how = APGDSettings(steps=100, loss="ce")
    found = apgd_linf(model, images, labels, 0.2, seed=0, settings=how) - 0.5
    assert float((found.flatten(1) - target).abs().max()) < 0.01


def test_the_dlr_loss_needs_three_classes(batch):
    with pytest.raises(EvaluationError, match=r"has 2; expected loss='ce'"):
        apgd_linf(lambda x: x.flatten(1)[:, :2], batch[0], batch[1] % 2, 0.1, seed=0)


class _Scaled(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.net(x)


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2])
def test_confident_models_are_attacked_all_the_same(attack, trained, batch):
    # Scaled logits answer alike, but their cross-entropy has no gradient in float32.
    images, labels = batch

    def sure(x: Tensor) -> Tensor:
        return 1000 * trained(x)

    probe = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(sure(probe), labels), probe)
    assert int((gradient.flatten(1).abs().amax(1) == 0).sum()) > 32
    eps = 0.25 if attack is pgd_linf else 1.5
    assert accuracy(trained, attack(sure, images, labels, eps, seed=0), labels) <= 0.05
    kind = torchattacks.PGD if attack is pgd_linf else torchattacks.PGDL2
    with torch.random.fork_rng(devices=[]):
        plain = kind(_Scaled(trained).eval(), eps=eps, alpha=eps / 8, steps=20)(images, labels)
    assert accuracy(trained, plain, labels) > 0.5  # what is mended was broken


def test_margin_is_the_logit_of_the_cross_entropy():
    logits = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 5
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(F.softplus(margin_of_cross_entropy(logits, labels)), expected)


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2, fgsm, apgd_l2])
def test_a_model_without_gradients_is_not_called_robust(attack, batch):
    images, labels = batch

    def detached(x: Tensor) -> Tensor:
        return x.detach().flatten(1)[:, :10]

    def cut(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 10, requires_grad=True) + x.detach().sum()

    def broken(x: Tensor) -> Tensor:
        # sqrt(0) has a finite value and an infinite slope.
        return (x * 0).sqrt().flatten(1)[:, :10]

    for model in (detached, cut):
        with pytest.raises(EvaluationError, match="no gradient"):
            attack(model, images, labels, 0.1, seed=0)
    with pytest.raises(EvaluationError, match="images holds NaN or infinity"):
        attack(broken, images, labels, 0.1, seed=0)


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2, fgsm, apgd_l2])
def test_gradients_work_inside_no_grad_and_inference_mode(attack, trained, batch):
    images, labels = batch
    plain = attack(trained, images, labels, 0.1, seed=0)
    with torch.no_grad():
        assert torch.equal(plain, attack(trained, images, labels, 0.1, seed=0))
    with torch.inference_mode():
        assert torch.equal(plain, attack(trained, images.clone(), labels, 0.1, seed=0))
