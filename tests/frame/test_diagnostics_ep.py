"""The diagnosis and the basins of an EP-CNN: what one gradient hides, another shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.data import DataSet, load
from epdistill.recipes import load_recipe
from epdistill.robustness.basins import BasinSettings, uncertainty_exponent
from epdistill.robustness.diagnostics import Diagnosis, DiagnosticSettings, Finding, diagnose
from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, SKIP, WARN
from epdistill.robustness.diagnostics.equilibrium import prediction_sweeps
from epdistill.robustness.diagnostics.softened import SoftenedUnroll, soft_clip
from epdistill.robustness.subjects import Subject
from epdistill.teachers.model import EPCNN
from epdistill.teachers.teach import TeachTask, build_teacher, measure
from epdistill.training import fit
from epdistill.workflows.subjects import teacher_horizons

# One gradient as it is often reported, at a radius at which it matters.
EPS = 40 / 255
QUICK = DiagnosticSettings(
    images=48, grid=(EPS,), steps=10, starts=1, restarts=(1,), unbounded_steps=20,
    objective_steps=5, targets=1, square_queries=100, decision_images=2, decision_queries=100,
    noise_samples=40, smooth_points=4, fidelity_images=16, directions=8, horizon_steps=10,
    horizons=(2, 5, 29), longest_unroll=60, control_steps=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load("digits")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> EPCNN:
    """A small EP-CNN, taught for some seconds."""
    recipe = load_recipe("digits", {"teacher.channels": [8, 16]}, {})
    model = build_teacher(recipe, data)
    folder: Path = tmp_path_factory.mktemp("teacher")
    fit(
        TeachTask(model, recipe, data.validation, lambda _: None), data.train, folder, title="t",
        epochs=12, batch_size=64, augmentation=Augmentation(), seed=1, device=torch.device("cpu"),
    )  # fmt: skip
    assert measure(model, data.test).accuracy > 0.85
    return model.eval().requires_grad_(False)


def unseen(data: DataSet, n: int) -> Tensor:
    return data.test.images[:n].float() / 255


def examine(teacher: EPCNN, data: DataSet, **views: EPCNN) -> Diagnosis:
    subject = Subject("teacher", "teacher", teacher, views)
    return diagnose(subject, data.test.images, data.test.labels, settings=QUICK, seed=0)


def of(found: Diagnosis, number: int) -> Finding:
    return found.findings[number - 1]


@pytest.fixture(scope="module")
def long(teacher, data) -> Diagnosis:
    """The diagnosis of a teacher that was attacked through one long unroll."""
    return examine(teacher, data, long=teacher.with_gradient("unrolled-first", 30))


def test_a_long_unroll_that_hides_errors_is_caught(long):
    row = of(long, 24)
    assert row.status == FAIL
    assert "attack horizon (EP)" in long.verdict
    table = {part["name"]: part["accuracy"] for part in row.as_dict()["table"]}
    assert {"implicit", "unrolled-2", "unrolled-5", "unrolled-29", "worst case"} <= set(table)
    # The exact gradients agree with each other and are beaten by the short unroll.
    assert table["unrolled-29"] == pytest.approx(table["implicit"], abs=0.05)
    assert table["unrolled-2"] < table["implicit"] - 0.1
    assert table["worst case"] <= min(table.values())
    assert long.worst_correct / long.n < table["unrolled-29"] - 0.1
    for part in row.as_dict()["table"]:
        assert part["n"] == long.n
        assert part["ci95"][0] <= part["accuracy"] <= part["ci95"][1]


def test_saturation_is_what_hides_them(long):
    row = of(long, 26)
    assert row.status == FAIL
    assert 0.2 < row.value < 1


@pytest.mark.slow
def test_more_gradients_break_more_but_the_exact_ones_stay_misleading(teacher, data, long):
    views = {
        "implicit": teacher.with_gradient("implicit"),
        "short": teacher.with_gradient("unrolled-first", 2),
        "long": teacher.with_gradient("unrolled-first", 30),
    }
    found = examine(teacher, data, **views)
    assert found.reported_correct < long.reported_correct
    assert of(found, 24).status == FAIL
    assert of(found, 5).value > 0.9


def test_a_black_box_teacher_says_why_its_checks_do_not_apply(teacher, data):
    found = examine(teacher, data)
    assert [of(found, number).status for number in (24, 25, 26)] == [SKIP] * 3


def test_settled_teachers_settle_and_hasty_ones_do_not(teacher, data, long):
    assert of(long, 25).status in (PASS, WARN)
    assert "0 clean, 0 adversarial" in of(long, 25).detail
    hasty = teacher.with_schedule(teacher.schedule.with_(sweeps=4))
    row = of(examine(hasty, data, long=hasty.with_gradient("unrolled-first", 4)), 25)
    assert row.status in (WARN, FAIL)
    assert row.value > 1e-3


def test_prediction_sweeps_are_those_of_the_slowest_image(teacher, data):
    relaxed = teacher.relax(unseen(data, 16))
    assert prediction_sweeps(teacher, relaxed) == int(relaxed.certificate.sweeps.max())
    fixed = teacher.with_schedule(teacher.schedule.with_(tolerance=0.0, sweeps=7))
    assert prediction_sweeps(fixed, fixed.relax(unseen(data, 2))) == 7


@pytest.mark.parametrize("kind", ["red-black", "synchronous"])
def test_the_softened_unroll_answers_as_the_exact_one(kind, teacher, data):
    omega = 1.5 if kind == "red-black" else 1.0
    model = teacher.with_schedule(teacher.schedule.with_(kind=kind, omega=omega))
    images = unseen(data, 8).requires_grad_(True)
    exact, soft = model.with_gradient("unrolled-first", 6)(images), SoftenedUnroll(model, 6)(images)
    torch.testing.assert_close(soft, exact, rtol=1e-5, atol=1e-5)
    exact_slope, soft_slope = (
        torch.autograd.grad(logits.square().sum(), images)[0] for logits in (exact, soft)
    )
    assert not torch.allclose(exact_slope, soft_slope, rtol=1e-2)


def test_the_softened_clamp_has_a_slope_everywhere():
    x = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = soft_clip(x)
    assert y.tolist() == [0, 0, 0.5, 1, 1]
    (slope,) = torch.autograd.grad(y.sum(), x)
    expected = torch.tensor([-2.0, 0, 0, 0, -2], dtype=torch.float64).exp()
    torch.testing.assert_close(slope, expected)


BASINS = BasinSettings(eps=(1e-3, 1e-2, 1e-1), samples=2)


def test_a_teacher_has_basins_that_larger_perturbations_leave(teacher, data):
    settle = teacher_horizons(teacher).settle
    found = uncertainty_exponent(settle, unseen(data, 48), seed=0, settings=BASINS)
    left = found.states.changed.sum(axis=1)
    assert left[0] <= left[1] < left[2]
    assert left[2] > 10
    # A label changes less often than the state does.
    assert found.labels.changed.sum() < found.states.changed.sum()


def test_what_a_jump_is_hardly_depends_on_the_tolerance(teacher, data):
    counts = []
    for tolerance in (2e-5, 1e-4, 5e-4):
        settings = BasinSettings(eps=(0.1,), samples=2, tolerance=tolerance)
        settle = teacher_horizons(teacher).settle
        found = uncertainty_exponent(settle, unseen(data, 48), seed=0, settings=settings)
        counts.append(int(found.states.changed.sum()))
    assert counts[0] >= counts[1] >= counts[2] > 0.8 * counts[0]


def test_a_strictly_convex_energy_has_one_basin(teacher, data):
    weak = EPCNN(teacher.architecture, teacher.schedule)
    weak.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for layer in weak.layers[1:]:
            layer.weight.mul_(0.02)
    weak.eval().requires_grad_(False)
    settle = teacher_horizons(weak).settle
    found = uncertainty_exponent(settle, unseen(data, 16), seed=0, settings=BASINS)
    assert found.states.changed.sum() == 0
    # The states do move with their images, by far more than what counts as a jump.
    moved = settle(unseen(data, 16) * 0.9)[1] - settle(unseen(data, 16))[1]
    assert float(moved.abs().max()) > 0.01
