"""The attacks: inside the ball, without side effects, and as strong as they claim."""

from __future__ import annotations

import random

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    PGDSettings,
    SquareSettings,
    pgd_l2,
    pgd_linf,
    square_linf,
)
from epdistill.robustness.guards import (
    check_adversarial,
    check_logits,
    derive_seed,
    distances,
    evaluation_mode,
)
from epdistill.robustness.mended import LocalSquare, margin_of_cross_entropy

ATTACKS = [
    pytest.param(pgd_linf, "linf", PGDSettings(steps=8), id="pgd-linf"),
    pytest.param(pgd_l2, "l2", PGDSettings(steps=8), id="pgd-l2"),
    pytest.param(square_linf, "linf", SquareSettings(queries=40), id="square-linf"),
]


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    return images, torch.tensor(data.target, dtype=torch.int64)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small convnet with BatchNorm and Dropout, over 85 % on digits it has not seen."""
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 10),
        )
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(net(images[:500]), labels[:500]).backward()
            optimiser.step()
        optimiser.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def batch(trained: nn.Module) -> tuple[Tensor, Tensor]:
    """64 unseen digits that the net gets right."""
    images, labels = (part[1000:] for part in digits())
    right = trained(images).argmax(1) == labels
    return images[right][:64], labels[right][:64]


def accuracy(net, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize(("attack", "norm", "how"), ATTACKS)
@given(
    eps=st.floats(1e-6, 1e-2) | st.floats(1e-2, 1.5),
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([1, 3]),
    height=st.integers(8, 12),
    width=st.integers(8, 20),
)
@settings(max_examples=25, deadline=None)
def test_every_image_is_inside_the_ball_and_the_box(
    attack, norm, how, eps, seed, channels, height, width
):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, channels, height, width, generator=generator)
    images[0], images[1] = 0.0, 1.0  # the corners of the box
    labels = torch.randint(4, (5,), generator=generator)
    weights = torch.randn(channels * height * width, 4, generator=generator)

    def model(x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ weights)

    found = attack(model, images, labels, eps, seed=seed, settings=how)
    assert found.shape == images.shape and found.dtype == images.dtype
    assert not found.requires_grad and bool(torch.isfinite(found).all())
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    reach = (found.double() - images.double()).flatten(1)
    if norm == "linf":
        assert float(reach.abs().max()) <= eps + 1e-6
    else:
        assert float(reach.norm(dim=1).max()) <= eps * (1 + 1e-5)


@pytest.mark.parametrize(("attack", "norm", "how"), ATTACKS)
def test_nothing_else_is_touched(attack, norm, how, trained, batch):
    images, labels = batch
    before_images = images.clone()
    trained.train()
    trained[1].eval()  # frozen BatchNorm inside a training model
    trained[0].weight.grad = torch.full_like(trained[0].weight, 3.0)
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    torch_rng, python_rng = torch.get_rng_state(), random.getstate()
    try:
        attack(trained, images, labels, 0.1, seed=1, settings=how)
        modes = [part.training for part in trained]
        assert trained.training and modes == [True, False, True, True, True, True]
        assert bool((trained[0].weight.grad == 3.0).all())
        others = [p for name, p in trained.named_parameters() if name != "0.weight"]
        assert all(p.grad is None and p.requires_grad for p in others)
    finally:
        trained[0].weight.grad = None
        trained.eval()
    assert torch.equal(torch.get_rng_state(), torch_rng)
    assert random.getstate() == python_rng
    assert all(torch.equal(value, weights[name]) for name, value in trained.state_dict().items())
    assert torch.equal(images, before_images) and images.grad is None


def test_modes_come_back_after_an_error():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()).train()
    net[0].eval()
    with pytest.raises(EvaluationError), evaluation_mode([net]):
        assert not any(part.training for part in net.modules())
        check_adversarial(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), "linf", 0.5)
    assert [part.training for part in net.modules()] == [True, False, True]


@pytest.mark.parametrize(("attack", "norm", "how"), ATTACKS)
def test_result_depends_on_the_seed_alone(attack, norm, how, trained, batch):
    images, labels = batch
    torch.manual_seed(1)
    first = attack(trained, images, labels, 0.05, seed=7, settings=how)
    torch.manual_seed(2)
    assert torch.equal(first, attack(trained, images, labels, 0.05, seed=7, settings=how))
    assert not torch.equal(first, attack(trained, images, labels, 0.05, seed=8, settings=how))


def test_random_numbers_of_an_image_do_not_depend_on_its_batch():
    images, labels = (part[:6] for part in digits())
    index = torch.tensor([4, 9, 2, 11, 30, 5])
    # With a constant gradient the result is the start plus known steps.
    slope = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    how = PGDSettings(steps=1, relative_step=0.1)

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ slope

    whole = pgd_linf(model, images, labels, 0.2, seed=3, settings=how, index=index)
    half = pgd_linf(model, images[3:], labels[3:], 0.2, seed=3, settings=how, index=index[3:])
    assert torch.allclose(whole[3:], half, atol=1e-6)
    other = pgd_linf(model, images[3:], labels[3:], 0.2, seed=3, settings=how)
    assert not torch.allclose(whole[3:], other, atol=1e-3)


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


def test_pgd_reaches_the_optimum_of_a_linear_two_class_model():
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
    found = pgd_linf(model, images, labels, 0.1, seed=0)
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


class _Scaled(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.net(x)


def test_margin_is_the_logit_of_the_cross_entropy():
    logits = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 5
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(F.softplus(margin_of_cross_entropy(logits, labels)), expected)


@pytest.mark.parametrize(("attack", "norm", "how"), ATTACKS)
def test_radius_zero_returns_the_images(attack, norm, how, trained, batch):
    images, labels = batch
    found = attack(trained, images, labels, 0.0, seed=0, settings=how)
    assert torch.equal(found, images) and found.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(("attack", "norm", "how"), ATTACKS)
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_impossible_radii_are_refused(attack, norm, how, eps, trained, batch):
    with pytest.raises(EvaluationError, match=r"received eps = .*; expected"):
        attack(trained, *batch, eps, seed=0, settings=how)


@pytest.mark.parametrize(("attack", "norm", "how"), ATTACKS)
def test_logits_that_cannot_be_judged_are_one_clear_line(attack, norm, how, batch):
    images, labels = batch
    cases = {
        "NaN or infinite logits for 64 of 64": lambda x: x.flatten(1)[:, :10] * float("nan"),
        r"returned \(64,\)": lambda x: x.flatten(1).sum(1),
        r"labels 0..9 for a model with 4 classes": lambda x: x.flatten(1)[:, :4],
        "1 class": lambda x: x.flatten(1)[:, :1],
    }
    for message, model in cases.items():
        with pytest.raises(EvaluationError, match=message) as caught:
            attack(model, images, labels, 0.1, seed=0, settings=how)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2])
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


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2])
def test_pgd_works_inside_no_grad_and_inference_mode(attack, trained, batch):
    images, labels = batch
    plain = attack(trained, images, labels, 0.1, seed=0)
    with torch.no_grad():
        assert torch.equal(plain, attack(trained, images, labels, 0.1, seed=0))
    with torch.inference_mode():
        assert torch.equal(plain, attack(trained, images.clone(), labels, 0.1, seed=0))


def test_bad_images_labels_and_indices_are_refused(trained, batch):
    images, labels = batch
    cases = [
        (images * 255, labels, "pixels in 0..255"),
        ((images * 255).byte(), labels, "divide 8-bit images by 255"),
        (images, labels[:3], "one class number per image"),
        (images + torch.nan, labels, "NaN or infinity"),
    ]
    for bad_images, bad_labels, message in cases:
        with pytest.raises(EvaluationError, match=message):
            pgd_linf(trained, bad_images, bad_labels, 0.1, seed=0)
    with pytest.raises(EvaluationError, match="one per image"):
        square_linf(trained, images, labels, 0.1, seed=0, index=torch.arange(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PGDSettings(steps=0),
        lambda: PGDSettings(restarts=0),
        lambda: PGDSettings(relative_step=0.0),
        lambda: SquareSettings(queries=0),
        lambda: SquareSettings(p_init=1.5),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(EvaluationError, match="expected"):
        make()


def test_square_needs_answers_only(trained, batch, capsys):
    images, labels = batch
    asked = 0

    def answers(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        assert not torch.is_grad_enabled()
        return torch.from_numpy(trained(x).numpy().copy())

    how = SquareSettings(queries=150)
    found = square_linf(answers, images, labels, 0.25, seed=0, settings=how)
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


def test_a_ball_that_is_broken_is_noticed():
    images = torch.full((2, 3, 8, 8), 0.5)
    cases = [
        (images + 0.1001, "linf", 0.1, "away from its original"),
        (images + 0.1, "l2", 1.0, "away from its original"),
        (images + 0.6, "linf", 1.0, "pixels in 1.1..1.1"),
        (images * torch.nan, "linf", 1.0, "NaN or infinity"),
        (images[:1], "linf", 1.0, "shape"),
    ]
    for adversarial, norm, eps, message in cases:
        with pytest.raises(EvaluationError, match=message):
            check_adversarial(images, adversarial, norm, eps)
    reach = check_adversarial(images, images + 0.1, "l2", 0.1 * 192**0.5)
    assert reach.tolist() == pytest.approx([0.1 * 192**0.5] * 2, rel=1e-5)
    with pytest.raises(EvaluationError, match="expected one of linf, l2"):
        distances(images, images, "l1")


def test_what_is_not_a_tensor_is_not_logits():
    with pytest.raises(EvaluationError, match="returned list"):
        check_logits([[1.0, 2.0]], 1)  # type: ignore[arg-type]


def test_derived_seeds_differ_by_use():
    seeds = {derive_seed(s, use, n) for s in range(5) for use in ("a", "b") for n in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
