"""A teacher that is about to be trained: what it is, how it learns, how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from epdistill.data import DataSet, Split
from epdistill.distributed import ALONE, Team, synchronised
from epdistill.recipes import EP_CNN, Recipe
from epdistill.training import Task


@dataclass(frozen=True)
class Lesson:
    """Everything that differs between teachers.

    Attributes:
        model: The network, on its device.
        task: How it learns.
        described: What rebuilds it, beside its name; JSON values only.
        measure: A split to the figures on it, by name; `accuracy` at least.
        epochs: Passes over the data.
        batch_size: Images per step.
    """

    model: torch.nn.Module
    task: Task
    described: dict[str, Any]
    measure: Callable[[Split], dict[str, float]]
    epochs: int
    batch_size: int


def lesson_for(
    recipe: Recipe,
    data: DataSet,
    device: torch.device,
    dtype: torch.dtype,
    tell: Callable[[str], None],
    team: Team = ALONE,
) -> Lesson:
    """The freshly initialised teacher that a recipe names, and all that is needed to train it.

    Args:
        recipe: Names it in `model`.
        data: What it learns from.
        device: Where it lives.
        dtype: Of its weights.
        tell: Hears of troubles on the way.
        team: The processes that teach it together.

    Raises:
        RecipeError: It cannot take these images.
    """
    if recipe.model == EP_CNN:
        return _ep_cnn(recipe, data, device, dtype, tell, team)
    return _baseline(recipe, data, device, dtype, team)


def _ep_cnn(
    recipe: Recipe,
    data: DataSet,
    device: torch.device,
    dtype: torch.dtype,
    tell: Callable[[str], None],
    team: Team,
) -> Lesson:
    from epdistill.teachers.relaxation import is_mixed
    from epdistill.teachers.teach import TeachTask, build_teacher, measure

    model = build_teacher(recipe, data).to(device, dtype)
    if recipe.precision == "bfloat16" and not is_mixed(model.network(), model.schedule):
        tell(f"this {device.type} has no bfloat16: relaxing in float32, which is faster here")
    described = {
        "architecture": model.architecture.to_dict(),
        "schedule": model.schedule.to_dict(),
    }
    return Lesson(
        model,
        TeachTask(model, recipe, data.validation, tell, team),
        described,
        lambda split: asdict(measure(model, split, team=team)),
        recipe.teacher.epochs,
        recipe.teacher.batch_size,
    )


def _baseline(
    recipe: Recipe, data: DataSet, device: torch.device, dtype: torch.dtype, team: Team
) -> Lesson:
    from epdistill.teachers.baselines.registry import build_baseline
    from epdistill.teachers.baselines.tasks import TASKS, measure

    model = build_baseline(recipe, data).to(device, dtype)
    synchronised(model, team, device)
    own = getattr(recipe.baselines, recipe.model.replace("-", "_"))

    def figures(split: Split) -> dict[str, float]:
        found = asdict(measure(model, split, recipe.seed, team=team))
        return {name: value for name, value in found.items() if value is not None}

    task = TASKS[recipe.model](model, recipe, data.validation, team)
    return Lesson(model, task, model.describe(), figures, own.epochs, own.batch_size)
