"""What a recipe may say about an ablation, as `[ablate]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from epdistill.recipes.section import Section


def only_teacher(recipe: Mapping[str, Any]) -> int | None:
    """The seed of the one teacher that all students of an ablation have, if they have.

    Args:
        recipe: As JSON; it may be older than `teacher_seed`.
    """
    own = recipe["ablate"]
    if own["vary"] != "student":
        return None
    first = own.get("teacher_seed")
    return int(recipe["seed"] if first is None else first)


class AblateRecipe(Section):
    """Which rows are compared, on how many seeds, under which attacks.

    The radii are the columns of the published tables (`epdistill.robustness.paper`); how
    many steps and queries the attacks take is said in `[evaluate]`.

    Attributes:
        rows: By name, in the order of the table; all of them without it.
        deciding: Rows that are trained on every seed.
        seeds: How many those are, counted from the recipe's `seed`.
        other_seeds: On how many of them the other rows are trained.
        vary: What a seed moves: `all`, or the `student` alone, where one teacher is all that
            can be afforded; the spread over seeds then says nothing about teachers.
        teacher_seed: Seed of that one teacher, and so of the validation images; the recipe's
            without it. With it further seeds of students can be added elsewhere and later.
        suite: `quick` or `full`.
        limit: Images that are attacked, drawn by the recipe's seed: the same for all.
        linf: Radii of the Linf balls, in units of the [0,1] pixel range.
        l2: Radii of the L2 balls.
    """

    rows: tuple[str, ...] | None = Field(default=None, min_length=1)
    deciding: tuple[str, ...] = (
        "ep-teacher", "ce", "noise", "noise-strong", "ce-inputs", "distilled"
    )  # fmt: skip
    seeds: PositiveInt = 3
    other_seeds: PositiveInt = 1
    vary: Literal["all", "student"] = "all"
    teacher_seed: NonNegativeInt | None = None
    suite: Literal["quick", "full"] = "quick"
    limit: PositiveInt = 200
    linf: tuple[PositiveFloat, ...] = (0.00464159, 0.01, 0.0215443, 8 / 255)
    l2: tuple[PositiveFloat, ...] = (0.0788029, 0.308503, 0.486219, 1.0)

    @model_validator(mode="after")
    def _one_teacher(self) -> AblateRecipe:
        if self.teacher_seed is not None and self.vary != "student":
            raise ValueError('teacher_seed is that of one teacher: expected vary = "student"')
        return self
