"""The attacks that look for the nearest image: right distances, true margins, no side effects."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    CWSettings,
    DeepFoolSettings,
    HopSkipJumpSettings,
    carlini_wagner,
    counted,
    deepfool,
    hop_skip_jump,
)
from epdistill.robustness.attacks.common import lead_of_label

QUICK = CWSettings(steps=60, lr=0.05, binary_search_steps=4)
ATTACKS = [
    pytest.param(carlini_wagner, QUICK, id="carlini-wagner"),
    pytest.param(deepfool, DeepFoolSettings(), id="deepfool"),
    pytest.param(hop_skip_jump, HopSkipJumpSettings(400), id="hop-skip-jump-l2"),
    pytest.param(hop_skip_jump, HopSkipJumpSettings(400, "linf"), id="hop-skip-jump-linf"),
]
GRADIENTS = ATTACKS[:2]


def reach(images: Tensor, found: Tensor) -> Tensor:
    """Euclidean distances, (N,)."""
    return (found.double() - images.double()).flatten(1).norm(dim=1)


def errs(net, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images).argmax(1) != labels


@pytest.fixture(scope="module")
def few(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """24 digits that the net gets right."""
    return batch[0][:24], batch[1][:24]


@pytest.mark.parametrize(("attack", "how"), ATTACKS)
@given(seed=st.integers(0, 2**31), channels=st.sampled_from([1, 3]), width=st.integers(4, 9))
@settings(max_examples=8, deadline=None)
def test_what_comes_back_is_a_broken_image_or_the_original(attack, how, seed, channels, width):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, channels, 6, width, generator=generator)
    images[0], images[1] = 0.0, 1.0  # the corners of the box
    labels = torch.randint(4, (5,), generator=generator)
    weights = torch.randn(channels * 6 * width, 4, generator=generator)

    def model(x: Tensor) -> Tensor:
        return torch.tanh((x.flatten(1) - 0.5) @ weights)

    found = attack(model, images, labels, seed=seed, settings=how)
    assert found.shape == images.shape and found.dtype == images.dtype
    assert not found.requires_grad and bool(torch.isfinite(found).all())
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    changed = reach(images, found) > 0
    assert bool(errs(model, found, labels)[changed].all())
    assert not bool(changed[errs(model, images, labels)].any())


@pytest.mark.parametrize(("attack", "how"), ATTACKS)
def test_nothing_else_is_touched(attack, how, trained, few):
    images, labels = few
    before = images.clone()
    trained.train()
    trained[1].eval()  # frozen BatchNorm inside a training model
    trained[0].weight.grad = torch.full_like(trained[0].weight, 3.0)
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    torch_rng, python_rng = torch.get_rng_state(), random.getstate()
    try:
        attack(trained, images, labels, seed=1, settings=how)
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
    assert torch.equal(images, before) and images.grad is None


@pytest.mark.parametrize(("attack", "how"), ATTACKS)
def test_an_image_fares_alike_in_any_batch_and_order_of_calls(attack, how, trained, few):
    # In double precision, so that other sums in other batches decide nothing.
    images, labels = few[0][:12].double(), few[1][:12]
    net = copy.deepcopy(trained).double()
    index = torch.arange(100, 112)
    torch.manual_seed(1)
    whole = attack(net, images, labels, seed=5, settings=how, index=index)
    torch.manual_seed(2)
    assert torch.equal(whole, attack(net, images, labels, seed=5, settings=how, index=index))
    half = attack(net, images[8:], labels[8:], seed=5, settings=how, index=index[8:])
    assert torch.allclose(whole[8:], half, atol=1e-9)
    if attack is hop_skip_jump:
        other = attack(net, images, labels, seed=6, settings=how, index=index)
        assert not torch.allclose(whole, other, atol=1e-3)


@pytest.mark.parametrize(
    ("attack", "how", "slack"),
    [
        (carlini_wagner, CWSettings(steps=200), 0.03),
        (deepfool, DeepFoolSettings(), 0.03),  # its overshoot is 0.02
        (hop_skip_jump, HopSkipJumpSettings(4000), 0.15),
    ],
)
def test_the_distance_to_a_plane_is_found(attack, how, slack):
    # |score| / |w|, as long as the nearest point lies inside the box.
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(6, 1, 5, 5, generator=generator)
    w = torch.randn(25, generator=generator)

    def score(x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ w

    def model(x: Tensor) -> Tensor:
        return torch.stack([score(x), -score(x)], dim=1)

    labels = model(images).argmax(dim=1)
    exact = score(images).abs() / w.norm()
    found = attack(model, images, labels, seed=0, settings=how)
    assert bool(errs(model, found, labels).all())
    share = reach(images, found) / exact
    assert bool((share >= 1 - 1e-4).all()) and bool((share <= 1 + slack).all()), share


def test_hop_skip_jump_finds_the_linf_distance_to_a_plane():
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=generator)
    w = torch.randn(16, generator=generator)

    def model(x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ w
        return torch.stack([score, -score], dim=1)

    labels = model(images).argmax(dim=1)
    exact = (model(images)[:, 0].abs() / w.abs().sum()).double()
    how = HopSkipJumpSettings(4000, "linf")
    found = hop_skip_jump(model, images, labels, seed=0, settings=how)
    share = (found - images).flatten(1).abs().amax(dim=1).double() / exact
    assert bool((share >= 1 - 1e-4).all()) and bool((share <= 1.5).all()), share


def test_all_break_a_plain_model_and_the_gradient_comes_nearest(trained, batch):
    images, labels = batch
    found = {
        "cw": carlini_wagner(trained, images, labels, seed=0),
        "deepfool": deepfool(trained, images, labels, seed=0),
        "hard": hop_skip_jump(trained, images, labels, seed=0, settings=HopSkipJumpSettings(2000)),
    }
    assert all(bool(errs(trained, x, labels).all()) for x in found.values())
    far = {name: float(reach(images, x).median()) for name, x in found.items()}
    assert far["cw"] < far["deepfool"] < far["hard"] < 3 * far["cw"], far


@pytest.mark.parametrize(("attack", "how"), ATTACKS)
def test_what_cannot_be_broken_comes_back_as_it_was(attack, how, few):
    images, labels = few[0], torch.zeros_like(few[1])

    def sure(x: Tensor) -> Tensor:
        # The images reach it, but never by enough.
        return torch.stack([10 + x.mean((1, 2, 3)), x.mean((1, 2, 3))], dim=1)

    assert torch.equal(attack(sure, images, labels, seed=0, settings=how), images)


@pytest.mark.parametrize("shift", ["minus 20", "log-softmax"])
def test_carlini_wagner_reads_the_margin_of_negative_logits(shift, trained, few):
    images, labels = few

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = trained(x)
            return logits - 20 if shift == "minus 20" else logits.log_softmax(1)

    plain = carlini_wagner(trained, images, labels, seed=0, settings=QUICK)
    moved = carlini_wagner(Shifted(), images, labels, seed=0, settings=QUICK)
    assert bool(errs(trained, plain, labels).all() and errs(trained, moved, labels).all())
    assert torch.allclose(reach(images, plain), reach(images, moved), rtol=0.05)
    with torch.random.fork_rng(devices=[]):
        theirs = torchattacks.CW(Shifted().eval(), c=10, steps=100)(images, labels)
    assert not bool(errs(trained, theirs, labels).any())  # what is mended was broken


def test_carlini_wagner_moves_saturated_pixels():
    # Only four pixels count, and all of them lie on the box.
    images = torch.full((3, 1, 4, 4), 0.5)
    images[:, :, 0, :2], images[:, :, 0, 2:] = 0.0, 1.0
    labels = torch.zeros(3, dtype=torch.int64)

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = 1 - x[:, 0, 0, :2].sum(dim=1) - (1 - x[:, 0, 0, 2:]).sum(dim=1)
            return torch.stack([score, -score], dim=1)

    found = carlini_wagner(Corner(), images, labels, seed=0)
    assert bool(errs(Corner(), found, labels).all())
    # The nearest point has a quarter in each of the four: at distance one half.
    assert reach(images, found).tolist() == pytest.approx([0.5] * 3, rel=0.02)
    theirs = torchattacks.CW(Corner().eval(), c=10, steps=100)(images, labels)
    assert torch.equal(theirs[:, :, 0], images[:, :, 0])  # what is mended was broken


def test_carlini_wagner_keeps_its_confidence(trained, few):
    images, labels = few
    how = CWSettings(kappa=2.0, steps=100, lr=0.03, binary_search_steps=4)
    found = carlini_wagner(trained, images, labels, seed=0, settings=how)
    with torch.no_grad():
        lead = lead_of_label(trained(found), labels)
    changed = reach(images, found) > 0
    assert int(changed.sum()) >= 20 and bool((lead[changed] <= -2.0).all())


def test_carlini_wagner_searches_for_c(trained, few):
    images, labels = few
    # Too small a weight breaks nothing, too large a one goes too far.
    fixed = [
        carlini_wagner(trained, images, labels, seed=0, settings=CWSettings(c, 0, 100, 0.02, 0))
        for c in (1e-4, 100.0)
    ]
    assert not bool(errs(trained, fixed[0], labels).any())
    for first in (1e-4, 100.0):
        how = CWSettings(first, 0, 100, 0.02, 9)
        found = carlini_wagner(trained, images, labels, seed=0, settings=how)
        assert bool(errs(trained, found, labels).all())
        assert float(reach(images, found).mean()) < 0.95 * float(reach(images, fixed[1]).mean())


def test_deepfool_overshoots_once(trained, batch):
    images, labels = batch
    found = deepfool(trained, images, labels, seed=0)
    with torch.random.fork_rng(devices=[]):
        theirs = torchattacks.DeepFool(trained)(images, labels)
    trained.zero_grad(set_to_none=True)
    assert bool(errs(trained, found, labels).all())
    assert float(reach(images, found).mean()) < 1.005 * float(reach(images, theirs).mean())


def test_deepfool_passes_over_a_class_without_a_slope(few):
    images, labels = few[0], torch.zeros_like(few[1])

    def model(x: Tensor) -> Tensor:
        score = x.flatten(1).mean(dim=1)
        # The class in the middle leads every other one, but for the label, and is constant.
        return torch.stack([1 - score, 0.1 + 0 * score, score], dim=1)

    found = deepfool(model, images, labels, seed=0)
    assert bool(errs(model, found, labels).all())


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("queries", [1, 30, 700])
def test_hop_skip_jump_reads_classes_and_keeps_to_its_budget(norm, queries, trained, few):
    images, labels = few

    def hard(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return nn.functional.one_hot(trained(x).argmax(1), 10).float()

    how = HopSkipJumpSettings(queries, norm)
    for row in range(3):
        model = counted(hard)
        part = images[row : row + 1], labels[row : row + 1]
        one = hop_skip_jump(model, *part, seed=0, settings=how, index=torch.tensor([row]))
        assert model.queries <= queries
    model = counted(hard)
    found = hop_skip_jump(model, images, labels, seed=0, settings=how)
    assert model.queries <= queries * len(images)
    assert torch.equal(found[2:3], one)
    # From the classes alone the same images are found as from the logits.
    assert torch.equal(found, hop_skip_jump(trained, images, labels, seed=0, settings=how))
    if queries == 700:
        assert bool(errs(trained, found, labels).all())
        assert model.queries > 600 * len(images)


def test_more_queries_bring_hop_skip_jump_nearer(trained, few):
    images, labels = few
    far = [
        float(
            reach(
                images,
                hop_skip_jump(
                    trained, images, labels, seed=0, settings=HopSkipJumpSettings(queries)
                ),
            ).mean()
        )
        for queries in (200, 1000, 4000)
    ]
    assert far[0] > 1.2 * far[1] and far[1] > 1.03 * far[2], far


@pytest.mark.parametrize(("attack", "how"), ATTACKS)
def test_bad_models_images_and_labels_are_one_clear_line(attack, how, trained, few):
    images, labels = few
    cases = [
        (lambda x: x.flatten(1)[:, :10] * float("nan"), images, labels, "NaN or infinite logits"),
        (lambda x: x.flatten(1)[:, :4], images, labels, r"labels 0..9 for a model with 4 classes"),
        (trained, images * 255, labels, "pixels in 0..255"),
        (trained, images, labels[:3], "one class number per image"),
    ]
    for model, bad_images, bad_labels, message in cases:
        with pytest.raises(EvaluationError, match=message) as caught:
            attack(model, bad_images, bad_labels, seed=0, settings=how)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("attack", "how"), GRADIENTS)
def test_a_model_without_gradients_is_not_called_robust(attack, how, trained, few):
    free = torch.zeros(10, requires_grad=True)
    for model in (lambda x: trained(x).detach(), lambda x: trained(x.detach()) + free):
        with pytest.raises(EvaluationError, match="no gradient"):
            attack(model, *few, seed=0, settings=how)


@pytest.mark.parametrize(("attack", "how"), ATTACKS)
def test_no_images_are_no_images(attack, how, trained, few):
    found = attack(trained, few[0][:0], few[1][:0], seed=0, settings=how)
    assert found.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CWSettings(c=0.0),
        lambda: CWSettings(kappa=-1.0),
        lambda: CWSettings(lr=float("nan")),
        lambda: CWSettings(steps=0),
        lambda: CWSettings(binary_search_steps=-1),
        lambda: DeepFoolSettings(steps=0),
        lambda: DeepFoolSettings(overshoot=-0.1),
        lambda: DeepFoolSettings(classes=1),
        lambda: HopSkipJumpSettings(queries=0),
        lambda: HopSkipJumpSettings(norm="l1"),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(EvaluationError, match="expected"):
        make()
