"""`epdistill bench distill`: what a step of distilling costs beside a step on labels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.data import DataSet, Split, to_float
from epdistill.loading import load_teacher
from epdistill.recipes import Recipe, load_recipe
from epdistill.runs import new_run_folder, open_run, write_json
from epdistill.training import Batch, generator_of
from epdistill.workflows.context import Context, gpu_name, require_finished
from epdistill.workflows.dynamics import shipped

if TYPE_CHECKING:
    from epdistill.students.distill import DistillTask
    from epdistill.teachers.targets import Teacher

SCHEMA_VERSION = 1
NAME = "distill.json"
LABELS, RECIPE, SETTLED = "labels alone", "distilled", "distilled, teacher fully settled"


@dataclass(frozen=True)
class DistillingCost:
    """Where the figures were written, and what they say (docs/bench-schema.md).

    Attributes:
        folder: Holds distill.json.
        content: The content of distill.json.
    """

    folder: Path
    content: dict[str, Any]


def distilling_cost(
    context: Context,
    *,
    run: Path | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    rounds: int = 15,
    max_seconds: float = 60.0,
) -> DistillingCost:
    """Time training steps of one student with and without its teacher, interleaved.

    A step is all that happens between two batches: the images are cut, flipped and made
    noisy, the teacher relaxes on them, the student goes forward and backward and is updated.

    Args:
        context: Folders, device, reporter.
        run: A teacher's run; the small teacher that comes with the package without it.
        recipe: Whose student is trained; the teacher's own recipe without it.
        out: Folder for the results; numbered automatically without it.
        rounds: Most measured steps of each.
        max_seconds: Time for each, roughly; at least three steps are measured.
    """
    from epdistill.export.bench import Contender, bench, ratios, to_json

    teacher, data, label, own = _subject(context, run)
    chosen = recipe or own
    size = min(chosen.student.batch_size, len(data.train))
    context.reporter.line(f"{label}: {chosen.student.name}, batch {size}")
    tasks = {
        LABELS: _task(chosen, teacher, data, {"loss": "ce", "cached_views": 0}),
        RECIPE: _task(chosen, teacher, data, {"cached_views": 0}),
        SETTLED: _task(chosen, teacher, data, {"cached_views": 0, "teacher_tolerance": None}),
    }
    told: dict[str, dict[str, float]] = {}
    contenders = [
        Contender(name, _stepper(name, task, chosen, data.train, size, told))
        for name, task in tasks.items()
    ]
    rows = bench(
        contenders, torch.zeros(1, 1, 1, 1), batch_sizes=(size,), rounds=rounds,
        max_seconds=max_seconds,
    )  # fmt: skip
    timed = to_json(rows)
    content = {
        "schema_version": SCHEMA_VERSION,
        "teacher": label,
        "recipe": chosen.name,
        "student": chosen.student.model_dump(mode="json"),
        **timed,
        "hardware": timed["hardware"] | {"gpu": gpu_name(context.torch_device())},
        "reference": LABELS,
        "costs": [
            {
                "name": found.name,
                "times": 1 / found.speedup,
                "low": 1 / found.high,
                "high": 1 / found.low,
                "sweeps": told[found.name].get("sweeps"),
                "settled": told[found.name].get("settled"),
            }
            for found in ratios(rows, LABELS)
        ],
    }
    folder = new_run_folder(out, context.runs, "distilling-cost")
    write_json(folder / NAME, content)
    return DistillingCost(folder, content)


def _subject(context: Context, run: Path | None) -> tuple[Teacher, DataSet, str, Recipe]:
    if run is None:
        model, data, label = shipped(context)
        return (
            model.to(context.torch_device()),
            data,
            label,
            load_recipe("cifar10-small", environment={}),
        )
    from epdistill.recipes.loading import validate

    source = require_finished(open_run(run, "teacher"))
    teacher = load_teacher(source).to(context.torch_device())
    own = validate(source.config["recipe"], str(source.path))
    return teacher, context.data_of(source), source.name, own


def _task(recipe: Recipe, teacher: Teacher, data: DataSet, changes: dict[str, Any]) -> DistillTask:
    from epdistill.students.distill import DistillTask, build_student, check

    own = recipe.model_copy(update={"student": recipe.student.model_copy(update=changes)})
    check(own.student, teacher, data)
    student = build_student(own, teacher).to(teacher.mean.device)
    return DistillTask(student, teacher, own, data.validation)


def _stepper(
    name: str,
    task: DistillTask,
    recipe: Recipe,
    split: Split,
    size: int,
    told: dict[str, dict[str, float]],
) -> Callable[[Tensor], object]:
    """One step of the training loop after the other; every task sees the same batches."""
    source, device = recipe.data, next(task.student.parameters()).device
    augmentation = Augmentation(source.crop_padding, source.flip, source.padding_mode)
    numbers = count()

    def step(_: Tensor) -> object:
        k = next(numbers)
        generator = generator_of(recipe.seed, 0, k)
        pick = torch.randperm(len(split), generator=generator)[:size]
        images = augmentation(split.images[pick].to(device), generator)
        labels = split.labels[pick].to(device)
        # Late in a long training: the rate is small and every step costs the same.
        batch = Batch(to_float(images), labels, 900 + k, 1000 + k, 0, 1, generator, pick)
        told[name] = task.step(batch)
        return told[name]

    return step
