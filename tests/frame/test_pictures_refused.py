"""Pictures refuse what cannot be drawn honestly, each with one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from epdistill.errors import EvaluationError
from epdistill.robustness.pictures import (
    accuracy_curves,
    adversarial_grid,
    corruption_heat_map,
    sweep_curves,
    temporal_heat_map,
    transfer_matrix,
    uncertainty_plot,
)

ROW: dict[str, Any] = {"eps": 0.1, "accuracy": 0.5, "n": 10}
HIT: dict[str, Any] = {"corruption": "fog", "severity": 1, "accuracy": 0.5}
STEP: dict[str, Any] = {"sweeps": 5, "accuracy": 0.5, "n": 10}
DOUBT: dict[str, Any] = {"eps": [0.1, 0.2], "f": [0.1, 0.2]}
IMAGES = np.full((2, 1, 8, 8), 0.5)


def curve(**changed: Any) -> object:
    return accuracy_curves({"net": [{**ROW, **changed}]}, "linf")


def step(**changed: Any) -> object:
    return sweep_curves({"net": [{**STEP, **changed}]})


def hit(**changed: Any) -> object:
    return corruption_heat_map({"net": [{**HIT, **changed}]})


def doubt(**changed: Any) -> object:
    return uncertainty_plot({"net": {**DOUBT, **changed}})


def images(clean: Any = IMAGES, attacked: Any = IMAGES, **changed: Any) -> object:
    given: dict[str, Any] = {"labels": [1, 2], "predictions": {"net": [1, 2]}, **changed}
    return adversarial_grid(clean, adversarial={"net": attacked}, **given)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no model": (lambda: accuracy_curves({}, "linf"), "no accuracy curves"),
    "no rows": (lambda: accuracy_curves({"net": []}, "linf"), "received no rows"),
    "norm": (lambda: accuracy_curves({"net": [ROW]}, "l7"), "norm 'l7'"),
    "empty name": (lambda: accuracy_curves({" ": [ROW]}, "linf"), "the name ' '"),
    "two lines": (lambda: accuracy_curves({"a\nb": [ROW]}, "linf"), "one line of text"),
    "percent": (lambda: curve(accuracy=50), "divide percentages by 100"),
    "nan": (lambda: curve(accuracy=float("nan")), "accuracy = nan"),
    "negative eps": (lambda: curve(eps=-0.1), "none below 0"),
    "twice": (lambda: accuracy_curves({"net": [ROW, ROW]}, "linf"), "twice"),
    "n": (lambda: curve(n=0), "n = 0"),
    "no n": (lambda: curve(n=None), "without a number 'n'"),
    "no severity": (lambda: hit(severity=None), "without a number 'severity'"),
    "severity": (lambda: hit(severity=0.5), "whole number"),
    "corruption": (lambda: hit(corruption=None), "the name None among the corruptions"),
    "corruption twice": (lambda: corruption_heat_map({"net": [HIT, HIT]}), "severity 1 twice"),
    "no corruptions": (lambda: corruption_heat_map({"net": []}), "received no rows"),
    "sweeps twice": (lambda: sweep_curves({"net": [STEP, STEP]}), "sweeps = 5 twice"),
    "no sweeps": (lambda: sweep_curves({"net": []}), "received no rows"),
    "shape": (lambda: temporal_heat_map({"g": [[0.5]]}, [1, 2], [3]), r"expected \(2, 1\)"),
    "horizon": (lambda: temporal_heat_map({"g": [[0.5]]}, [""], [3]), "attack horizons"),
    "range": (lambda: temporal_heat_map({"g": [[50]]}, [1], [3]), r"expected shares in 0\.\.1"),
    "no cell": (lambda: temporal_heat_map({"g": [[np.nan]]}, [1], [3]), "without any number"),
    "no numbers": (lambda: transfer_matrix("abc", ["a"], ["b"]), "not an array of numbers"),
    "same names": (lambda: transfer_matrix([[1], [1]], ["a", "a"], ["b"]), "different names"),
    "eps and f": (lambda: doubt(f=[0.1]), "two lists of one length"),
    "no f": (lambda: uncertainty_plot({"net": {"eps": [1]}}), "no 'f'"),
    "eps of 0": (lambda: doubt(eps=[0, 0.1]), "above 0"),
    "no intercept": (lambda: doubt(alpha=0.5), "'intercept'"),
    "slopes": (lambda: doubt(alpha=0.5, intercept=0, ci95=[0.6, 0.4]), "low <= high"),
    "bytes": (lambda: images(IMAGES * 255), "divide 8-bit images by 255"),
    "nan pixels": (lambda: images(attacked=IMAGES * np.nan), "with pixels in nan"),
    "channels": (lambda: images(np.zeros((2, 2, 8, 8))), r"\(N,1,H,W\) or \(N,3,H,W\)"),
    "other images": (lambda: images(attacked=IMAGES[:1]), "as the clean images"),
    "labels": (lambda: images(labels=[1]), "received 1 labels"),
    "answers": (lambda: images(predictions={"other": [1, 2]}), "received predictions of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_line(case: str) -> None:
    draw, message = REFUSED[case]
    with pytest.raises(EvaluationError, match=message) as caught:
        draw()
    text = str(caught.value)
    assert "received" in text and "expected" in text
    assert "\n" not in text


def test_the_rows_of_the_refusals_are_drawn_when_sound() -> None:
    for draw in (curve, step, hit, doubt, images):
        assert draw() is not None
