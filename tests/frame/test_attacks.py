"""The attacks: inside the ball, the same for the same seed, without side effects."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    APGDSettings,
    FGSMSettings,
    NoiseSettings,
    PGDSettings,
    SquareSettings,
    apgd_l2,
    apgd_linf,
    fgsm,
    noise_l2,
    noise_linf,
    pgd_l2,
    pgd_linf,
    square_l2,
    square_linf,
)
from epdistill.robustness.guards import (
    check_adversarial,
    check_logits,
    derive_seed,
    distances,
    evaluation_mode,
)

ATTACKS = [
    pytest.param(pgd_linf, "linf", PGDSettings(steps=8), id="pgd-linf"),
    pytest.param(pgd_l2, "l2", PGDSettings(steps=8), id="pgd-l2"),
    pytest.param(fgsm, "linf", FGSMSettings(), id="fgsm"),
    pytest.param(apgd_linf, "linf", APGDSettings(8, "ce", 2), id="apgd-linf"),
    pytest.param(apgd_l2, "l2", APGDSettings(8, "dlr"), id="apgd-l2"),
    pytest.param(square_linf, "linf", SquareSettings(queries=40), id="square-linf"),
    pytest.param(square_l2, "l2", SquareSettings(queries=40), id="square-l2"),
    pytest.param(noise_linf, "linf", NoiseSettings(20), id="noise-linf"),
    pytest.param(noise_l2, "l2", NoiseSettings(20), id="noise-l2"),
]
RANDOM = [case for case in ATTACKS if case.id != "fgsm"]


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
        assert float(reach.norm(dim=1).max()) <= eps + 1e-6


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


@pytest.mark.parametrize(("attack", "norm", "how"), RANDOM)
def test_result_depends_on_the_seed_alone(attack, norm, how, trained, batch):
    images, labels = batch
    torch.manual_seed(1)
    first = attack(trained, images, labels, 0.05, seed=7, settings=how)
    torch.manual_seed(2)
    assert torch.equal(first, attack(trained, images, labels, 0.05, seed=7, settings=how))
    assert not torch.equal(first, attack(trained, images, labels, 0.05, seed=8, settings=how))


def test_random_numbers_of_an_image_do_not_depend_on_its_batch(batch):
    images, labels = (part[:6] for part in batch)
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


@pytest.mark.parametrize(
    ("attack", "how"),
    [
        (pgd_l2, PGDSettings(5)),
        (apgd_linf, APGDSettings(10, "dlr", 2)),
        (square_l2, SquareSettings(80)),
        (noise_linf, NoiseSettings(20)),
        (noise_l2, NoiseSettings(20)),
    ],
)
def test_an_image_fares_alike_in_any_batch(attack, how, trained, batch):
    # In double precision, so that other sums in other batches decide nothing.
    images, labels = batch[0][:20].double(), batch[1][:20]
    net = copy.deepcopy(trained).double()
    index = torch.arange(100, 120)
    eps = 0.1 if "linf" in attack.__name__ else 0.6
    whole = attack(net, images, labels, eps, seed=5, settings=how, index=index)
    half = attack(net, images[8:], labels[8:], eps, seed=5, settings=how, index=index[8:])
    assert torch.allclose(whole[8:], half, atol=1e-9)
    other = attack(net, images[8:], labels[8:], eps, seed=5, settings=how)
    assert not torch.allclose(whole[8:], other, atol=1e-3)


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
        lambda: FGSMSettings(relative_step=1.1),
        lambda: NoiseSettings(samples=0),
        lambda: APGDSettings(steps=0),
        lambda: APGDSettings(restarts=0),
        lambda: APGDSettings(loss="cw"),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(EvaluationError, match="expected"):
        make()


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
