"""Building every cell before any is trained: what cannot work is told at once, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from epdistill.data import DataSet, to_float
from epdistill.errors import EpdistillError, RecipeError
from epdistill.recipes import Recipe
from epdistill.students.distill import DistillTask, build_student, check
from epdistill.teachers.model import EPCNN
from epdistill.teachers.targets import Teacher
from epdistill.training import Batch, Task, generator_of
from epdistill.workflows.ablation_plan import Cell, Plan
from epdistill.workflows.context import Context
from epdistill.workflows.lessons import Lesson, lesson_for
from epdistill.workflows.request import chosen_suite
from epdistill.workflows.subjects import SHORT_UNROLLS
from epdistill.workflows.training import dtype_of

# Images that a step is timed on.
TIMED = 32


@dataclass(frozen=True)
class Rehearsed:
    """A cell with untrained networks.

    Attributes:
        model: Images in [0,1] to logits.
        task: How it would learn.
        epochs: Passes over the data.
        batch_size: Images per step.
        views: Gradients along which it is attacked.
    """

    model: torch.nn.Module
    task: Task
    epochs: int
    batch_size: int
    views: int


@dataclass(frozen=True)
class Cost:
    """What a cell takes, in seconds of one process on this machine, roughly.

    Attributes:
        train: Of training.
        attack: Of its evaluation.
    """

    train: float
    attack: float


def _build(cell: Cell, data: DataSet, device: torch.device) -> Rehearsed:
    def lesson(recipe: Recipe) -> Lesson:
        return lesson_for(recipe, data, device, dtype_of(recipe), lambda _: None)

    if cell.teacher is None:
        found = lesson(cell.recipe)
        # An EP-CNN has an implicit gradient and several unrolled ones, a network its own.
        views = 1 + len(SHORT_UNROLLS) if isinstance(found.model, EPCNN) else 1
        return Rehearsed(found.model, found.task, found.epochs, found.batch_size, views)
    teacher, own = cast(Teacher, lesson(cell.teacher.recipe).model), cell.recipe.student
    check(own, teacher, data)
    student = build_student(cell.recipe, teacher).to(device)
    task = DistillTask(student, teacher, cell.recipe, data.validation)
    return Rehearsed(student, task, own.epochs, own.batch_size, 1)


def _rehearsed(plan: Plan, data: DataSet, context: Context) -> Iterator[tuple[Cell, Rehearsed]]:
    """One cell of every kin, built."""
    for cell in {cell.kin: cell for cell in plan.cells()}.values():
        try:
            yield cell, _build(cell, data, context.torch_device())
        except EpdistillError as error:
            raise RecipeError(f"row {cell.label}: {error}") from error


def rehearse(plan: Plan, context: Context) -> None:
    """Load the data and build every cell.

    Raises:
        RecipeError: A cell that cannot be built, with its name.
        DataError: The data set is missing or damaged.
    """
    data = context.load_data(plan.recipe.data, plan.recipe.seed)
    for _ in _rehearsed(plan, data, context):
        pass


def costs(plan: Plan, context: Context) -> dict[str, Cost]:
    """What cells would take, by their kin.

    Two steps of the untrained networks are made and the second is timed, on a few images;
    then everything is thrown away. Relaxations of trained networks take longer or shorter.

    Raises:
        RecipeError: A cell that cannot be built.
        DataError: The data set is missing or damaged.
    """
    data = context.load_data(plan.recipe.data, plan.recipe.seed)
    device, ablate = context.torch_device(), plan.recipe.ablate
    images = to_float(data.train.images[:TIMED].to(device))
    labels = data.train.labels[:TIMED].to(device)
    how = plan.recipe.evaluate.model_copy(update={"linf": ablate.linf, "l2": ablate.l2})
    suite = chosen_suite(ablate.suite, how)
    attacked = min(ablate.limit, len(data.validation))
    found: dict[str, Cost] = {}
    for cell, made in _rehearsed(plan, data, context):
        model = made.model.eval()
        with torch.no_grad():
            answer = _second(partial(model, images)) / len(images)
        rounds = 0
        for attack in suite.attacks():
            radii = 1 if attack.nearest else len(suite.radii(attack))
            rounds += attack.cost * radii * (made.views if attack.white_box else 1)
        generator = generator_of(plan.recipe.seed)
        batch = Batch(images, labels, 0, 1, 0, 1, generator, torch.arange(len(images)))
        step = _second(partial(made.task.step, batch)) / len(images)
        size = min(made.batch_size, len(data.train))
        learnt = len(data.train) // size * size * made.epochs
        found[cell.kin] = Cost(step * learnt, answer * rounds * attacked)
    return found


def _second(work: Callable[[], object]) -> float:
    """Seconds of the second call: the first one warms up."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
