"""The adapter of AutoAttack: the authors' numbers, and none of their side effects."""

from __future__ import annotations

import logging
import random
import sys

import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    AutoAttackSettings,
    autoattack_l2,
    autoattack_linf,
    counted,
    expectation,
)

pyautoattack = pytest.importorskip("pyautoattack")

BOTH = [
    pytest.param(autoattack_linf, "Linf", 0.1, id="linf"),
    pytest.param(autoattack_l2, "L2", 0.6, id="l2"),
]


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and queries, whether it is called directly or through us."""
    whole = pyautoattack.AutoAttack._set_version

    def short(self, version: str) -> None:
        whole(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 20
        self.fab.n_iter, self.square.n_queries = 5, 40

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", short)


@pytest.fixture(scope="module")
def mixed(all_digits: tuple[Tensor, Tensor], trained: nn.Module) -> tuple[Tensor, Tensor]:
    """20 unseen digits, some of which the net gets wrong."""
    images, labels = (part[1100:1120] for part in all_digits)
    wrong = int((trained(images).argmax(1) != labels).sum())
    assert 0 < wrong < 10
    return images, labels


def directly(net: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        attack = pyautoattack.AutoAttack(net, norm=norm, eps=eps, seed=3)
        found, _ = attack.run_standard_evaluation(images, labels, batch_size=250)
    net.zero_grad(set_to_none=True)
    return found


class Wrapped(nn.Module):
    """A module of another kind around the net; the answers are the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "norm", "eps"), BOTH)
def test_500_images_end_bit_for_bit_as_with_the_authors_code(
    attack, norm, eps, trained, all_digits
):
    images, labels = (part[1000:1500] for part in all_digits)
    clean = float((trained(images).argmax(1) == labels).float().mean())
    theirs = directly(trained, images, labels, norm, eps)
    ours = attack(Wrapped(trained), images, labels, eps, seed=3)
    left = float((trained(ours).argmax(1) == labels).float().mean())
    assert 0.2 < left < clean - 0.2 and clean < 1
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(("attack", "norm", "eps"), BOTH)
def test_mixed_batches_and_wrapped_models_end_as_with_the_authors_code(
    attack, norm, eps, trained, mixed
):
    images, labels = mixed
    theirs = directly(trained, images, labels, norm, eps)
    right = trained(images).argmax(1) == labels
    left = trained(theirs).argmax(1) == labels
    assert 0 < int(left.sum()) < int(right.sum())
    for net in (trained, Wrapped(trained), counted(trained), expectation(trained, 1)):
        ours = attack(net, images, labels, eps, seed=3)
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[~right], images[~right]) and torch.equal(ours[left], images[left])


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(("attack", "norm", "eps"), BOTH)
def test_nothing_else_is_touched(attack, norm, eps, trained, mixed, capfd, caplog):
    images, labels = mixed
    before = images.clone()
    theirs = logging.getLogger("auto-attack")
    state = (theirs.propagate, list(theirs.handlers), theirs.level)
    torch_rng, python_rng, trace = torch.get_rng_state(), random.getstate(), sys.gettrace()
    trained.train()
    trained[1].eval()  # frozen BatchNorm inside a training model
    try:
        with caplog.at_level(logging.WARNING):
            attack(trained, images, labels, eps, seed=2**62)
        modes = [part.training for part in trained]
        assert trained.training and modes == [True, False, True, True, True, True]
    finally:
        trained.eval()
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())
    assert torch.equal(torch.get_rng_state(), torch_rng) and random.getstate() == python_rng
    assert sys.gettrace() is trace
    assert (theirs.propagate, list(theirs.handlers), theirs.level) == state
    assert torch.equal(images, before) and images.grad is None
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.usefixtures("shortened")
def test_warnings_of_the_library_are_logged_quietly(trained, mixed, caplog):
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return trained(x).softmax(1)

    with caplog.at_level(logging.INFO, logger="epdistill.robustness.attacks.autoattack"):
        autoattack_linf(Softmax(), *mixed, 0.2, seed=0)
    said = [record.getMessage() for record in caplog.records]
    assert any("probability distribution" in line for line in said)
    assert all(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(("attack", "norm", "eps"), BOTH)
def test_every_image_is_inside_the_ball_and_the_box(attack, norm, eps, trained, mixed):
    images, labels = mixed
    for radius in (0.01, 4 * eps):
        found = attack(trained, images, labels, radius, seed=0).double()
        assert float(found.min()) >= 0 and float(found.max()) <= 1
        away = (found - images.double()).flatten(1)
        far = away.abs().amax(1) if norm == "Linf" else away.norm(dim=1)
        assert float(far.max()) <= radius + 1e-6


@pytest.mark.usefixtures("shortened")
def test_batches_of_one_kind_and_of_one_image(trained, mixed):
    images, labels = mixed
    wrong = trained(images).argmax(1) != labels
    found = autoattack_linf(trained, images[wrong], labels[wrong], 0.1, seed=0)
    assert torch.equal(found, images[wrong])
    one = (~wrong).nonzero().flatten()[:1]
    found = autoattack_linf(trained, images[one], labels[one], 0.5, seed=0)
    assert int(trained(found).argmax(1)) != int(labels[one])
    for none in (images[:0], images):
        same = autoattack_linf(trained, none, labels[: len(none)], 0.0, seed=0)
        assert torch.equal(same, none)
    # Several batches cover every image, the last one alone in its own.
    how = AutoAttackSettings(batch_size=len(images) - 1)
    found = autoattack_linf(trained, images, labels, 0.5, seed=0, settings=how)
    assert not bool((trained(found).argmax(1) == labels).any())


@pytest.mark.usefixtures("shortened")
def test_images_in_double_precision_stay_so(trained, mixed):
    images, labels = mixed[0].double() * 0.999, mixed[1]
    net = Wrapped(lambda x: trained(x.float()))
    found = autoattack_linf(net, images, labels, 0.1, seed=0)
    assert found.dtype == torch.float64
    held = trained(found.float()).argmax(1) == labels
    assert bool(held.any()) and torch.equal(found[held], images[held])


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("classes", [4, 7])
def test_fewer_than_ten_classes_have_fewer_targets(classes, trained, mixed):
    images, labels = mixed[0], mixed[1] % classes
    found = autoattack_linf(
        lambda x: torch.tanh(x.flatten(1)[:, : 9 * classes].unflatten(1, (classes, 9)).sum(2)),
        images,
        labels,
        1.0,
        seed=0,
    )
    assert found.shape == images.shape
    assert bool((found != images).any())


def test_a_missing_package_is_one_clear_line(trained, mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    message = r"needs the authors' package pyautoattack.*epdistill\[autoattack\]"
    for attack in (autoattack_linf, autoattack_l2):
        with pytest.raises(EvaluationError, match=message) as caught:
            attack(trained, *mixed, 0.1, seed=0)
        assert "\n" not in str(caught.value)


def test_what_it_cannot_attack_is_one_clear_line(trained, mixed):
    images, labels = mixed
    cases = [
        (lambda x: x.flatten(1)[:, :3], images, labels % 3, "has 3 classes; expected at least 4"),
        (lambda x: trained(x).detach(), images, labels, "no gradient"),
        (lambda x: trained(x) * float("nan"), images, labels, "NaN or infinite logits"),
        (lambda x: x.flatten(1)[:, :5], images, labels, r"labels 0..9 for a model with 5 classes"),
    ]
    for model, some, their_labels, message in cases:
        with pytest.raises(EvaluationError, match=message) as caught:
            autoattack_linf(model, some, their_labels, 0.1, seed=0)
        assert "\n" not in str(caught.value)
    with pytest.raises(EvaluationError, match="received eps"):
        autoattack_l2(trained, images, labels, -1.0, seed=0)
    with pytest.raises(EvaluationError, match="batch_size >= 1"):
        AutoAttackSettings(batch_size=0)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((14, 14), False), ((4, 4), False), ((8, 8), True), ((32, 32), True), ((15, 30), True)],
)
def test_shapes_that_its_square_cannot_take_are_refused(shape, fits, shortened):
    images, labels = torch.rand(2, 1, *shape), torch.zeros(2, dtype=torch.int64)

    def sure(x: Tensor) -> Tensor:
        score = x.flatten(1)[:, :5]
        return score + torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0])

    if fits:
        assert torch.equal(autoattack_l2(sure, images, labels, 0.5, seed=0), images)
        return
    with pytest.raises(EvaluationError, match="cannot take that shape in L2"):
        autoattack_l2(sure, images, labels, 0.5, seed=0)
    square = pyautoattack.square.SquareAttack(sure, norm="L2", eps=0.5, n_queries=2, seed=0)
    with torch.random.fork_rng(devices=[]), pytest.raises((RuntimeError, ZeroDivisionError)):
        square.perturb(images, labels)
