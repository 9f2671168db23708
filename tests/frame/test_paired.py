"""Means over seeds and paired differences, against figures worked out by hand."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from epdistill.errors import EvaluationError
from epdistill.robustness.intervals import wilson
from epdistill.robustness.paired import (
    over_seeds,
    paired_difference,
    share_of,
    worst_cases,
)

HEAD = "example,model,attack,view,norm,eps,success,queries,perturbation_norm,attacked\n"


def answers(text: str, mark: int | None = None) -> dict[tuple[int | None, int], bool]:
    """`"1101"`: images 0, 1 and 3 are answered rightly."""
    return {(mark, number): sign == "1" for number, sign in enumerate(text)}


def test_worst_cases_are_unions_over_attacks_and_smaller_radii(tmp_path: Path):
    rows = [
        *(f"{image},a,clean,,,0.0,{int(image == 9)},1,0,1" for image in (4, 7, 8, 9)),
        "4,a,pgd,x,linf,0.2,1,1,0,1",
        "7,a,pgd,x,linf,0.2,0,1,0,1",
        "7,a,square,,linf,0.1,1,1,0,1",
        "8,a,transfer,b,linf,0.4,1,1,0,1",
        "8,a,pgd,x,l2,1.0,1,1,0,1",
        "4,a,corruption,fog/3,,,1,1,,1",
        "4,a,published-pgd,,l2,0.5,1,1,0,1",
        "4,a,adaptive-carlini-wagner,c=1,l2,0.5,1,1,0,1",
        "4,b,clean,,,0.0,1,1,0,1",
    ]
    (tmp_path / "results.csv").write_text(HEAD + "\n".join(rows) + "\n")
    found = worst_cases(tmp_path, "a")
    right = {case: {image for image, good in some.items() if good} for case, some in found.items()}
    assert right == {
        ("clean", 0.0): {4, 7, 8},
        ("linf", 0.1): {4, 8},
        ("linf", 0.2): {8},
        ("linf", 0.4): set(),
        ("l2", 1.0): {4, 7},
    }
    assert next(iter(found)) == ("clean", 0.0)
    with pytest.raises(EvaluationError, match="says nothing of c"):
        worst_cases(tmp_path, "c")
    with pytest.raises(EvaluationError, match="cannot be read"):
        worst_cases(tmp_path / "nowhere", "a")


def test_seeds_on_the_same_images_are_no_more_images():
    found = over_seeds([answers("1110"), answers("1000"), answers("1100")])
    assert found["accuracy"] == pytest.approx((3 / 4 + 1 / 4 + 2 / 4) / 3)
    assert (found["n"], found["seeds"]) == (4, 3)
    assert found["ci95"] == list(wilson(2, 4))
    assert (found["low"], found["high"]) == (1 / 4, 3 / 4)
    assert found["std"] == pytest.approx(1 / 4)  # sqrt((1/16 + 1/16 + 0) / 2)
    others = over_seeds([answers("1110", 0), answers("1000", 1)])
    assert (others["n"], others["ci95"]) == (8, list(wilson(4, 8)))
    one = over_seeds([answers("1110")])
    assert one["std"] is None
    assert {key: one[key] for key in ("accuracy", "ci95", "n")} == share_of(answers("1110"))


def test_a_difference_by_hand():
    # Three images are the first's alone, one is the second's alone, six are both's.
    found = paired_difference([answers("1110111111")], [answers("0001111111")])
    assert (found.difference, found.n, found.wins, found.losses) == (pytest.approx(0.2), 10, 3, 1)
    assert found.by_seed == (pytest.approx(0.2),)
    half = 1.959963984540054 * sqrt(4 + 1 - 2 * 2 / 12) / 12
    assert found.ci95 == pytest.approx((2 / 12 - half, 2 / 12 + half))


def test_an_image_of_several_seeds_counts_once():
    first, second = [answers("10"), answers("11")], [answers("00"), answers("00")]
    found = paired_difference(first, second)
    # Image 0 differs by 1 on both seeds, image 1 by 0 and 1.
    assert (found.difference, found.n) == (0.75, 2)
    assert (found.wins, found.losses, found.by_seed) == (3, 0, (0.5, 1.0))
    half = 1.959963984540054 * sqrt(1 + 0.25 + 1 - 1.5**2 / 4) / 4
    assert found.ci95 == pytest.approx((max(-1, 1.5 / 4 - half), min(1, 1.5 / 4 + half)))


def test_the_interval_never_shrinks_to_a_point():
    same = [answers("1" * 50 + "0" * 50)]
    low, high = paired_difference(same, same).ci95
    assert low < 0 < high


def test_the_interval_agrees_with_a_bootstrap_over_images():
    generator = np.random.default_rng(0)
    n = 400
    first = [generator.random(n) < 0.7 for _ in range(3)]
    second = [one & (generator.random(n) < 0.9) for one in first]
    rows = [[dict(enumerate(map(bool, one))) for one in some] for some in (first, second)]
    found = paired_difference(*rows)
    gaps = np.mean([a.astype(float) - b for a, b in zip(first, second, strict=True)], axis=0)
    means = gaps[generator.integers(0, n, (4000, n))].mean(axis=1)
    assert found.difference == pytest.approx(gaps.mean())
    assert found.ci95 == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.004)


def test_other_images_are_not_compared():
    with pytest.raises(EvaluationError, match="different images"):
        paired_difference([answers("11", 0)], [answers("11", 1)])
    with pytest.raises(EvaluationError, match="different images"):
        paired_difference([answers("11")], [answers("11"), answers("11")])
