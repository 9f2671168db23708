"""PGD and Carlini-Wagner beside foolbox's on the same budget: 500 and 100 unseen digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from epdistill.robustness.attacks import (
    CWSettings,
    PGDSettings,
    carlini_wagner,
    pgd_l2,
    pgd_linf,
)

foolbox = pytest.importorskip("foolbox")

pytestmark = pytest.mark.slow

SEEDS = range(5)
STEPS = 20
CASES = [
    pytest.param(pgd_linf, "LinfProjectedGradientDescentAttack", 0.1, id="linf-0.1"),
    pytest.param(pgd_linf, "LinfProjectedGradientDescentAttack", 0.15, id="linf-0.15"),
    pytest.param(pgd_l2, "L2ProjectedGradientDescentAttack", 0.6, id="l2-0.6"),
    pytest.param(pgd_l2, "L2ProjectedGradientDescentAttack", 0.9, id="l2-0.9"),
]


def theirs(
    name: str, net: nn.Module, images: Tensor, labels: Tensor, eps: float | None, **how
) -> Tensor:
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    found: Tensor = getattr(foolbox.attacks, name)(**how)(model, images, labels, epsilons=eps)[1]
    return found


def broken(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images).argmax(1) != labels


@pytest.mark.parametrize(("attack", "name", "eps"), CASES)
def test_pgd_from_the_image_breaks_all_that_foolbox_breaks(attack, name, eps, trained, unseen):
    # Without random starts, image by image: the same steps, and here the best is kept.
    images, labels = unseen
    assert len(images) == 500
    how = PGDSettings(STEPS, random_start=False)
    ours = broken(trained, attack(trained, *unseen, eps, seed=0, settings=how), labels)
    step = {"steps": STEPS, "rel_stepsize": how.relative_step / STEPS, "random_start": False}
    other = broken(trained, theirs(name, trained, images, labels, eps, **step), labels)
    assert 50 < int(other.sum()) < 490
    assert not bool((other & ~ours).any())


@pytest.mark.parametrize(("attack", "name", "eps"), CASES)
def test_pgd_from_random_starts_breaks_as_many_as_foolbox(attack, name, eps, trained, unseen):
    images, labels = unseen
    how = PGDSettings(STEPS)
    ours, same, default = [], [], []
    for seed in SEEDS:
        found = attack(trained, images, labels, eps, seed=seed, settings=how)
        ours.append(int(broken(trained, found, labels).sum()))
        for into, more in ((same, {"rel_stepsize": how.relative_step / STEPS}), (default, {})):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found = theirs(name, trained, images, labels, eps, steps=STEPS, **more)
            into.append(int(broken(trained, found, labels).sum()))
    # Each start is a throw of the dice: five of them differ by up to 2 images in their mean.
    assert sum(ours) >= sum(same) - 2 * len(SEEDS), (ours, same)
    assert min(ours) > max(default), (ours, default)


class Grey(nn.Module):
    """The net on images of which no pixel is black or white."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.1) / 0.8)


@pytest.mark.parametrize("kind", ["digits", "grey"])
def test_carlini_wagner_comes_as_near_as_foolbox(kind, trained, unseen):
    images, labels = unseen[0][:100], unseen[1][:100]
    net: nn.Module = trained
    if kind == "grey":
        images, net = 0.1 + 0.8 * images, Grey(trained).eval()
    how = CWSettings(c=0.1, steps=200, lr=0.01, binary_search_steps=9)
    ours = carlini_wagner(net, images, labels, seed=0, settings=how)
    other = theirs(
        "L2CarliniWagnerAttack",
        net,
        images,
        labels,
        None,
        binary_search_steps=how.binary_search_steps,
        steps=how.steps,
        stepsize=how.lr,
        initial_const=how.c,
    )
    both = [broken(net, found, labels) for found in (ours, other)]
    assert bool(both[0].all()) and int(both[0].sum()) >= int(both[1].sum())
    near, far = ((x - images).flatten(1).norm(dim=1) for x in (ours, other))
    assert float(near.mean()) <= float(far.mean())
    assert float((near / far).max()) < 1.05
    if kind == "digits":
        # Most pixels of a digit are black, where tanh has no slope.
        assert float(near.mean()) < 0.9 * float(far.mean())
