"""What an evaluation is asked for: its suite, and the command that asks for it again."""

from __future__ import annotations

import json

import pytest

from epdistill.errors import EvaluationError, RecipeError
from epdistill.recipes import EvaluateRecipe
from epdistill.workflows.commands import evaluation_command
from epdistill.workflows.request import Asked, chosen_suite, radii, with_strengths


def test_horizons_on_request():
    how = EvaluateRecipe(steps=7)
    assert chosen_suite("quick", how).temporal() is None
    assert chosen_suite("paper", how).temporal() is None
    swept = chosen_suite("quick", how, horizons=True).temporal()
    assert swept is not None
    assert (swept.pgd.steps, swept.attack_sweeps) == (7, how.full.attack_sweeps)
    # The full suite sweeps in any case, with its own steps.
    full = [chosen_suite("full", how, horizons=on).temporal() for on in (False, True)]
    assert full[0] == full[1] and full[0] is not None and full[0].pgd.steps == how.full.steps
    settings = {
        "name": "quick", "subset": "first", "seed": 0, "temporal": {"images": swept.images},
        "pgd": {"steps": EvaluateRecipe().steps},
    }  # fmt: skip
    told = evaluation_command({"settings": settings, "n": 3, "models": []}, ["runs/a"])
    assert told.endswith("--seed 0 --horizons")
    settings |= {"temporal": None, "linf": [0.5], "l2": [0.1, 1.0], "split": "validation"}
    told = evaluation_command({"settings": settings, "n": 3, "models": []}, ["runs/a"])
    assert told.endswith("--seed 0 --linf 0.5 --l2 0.1,1.0 --split validation")


def test_steps_on_request():
    for suite, usual, found in (
        ("quick", EvaluateRecipe().steps, lambda how: how.steps),
        ("full", EvaluateRecipe().full.steps, lambda how: how.full.steps),
    ):
        how = with_strengths(EvaluateRecipe(), Asked(steps=7), suite)
        assert (found(how), chosen_suite(suite, how).pgd.steps) == (7, 7)
        assert found(with_strengths(EvaluateRecipe(), Asked(), suite)) == usual
        for steps, flag in ((usual, False), (7, True)):
            settings = {
                "name": suite, "subset": "first", "seed": 0, "temporal": None,
                "pgd": {"steps": steps},
            }  # fmt: skip
            told = evaluation_command({"settings": settings, "n": 3, "models": []}, ["runs/a"])
            assert told.endswith(" --steps 7") == flag and ("--steps" in told) == flag
    with pytest.raises(EvaluationError, match="paper, which has its own"):
        with_strengths(EvaluateRecipe(), Asked(steps=7), "paper")


def test_radii_are_numbers_or_fractions():
    assert radii("1, 0.5,1", "--l2") == (0.5, 1.0)
    assert radii("8/255,2/255", "--linf") == (2 / 255, 8 / 255)
    for text in ("", "a", "0", "-1", "1/0", "0.1;0.2"):
        with pytest.raises(RecipeError, match=r"--l2 .*; expected numbers above 0"):
            radii(text, "--l2")
    how = with_strengths(EvaluateRecipe(), Asked(linf=(0.3,)), "quick")
    assert (how.linf, how.l2) == ((0.3,), EvaluateRecipe().l2)
    with pytest.raises(EvaluationError, match="paper, which has its own"):
        with_strengths(EvaluateRecipe(), Asked(l2=(0.3,)), "paper")
    asked = Asked((), linf=(0.3,), split="validation")
    assert Asked().over(Asked.from_json(json.loads(json.dumps(asked.to_json())))) == asked
