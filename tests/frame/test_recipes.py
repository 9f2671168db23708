"""Recipes: bundled ones load, precedence holds, every mistake is one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epdistill.errors import RecipeError
from epdistill.recipes import BUNDLED, load_recipe
from epdistill.runs import write_json


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipes_load_and_round_trip(name: str) -> None:
    recipe = load_recipe(name, environment={})
    assert recipe.name == name
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe


def test_published_recipes_to_the_letter() -> None:
    for name, beta, top in (("cifar10", 0.5, 512), ("cifar100", 1.0, 1024)):
        teacher = load_recipe(name, environment={}).teacher
        assert teacher.channels == (128, 256, 512, top)
        assert (teacher.schedule, teacher.sweeps, teacher.nudged_sweeps) == ("synchronous", 250, 30)
        assert (teacher.tolerance, teacher.beta, teacher.epochs) == (0.0, beta, 120)
        assert teacher.learning_rates == (0.25, 0.15, 0.1, 0.08, 0.05)


def test_precedence_is_file_environment_flags(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\n[teacher]\nepochs = 2\nbeta = 0.3\nomega = 1.1\n")
    environment = {"EPDISTILL__TEACHER__EPOCHS": "3", "EPDISTILL__TEACHER__BETA": "0.4"}
    recipe = load_recipe(str(path), {"teacher.epochs": 4, "seed": None}, environment)
    assert recipe.name == "mine"
    assert (recipe.teacher.epochs, recipe.teacher.beta) == (4, 0.4)
    assert (recipe.teacher.omega, recipe.seed) == (1.1, 1)


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("digit", {}, ["unknown recipe 'digit'", "did you mean digits"]),
        ("digits", {"teacher.epoch": 3}, ["unknown key teacher.epoch", "did you mean epochs"]),
        ("digits", {"teacher.omega": 2.0}, ["teacher.omega = 2.0", "less than 2"]),
        ("digits", {"teacher.epochs": "many"}, ["teacher.epochs = 'many'", "integer"]),
        ("digits", {"data.padding_mode": "x"}, ["padding_mode", "'reflect', 'edge' or 'zeros'"]),
        ("nowhere.toml", {}, ["nowhere.toml", "cannot be read"]),
    ],
)
def test_mistakes_are_one_line(source: str, overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, {})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_broken_toml(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[teacher\n")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(str(path), {}, {})


def test_the_recipe_of_a_damaged_run_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    write_json(config, {"recipe": {"name": "digits", "seed": 3}})
    assert load_recipe(str(tmp_path), environment={}).seed == 3
    config.write_bytes(config.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    with pytest.raises(RecipeError, match="damaged"):
        load_recipe(str(tmp_path), environment={})
