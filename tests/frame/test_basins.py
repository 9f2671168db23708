"""The uncertainty exponent on maps whose basins are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.basins import (
    BasinSettings,
    Uncertainty,
    fit_power_law,
    uncertainty_exponent,
)
from epdistill.robustness.pictures import uncertainty_plot

# Four powers of three, so that the Cantor set's own steps even out.
CANTOR = BasinSettings(
    eps=tuple(3.0 ** (-9 + 0.5 * k) for k in range(13)), samples=4, tolerance=1e-3
)


def cantor_basins(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two states, by the parity of the step at which the middle-thirds construction drops x.

    The common boundary of both basins is the Cantor set, of dimension ln 2 / ln 3.
    """
    place = x.flatten(1)[:, 0].double()
    step = torch.zeros(len(place), dtype=torch.int64)
    alive = torch.ones_like(step, dtype=torch.bool)
    for _ in range(20):
        step += alive
        third = (3 * place).floor().clamp(0, 2)
        alive &= third != 1
        place = 3 * place - third
    basin = step % 2
    return basin, basin.double().unsqueeze(1)


def line(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 1, 1, generator=generator, dtype=torch.float64)


def test_a_fractal_boundary_has_its_dimension():
    found = uncertainty_exponent(cantor_basins, line(2000), seed=0, settings=CANTOR)
    expected = 1 - math.log(2) / math.log(3)
    for law in (found.states, found.labels):
        assert law.alpha == pytest.approx(expected, abs=0.05)
        low, high = law.ci95
        assert low < expected < high
        assert high - low < 0.15


def test_a_smooth_boundary_has_exponent_one():
    def inside(x: Tensor) -> tuple[Tensor, Tensor]:
        basin = ((x - 0.5).flatten(1).norm(dim=1) < 0.3).long()
        return basin, basin.double().unsqueeze(1)

    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2000, 1, 1, 2, generator=generator, dtype=torch.float64)
    settings = BasinSettings(eps=tuple(2.0**-k for k in range(9, 3, -1)))
    found = uncertainty_exponent(inside, images, seed=0, settings=settings)
    assert found.states.alpha == pytest.approx(1.0, abs=0.1)
    assert found.states.ci95[0] < 1 < found.states.ci95[1]


def drifting(x: Tensor) -> tuple[Tensor, Tensor]:
    """A state that follows its image as steeply as a tame net's, and never jumps."""
    place = x.flatten(1)[:, :1].double()
    return (place[:, 0] > 0.5).long(), 50 * place


def test_a_drift_is_no_other_fixed_point_but_may_be_another_label():
    found = uncertainty_exponent(drifting, line(1000), seed=0)
    assert found.states.changed.sum() == 0
    assert found.states.alpha is None
    assert "no exponent" in found.states.note
    assert found.labels.alpha == pytest.approx(1.0, abs=0.15)
    assert found.labels.note == ""


def test_a_jump_on_top_of_a_drift_is_found():
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        labels, states = drifting(x)
        return labels, states + 0.3 * labels.unsqueeze(1)

    found = uncertainty_exponent(both, line(300), seed=0)
    # The step of 0.3 is where the label changes, and nowhere else.
    assert (found.states.changed == found.labels.changed).all()
    assert found.states.changed.sum() > 0


def test_a_step_within_the_error_of_settling_is_no_jump():
    def jitter(x: Tensor) -> tuple[Tensor, Tensor]:
        labels, _ = drifting(x)
        return labels, 0.009 * labels.double().unsqueeze(1)

    for tolerance, jumps in ((1e-4, False), (5e-5, True)):
        settings = BasinSettings(tolerance=tolerance)
        found = uncertainty_exponent(jitter, line(300), seed=0, settings=settings)
        assert bool(found.states.changed.sum() > 0) == jumps


def test_too_few_changes_are_said_and_not_fitted():
    changed = np.zeros((6, 50), np.int64)
    changed[5, :20] = 1
    law = fit_power_law(np.geomspace(1e-4, 1e-1, 6), changed, 4, seed=0)
    assert law.alpha is None
    assert law.intercept is None
    assert law.ci95 is None
    assert "of 6 sizes only 1" in law.note
    assert "more images" in law.note


def test_one_image_alone_carries_no_exponent():
    changed = np.zeros((4, 50), np.int64)
    changed[:, 0] = [10, 20, 40, 80]
    assert fit_power_law(np.geomspace(1e-4, 1e-1, 4), changed, 100, seed=0).alpha is None


def test_a_share_that_has_levelled_off_is_left_out():
    eps = np.geomspace(1e-4, 1e-1, 7)
    counts = [10, 32, 100, 316, 700, 710, 720]
    changed = np.array([[count // 10] * 10 for count in counts])
    law = fit_power_law(eps, changed, 100, seed=0)
    assert law.fitted == tuple(eps[:4])
    assert law.alpha == pytest.approx(1.0, abs=0.02)
    assert math.exp(law.intercept) * eps[2] == pytest.approx(0.1, rel=0.05)


def test_the_interval_is_over_images_not_over_perturbations():
    eps = np.geomspace(1e-3, 1e-1, 5)
    counts = np.array([2, 4, 8, 16, 32])
    alike = np.repeat(counts[:, None], 20, axis=1)
    # The same totals, carried by images that disagree about the slope.
    steep = np.array([0, 1, 4, 16, 48])
    unlike = np.concatenate(
        [np.repeat(row[:, None], 10, axis=1) for row in (steep, 2 * counts - steep)], axis=1
    )
    assert (unlike.sum(axis=1) == alike.sum(axis=1)).all()
    widths = []
    for changed in (alike, unlike):
        law = fit_power_law(eps, changed, 100, seed=0)
        widths.append(law.ci95[1] - law.ci95[0])
    assert widths[0] < 1e-6 < 0.1 < widths[1]


def result(seed: int, batch_size: int = 256) -> Uncertainty:
    settings = BasinSettings(eps=CANTOR.eps, samples=2, tolerance=1e-3, batch_size=batch_size)
    return uncertainty_exponent(cantor_basins, line(200), seed=seed, settings=settings)


def test_same_seed_same_figures_whatever_the_batches():
    before = torch.random.get_rng_state()
    first = result(0).as_dict()
    assert result(0, batch_size=7).as_dict() == first
    assert result(1).as_dict() != first
    assert bool((torch.random.get_rng_state() == before).all())


def test_the_result_can_be_drawn():
    told = result(0).as_dict()
    assert told["states"]["n"] == 400
    assert told["states"]["f"] == [count / 400 for count in told["states"]["changed"]]
    uncertainty_plot({"states": told["states"], "labels": told["labels"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": (1e-2, 1e-3)}, "increasing"),
        ({"eps": (1e-7, 1e-2)}, "above 1e-06"),
        ({"eps": (0.1, 2.0)}, "at most 1"),
        ({"samples": 0}, "samples = 0"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
    ],
)
def test_settings_that_measure_nothing_are_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        BasinSettings(**change)


def test_empty_eps_and_images_are_refused():
    with pytest.raises(EvaluationError, match="at least one"):
        uncertainty_exponent(drifting, line(0), seed=0)
    with pytest.raises(EvaluationError, match="expected"):
        BasinSettings(eps=())
