"""What an evaluation is asked for: its suite, and the command that asks for it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epdistill.errors import EvaluationError, RecipeError
from epdistill.recipes import EvaluateRecipe
from epdistill.runs import open_run
from epdistill.workflows.commands import evaluation_command
from epdistill.workflows.evaluation import named_models
from epdistill.workflows.request import Asked, chosen_suite, names_of, radii, with_strengths


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


def test_shipped_is_teacher_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    teacher, file, run = named_models([Path("shipped"), Path("runs/a")])
    assert open_run(teacher, "teacher").config["finished"] and file.is_file()
    assert (file.suffix, run) == (".onnx", Path("runs/a"))
    assert named_models([]) == ()
    # What lies here under that name comes first.
    (tmp_path / "shipped").mkdir()
    assert named_models([Path("shipped")]) == (Path("shipped"),)


def test_attacks_on_request():
    how = EvaluateRecipe(l2=[0.25])
    assert names_of("square, pgd,square") == ("square", "pgd")
    quick = chosen_suite("quick", how, attacks=("square",))
    assert [(one.name, one.norm) for one in quick.attacks()] == [("square", "linf")]
    # Of `full` no sweep over horizons and no diagnosis is left, unless asked for.
    full = chosen_suite("full", how, attacks=("autoattack",))
    assert [(one.name, one.norm) for one in full.attacks()] == [
        ("autoattack", "linf"), ("autoattack", "l2"),
    ]  # fmt: skip
    assert full.radii(full.attacks()[1]) == (0.25,)
    assert full.temporal() is None and full.diagnosed() is None
    assert chosen_suite("full", how, attacks=("pgd",), horizons=True).temporal() is not None
    with pytest.raises(EvaluationError, match="attacks autoattack, fgsm; suite quick has pgd, squ"):
        chosen_suite("quick", how, attacks=("fgsm", "pgd", "autoattack"))
    with pytest.raises(EvaluationError, match="received the attacks none"):
        chosen_suite("quick", how, attacks=())
    with pytest.raises(EvaluationError, match="attacks pgd with --suite paper, which has its own"):
        chosen_suite("paper", how, attacks=("pgd",))
    asked = Asked((), attacks=("pgd", "square"))
    assert Asked().over(Asked.from_json(json.loads(json.dumps(asked.to_json())))) == asked


@pytest.mark.parametrize(
    ("temporal", "verdict", "told"),
    [(None, None, ""), ({"images": 3}, "WARN", " --diagnose --horizons")],
)
def test_a_command_names_its_attacks(temporal, verdict, told):
    settings = {
        "name": "full", "subset": "first", "seed": 0, "temporal": temporal,
        "only": ["pgd", "square"], "pgd": {"steps": EvaluateRecipe().full.steps},
    }  # fmt: skip
    results = {"settings": settings, "n": 3, "models": [{"verdict": verdict}]}
    command = evaluation_command(results, ["runs/a"])
    assert command.endswith(f"--seed 0 --attacks pgd,square{told}")


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
