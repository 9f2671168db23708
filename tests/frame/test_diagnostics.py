"""The masking diagnosis: a clean net passes, and each known fault is caught by its check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness.diagnostics import (
    Diagnosis,
    DiagnosticSettings,
    Finding,
    GradientKiller,
    diagnose,
    plain_control,
)
from epdistill.robustness.diagnostics.catalogue import CATALOGUE, FAIL, PASS, SKIP, WARN
from epdistill.robustness.diagnostics.findings import CLEAN_VERDICT, grade
from epdistill.robustness.subjects import Subject, module_subject

QUICK = DiagnosticSettings(
    images=24, grid=(24 / 255,), steps=8, starts=2, restarts=(1,), unbounded_steps=40,
    objective_steps=8, targets=1, square_queries=150, decision_images=6, decision_queries=200,
    noise_samples=40, smooth_points=4, directions=8, control_steps=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = (torch.tensor(data.images) / 16).float()[:, None]
    return images, torch.tensor(data.target, dtype=torch.int64)


def train(net: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def net(digits) -> nn.Module:
    """A small convolutional ReLU net, trained on 1,000 digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        return train(plain, digits[0][:1000], digits[1][:1000])


def of(found: Diagnosis, number: int) -> Finding:
    return found.findings[number - 1]


Diagnose = Callable[..., Diagnosis]


@pytest.fixture(scope="module")
def examine(digits) -> Diagnose:
    """Diagnose a subject, or a module as an ordinary one, on unseen digits."""

    def run(subject: Subject | nn.Module, **more) -> Diagnosis:
        if not isinstance(subject, Subject):
            subject = module_subject("model", "student", subject)
        given = {"settings": QUICK, "seed": 0, **more}
        return diagnose(subject, digits[0][1000:], digits[1][1000:], **given)

    return run


@pytest.fixture(scope="module")
def clean(net, examine) -> Diagnosis:
    return examine(net, settings=DiagnosticSettings())


class Wrapped(nn.Module):
    """A net with something done to its images and its logits."""

    def __init__(
        self,
        net: nn.Module,
        after: Callable[[Tensor], Tensor] = lambda z: z,
        before: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.net, self.after, self.before = net, after, before

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def test_a_clean_net_breaks_and_passes(clean):
    assert clean.verdict == CLEAN_VERDICT
    assert not clean.masking
    assert clean.with_status(FAIL) == ()
    assert [row.check.number for row in clean.findings] == list(range(1, 27))
    assert {row.check.number for row in clean.with_status(SKIP)} == {20, 24, 25, 26}
    assert all(row.detail for row in clean.with_status(SKIP))
    assert clean.clean_correct >= 56
    assert clean.worst_correct <= clean.reported_correct <= clean.clean_correct / 2 + 10
    assert of(clean, 13).value == 0.0
    assert of(clean, 12).value == 0.0


def test_the_result_tells_all(clean):
    told = json.loads(json.dumps(clean.as_dict()))
    assert told["verdict"] == "no masking evidence found"
    assert "not proof" in told["text"]
    assert told["n"] == 64
    assert len(told["checks"]) == 26
    for row in told["checks"]:
        assert row["threshold"]
        assert row["status"] in ("PASS", "WARN", "FAIL", "not applicable")
        # Advice belongs to what was flagged, and to nothing else.
        assert (row["todo"] is not None) == (row["status"] in ("WARN", "FAIL"))
    worst = told["worst"]
    assert worst["accuracy"] == clean.worst_correct / 64
    assert worst["ci95"][0] <= worst["accuracy"] <= worst["ci95"][1]
    assert told["settings"]["steps"] == 40


@pytest.mark.parametrize("kind", ["rounded", "saturated"])
def test_killed_gradients_are_caught(kind, net, examine, digits):
    killed = GradientKiller(net, kind)
    images = digits[0][1000:1100]
    assert bool((killed(images).argmax(1) == net(images).argmax(1)).all())
    found = examine(killed)
    assert found.masking
    assert found.verdict.startswith("masking evidence: ")
    assert "gradients" in found.verdict
    assert of(found, 4).value == 1.0
    failed = {row.check.number for row in found.with_status(FAIL)}
    # Dead, and no ascent at any radius.
    assert {4, 5, 12, 13, 15} <= failed
    if kind == "rounded":
        assert 9 in failed
        assert found.worst_correct < found.reported_correct
    else:
        assert of(found, 2).value == "one-hot"
    # The instrument itself works.
    assert of(found, 23).status == PASS


def test_no_verdict_calls_anything_robust(clean, net, examine):
    for found in (clean, examine(GradientKiller(net))):
        assert "robust" not in found.verdict


class Backwards(torch.autograd.Function):
    """The identity, with a backward pass that points elsewhere."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


def test_a_gradient_that_misleads_is_caught(net, examine):
    found = examine(Wrapped(net, before=Backwards.apply))
    assert of(found, 4).status == PASS
    assert of(found, 5).status == FAIL
    assert of(found, 5).value < -0.9
    assert of(found, 9).status == FAIL
    assert of(found, 11).status != SKIP
    assert of(found, 12).status == FAIL


def test_a_gradient_that_is_not_a_number_is_caught(net, examine):
    def spoil(x: Tensor) -> Tensor:
        # Finite forwards, 0 / 0 backwards.
        return x + 0 * (x - x).abs().sqrt()

    found = examine(Wrapped(net, before=spoil))
    assert of(found, 4).status == FAIL
    assert found.masking


@pytest.mark.parametrize(
    ("after", "status", "value"),
    [
        (lambda z: z.softmax(1), FAIL, "probabilities"),
        (lambda z: z.log_softmax(1), WARN, "log-probabilities"),
        (torch.sigmoid, WARN, "bounded"),
        (lambda z: z.sign(), FAIL, "two values"),
    ],
)
def test_outputs_that_are_no_logits_are_seen(after, status, value, net, examine):
    row = of(examine(Wrapped(net, after)), 2)
    assert (row.status, row.value) == (status, value)


def test_outputs_that_are_all_negative_are_seen(net, examine):
    found = examine(Wrapped(net, lambda z: z - 100))
    assert of(found, 3).status == WARN
    assert of(found, 2).status == PASS


class Noisy(nn.Module):
    """A net whose images are noisy, also in evaluation mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.02 * torch.randn_like(x))


def test_randomness_fails_unless_it_is_declared(net, examine):
    state = torch.random.get_rng_state()
    hidden = examine(Noisy(net))
    assert of(hidden, 1).status == FAIL
    # A model with random answers of its own draws them from a generator of its own.
    assert bool((torch.random.get_rng_state() == state).all())
    few = replace(
        QUICK, images=6, steps=2, unbounded_steps=2, objective_steps=2, horizons=(1,),
        square_queries=5, decision_images=1, decision_queries=20, noise_samples=2, directions=2,
    )  # fmt: skip
    told = examine(module_subject("noisy", "wca", Noisy(net), stochastic=True), settings=few)
    assert of(told, 1).status == WARN
    assert "declared stochastic" in of(told, 1).detail
    assert of(told, 22).status == PASS


def test_autograd_in_a_forward_is_caught(net, examine):
    class Defended(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                (push,) = torch.autograd.grad(net(point).logsumexp(1).sum(), point)
            return net(x + 0.01 * push.sign())

    assert of(examine(Defended()), 6).status == FAIL


def test_too_few_classes_for_a_loss_are_told(net, digits):
    two = Wrapped(net, lambda z: z[:, :2])
    chosen = digits[1] < 2
    subject = module_subject("two", "student", two)
    found = diagnose(subject, digits[0][chosen], digits[1][chosen], settings=QUICK, seed=0)
    assert of(found, 7).status == WARN
    assert "DLR" in of(found, 7).detail


def test_an_attack_that_is_too_weak_is_caught(net, examine):
    lazy = DiagnosticSettings(images=48, eps=24 / 255, steps=1, starts=1)
    found = examine(net, settings=lazy)
    flagged = {row.check.number for row in (*found.with_status(FAIL), *found.with_status(WARN))}
    assert 14 in flagged
    assert found.worst_correct < found.reported_correct


def test_examples_of_a_rival_count(net, examine, digits):
    rival = module_subject("plain", "student", net)
    found = examine(GradientKiller(net), rivals=[rival])
    assert of(found, 20).status == FAIL
    assert "plain" in of(found, 20).detail
    assert of(examine(net, rivals=[rival]), 20).status == PASS


def test_a_rival_at_fault_is_no_evidence(net, examine):
    odd = module_subject("odd", "student", Wrapped(net, lambda z: z[:, :4]))
    row = of(examine(net, rivals=[odd]), 20)
    assert row.status == PASS
    assert "odd: not used" in row.detail


def test_a_quoted_accuracy_is_compared_with_the_worst_case(net, examine):
    at = replace(QUICK, eps=QUICK.grid[0])
    worst = examine(net).worst_correct / 24
    assert of(examine(net, claimed=worst, settings=at), 21).status == PASS
    assert of(examine(net, claimed=worst + 0.25, settings=at), 21).status == FAIL
    with pytest.raises(EvaluationError, match="claimed"):
        examine(net, claimed=0.5)


def test_modes_that_are_not_left_alone_are_caught(net, examine):
    class Restless(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                self.net.training = True
            return super().forward(x)

    row = of(examine(Restless(nn.Sequential(net))), 22)
    assert (row.status, row.value) == (FAIL, "modes changed")


def test_modes_and_gradients_are_left_alone(net, examine):
    frozen = nn.Sequential(net, nn.Dropout(0.5)).train()
    frozen[1].eval()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    examine(frozen)
    assert (frozen.training, frozen[1].training) == (True, False)
    assert all(parameter.grad is None for parameter in net.parameters())
    net.requires_grad_(False)


def test_a_black_box_is_diagnosed_as_far_as_it_goes(net, examine):
    rival = module_subject("plain", "student", net)
    found = examine(Subject("file.onnx", "onnx", lambda x: net(x)), rivals=[rival])
    skipped = {row.check.number for row in found.with_status(SKIP)}
    assert skipped == {3, 4, 5, *range(8, 18), 19, 21, 22, 23, 24, 25, 26}
    assert "no gradients" in of(found, 4).detail
    assert of(found, 20).value < found.clean_correct / found.n
    assert json.dumps(found.as_dict()["reported"]) == "null"


def test_an_instrument_that_misses_the_known_cases_says_so(net, examine, digits):
    row = of(examine(net, control=GradientKiller(net)), 23)
    assert row.status == FAIL
    assert "the plain net is not broken" in row.detail

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10] * 0

    assert of(examine(net, control=Constant()), 23).status == WARN


def test_the_plain_control_is_fitted_without_global_randomness(digits):
    images, labels = digits[0][:64], digits[1][:64]
    state = torch.random.get_rng_state()
    one, two = (plain_control(images, labels, 10, seed=1) for _ in range(2))
    assert bool((torch.random.get_rng_state() == state).all())
    assert bool((one(images) == two(images)).all())
    assert float((one(images).argmax(1) == labels).double().mean()) > 0.95
    with pytest.raises(EvaluationError, match="2 classes"):
        plain_control(images, labels, 5, seed=1)


def test_same_seed_same_diagnosis(net, examine):
    torch.manual_seed(1)
    first = examine(net).as_dict()
    torch.manual_seed(2)
    assert examine(net).as_dict() == first
    assert examine(net, seed=1).as_dict() != first


def test_progress_goes_through_every_check(net, examine):
    seen = []
    examine(net, progress=lambda what, done, total: seen.append((what, done, total)))
    assert [done for _, done, _ in seen] == list(range(27))
    assert {total for _, _, total in seen} == {26}
    assert seen[3][0] == "model: gradients"


@pytest.mark.parametrize(
    ("count", "n", "status"),
    [(0, 64, PASS), (5, 1000, PASS), (1, 64, WARN), (3, 64, WARN), (4, 64, FAIL), (1, 2, WARN)],
)
def test_what_a_difference_is_worth(count, n, status):
    assert grade(count, n, 0.05) == status


def test_every_check_says_what_to_do():
    assert len({check.name for check in CATALOGUE}) == 26
    assert all(check.remedy and check.threshold for check in CATALOGUE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images = 0"),
        ({"grid": (0.2, 0.1)}, "increasing"),
        ({"grid": (0.0, 0.1)}, "above 0"),
        ({"eps": 0.0}, "eps = 0"),
        ({"eps": -0.1}, "eps = -0.1"),
        ({"slack": 1.0}, "slack = 1.0"),
        ({"horizons": (0,)}, "horizons"),
    ],
)
def test_settings_that_measure_nothing_are_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        DiagnosticSettings(**change)


def test_images_and_models_that_cannot_be_judged_are_refused(net, digits):
    subject = module_subject("net", "student", net)
    with pytest.raises(EvaluationError, match="no images"):
        diagnose(subject, digits[0][:0], digits[1][:0], settings=QUICK, seed=0)
    with pytest.raises(EvaluationError, match="label"):
        diagnose(subject, digits[0][:4], digits[1][:4] + 20, settings=QUICK, seed=0)
    broken = module_subject("nan", "student", Wrapped(net, lambda z: z * float("nan")))
    with pytest.raises(EvaluationError, match="NaN"):
        diagnose(broken, digits[0][:4], digits[1][:4], settings=QUICK, seed=0)
