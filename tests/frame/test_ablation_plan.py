"""What an ablation compares: its rows and cells, before anything is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from epdistill.errors import RecipeError
from epdistill.recipes import AblateRecipe, Recipe
from epdistill.robustness.paper import TABLE_L2, TABLE_LINF
from epdistill.workflows.ablation_plan import NAMES, plan_for, references_among


def leaves(content: Any, above: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {above.removesuffix("."): content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= leaves(value, f"{above}{key}.")
    return found


def test_rows_change_what_they_say_and_nothing_else(base: Recipe):
    plain = leaves(base.model_dump(mode="json"))
    entries = plan_for(base, seeds=2).entries()
    assert [entry.row.name for entry in entries] == [*NAMES, *NAMES]
    for entry in entries:
        found = leaves(entry.cell.recipe.model_dump(mode="json"))
        changed = {key: value for key, value in found.items() if value != plain[key]}
        assert changed.pop("seed", 0) == entry.seed
        assert changed == entry.cell.keys
        assert entry.row.keys.items() <= found.items()
        assert (entry.cell.teacher is None) == (entry.row.kind == "teacher")
    keys = {entry.row.name: entry.cell.keys for entry in entries}
    # This base gives labels no weight, and its student is the small conv net.
    assert keys["ep-teacher"] == keys["distilled"] == keys["distilled-unlabelled"] == {}
    assert keys["distilled-cnn"] == {}
    assert len({json.dumps(found, sort_keys=True) for found in keys.values()}) == len(keys) - 6
    teachers = {e.row.name: e.cell.teacher.label for e in entries if e.cell.teacher is not None}
    labels = {e.row.name: e.cell.label for e in entries if e.row.kind == "teacher"}
    assert labels["bptt-teacher"] == teachers["distilled-bptt"] == "ep-cnn-bptt"
    assert (teachers["distilled-adv"], teachers["distilled-bp"]) == ("adv-cnn", "bp-cnn")
    assert {teachers[name] for name in ("ce", "noise", "kd", "distilled")} == {"ep-cnn-ep"}


def test_noise_of_any_strength_is_a_row_and_a_reference(base: Recipe):
    plan = plan_for(base, ("kd", "noise-0.350", "noise-0.35", "noise-0.25", "noise-strong"), 1)
    cells = {entry.row.name: entry.cell for entry in plan.entries()}
    assert list(cells) == ["kd", "noise-0.35", "noise-0.25", "noise-strong"]
    own = cells["noise-0.35"].recipe.student
    assert (own.loss, own.inputs, own.noise_std) == ("ce", "noise", 0.35)
    # The same training has one cell, whatever the row is called.
    assert cells["noise-0.25"].fingerprint == cells["noise-strong"].fingerprint
    assert references_among([*cells, "ce"]) == ["ce", "noise-strong", "noise-0.35", "noise-0.25"]
    for name in ("noise-2", "noise--1", "noise-nan"):
        with pytest.raises(RecipeError, match=rf"row {name}.*noise_std"):
            plan_for(base, (name,), 1).entries()
    with pytest.raises(RecipeError, match=r"unknown row 'noise-x'.*wca, noise-STD"):
        plan_for(base, ("noise-x",), 1)


def test_labels_count_once_and_only_where_a_row_says_so(base: Recipe):
    weighed = base.model_copy(
        update={"student": base.student.model_copy(update={"label_weight": 1.0})}
    )
    cells = {entry.row.name: entry.cell for entry in plan_for(weighed, seeds=1).entries()}
    weights = {name: cell.recipe.student.label_weight for name, cell in cells.items()}
    unlabelled = {"ce", "smoothing", "noise", "noise-strong", "noise-stronger", "ce-inputs", "kd"}
    assert {name for name, weight in weights.items() if weight == 0} == {
        *unlabelled, "distilled-unlabelled"
    }  # fmt: skip
    # The controls are the same trainings whatever the base does with labels.
    before = {entry.row.name: entry.cell for entry in plan_for(base, seeds=1).entries()}
    for name in unlabelled:
        assert cells[name].fingerprint == before[name].fingerprint
    assert cells["distilled-unlabelled"].fingerprint == before["distilled"].fingerprint
    assert cells["distilled"].fingerprint == before["distilled-labels"].fingerprint


def test_deciding_rows_get_more_seeds(base: Recipe):
    assert plan_for(base, ["kd", "ce", "kd"]).seeds == {"kd": 1, "ce": 2}
    assert plan_for(base, ["kd", "ce"], 3).seeds == {"kd": 3, "ce": 3}
    entries = plan_for(base, ["kd", "ce"]).entries()
    assert [(entry.row.name, entry.seed) for entry in entries] == [("kd", 0), ("ce", 0), ("ce", 1)]
    # Every seed in use has its teacher and its sender.
    names = [(cell.label, cell.recipe.seed) for cell in plan_for(base, ["ce"]).cells()]
    assert names == [(label, seed) for seed in (0, 1) for label in ("ep-cnn-ep", "ce", "distilled")]


def test_one_teacher_for_all_seeds(base: Recipe):
    own = base.model_copy(update={"ablate": base.ablate.model_copy(update={"vary": "student"})})
    cells = plan_for(own, ["ce", "distilled"], 3).cells()
    taught = [cell for cell in cells if cell.teacher is None]
    assert [cell.recipe.seed for cell in taught] == [base.seed]
    students = [cell for cell in cells if cell.teacher is not None]
    assert sorted(cell.recipe.seed for cell in students) == [0, 0, 1, 1, 2, 2]
    assert len({cell.fingerprint for cell in students}) == 6
    # Further seeds of students elsewhere: the same cells as if they had been made in one go.
    later = Recipe.model_validate({**own.model_dump(), "seed": 1})
    later = later.model_copy(update={"ablate": own.ablate.model_copy(update={"teacher_seed": 0})})
    more = {cell.fingerprint for cell in plan_for(later, ["ce", "distilled"], 2).cells()}
    assert more < {cell.fingerprint for cell in cells} and len(more) == 5
    with pytest.raises(ValueError, match='expected vary = "student"'):
        AblateRecipe(teacher_seed=0)
    # With the seeds of both moved, every seed has a teacher of its own.
    assert sum(cell.teacher is None for cell in plan_for(base, ["ce"], 3).cells()) == 3


def test_fingerprints_tell_trainings_apart(base: Recipe):
    def prints(**sections: Any) -> dict[str, str]:
        recipe = base.model_copy(
            update={
                key: getattr(base, key).model_copy(update=value)
                if isinstance(value, dict)
                else value
                for key, value in sections.items()
            }
        )
        return {entry.row.name: entry.cell.fingerprint for entry in plan_for(recipe).entries()}

    plain = prints()
    assert prints(evaluate={"steps": 9}, ablate={"limit": 9}, name="other") == plain
    student = prints(student={"epochs": 2})
    assert student["ep-teacher"] == plain["ep-teacher"]
    assert student["adv-cnn"] == plain["adv-cnn"]
    assert student["ce"] != plain["ce"]
    teacher = prints(teacher={"epochs": 2})
    assert all(teacher[name] != plain[name] for name in plain)
    # Rows that ask for the same training share it.
    shared = prints(student={"inputs": "noise"})
    assert shared["noise"] == shared["ce-inputs"]
    assert shared["distilled"] == shared["distilled-noise"]
    assert plain["noise"] != plain["ce-inputs"]


def test_default_radii_are_those_of_the_published_tables():
    assert AblateRecipe().linf == TABLE_LINF
    assert AblateRecipe().l2 == TABLE_L2
