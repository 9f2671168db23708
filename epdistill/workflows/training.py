"""Teaching and distilling, from a recipe to a finished run folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epdistill.augment import Augmentation
from epdistill.data import DataSet, describe
from epdistill.errors import RunError
from epdistill.loading import load_teacher
from epdistill.recipes import Recipe
from epdistill.recipes.loading import validate
from epdistill.runs import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    Run,
    atomic_write,
    new_run_folder,
    newest_run,
    open_run,
    save_weights,
    write_json,
)
from epdistill.training import STATE, Task, fit
from epdistill.workflows.cards import card
from epdistill.workflows.context import (
    Context,
    environment,
    now,
    require_finished,
    unfinished_run,
)


@dataclass(frozen=True)
class Trained:
    """A finished run and its headline figures.

    Attributes:
        run: The folder and its configuration.
        results: What was measured on the test split, by name.
    """

    run: Run
    results: dict[str, Any]


def teach(
    recipe: Recipe, context: Context, *, out: Path | None = None, resume: bool = False
) -> Trained:
    """Train an EP-CNN teacher.

    Args:
        recipe: What to train; with `resume` the run's own recipe counts.
        context: Folders, device, reporter.
        out: The run's folder; numbered automatically without it.
        resume: Continue `out`, or the newest unfinished teacher.
    """
    from epdistill.teachers.teach import TeachTask, build_teacher, measure

    if resume:
        run = unfinished_run(context, out, "teacher")
        recipe = validate(run.config["recipe"], str(run.path))
        data = context.data_of(run)
        folder, config = run.path, run.config
        context.reporter.line(f"continuing {folder}")
    else:
        data = context.load_data(recipe.data, recipe.seed)
        folder, config = None, {}
    device = context.torch_device()
    model = build_teacher(recipe, data).to(device, _dtype(recipe))
    task = TeachTask(model, recipe, data.validation, context.reporter.line)
    if folder is None:
        described = {
            "architecture": model.architecture.to_dict(),
            "schedule": model.schedule.to_dict(),
        }
        folder, config = _open_folder(context, out, "teacher", recipe, data, described, {})
    seconds = _train(
        task, folder, config, recipe, data, context, device,
        title="teach", epochs=recipe.teacher.epochs, batch_size=recipe.teacher.batch_size,
    )  # fmt: skip
    found = measure(model, data.test)
    results = {
        "accuracy": found.accuracy,
        "sweeps": found.sweeps,
        "converged": found.converged,
        "residual": found.residual,
        "test_images": len(data.test),
        "seconds": seconds,
    }
    return _finish(folder, config, model, results)


def distill(
    recipe: Recipe | None,
    context: Context,
    *,
    teacher: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
) -> Trained:
    """Train a student on a teacher's fixed points.

    Args:
        recipe: What to train; without it the teacher's own recipe.
        context: Folders, device, reporter.
        teacher: The teacher's run; the newest one without it.
        out: The run's folder; numbered automatically without it.
        resume: Continue `out`, or the newest unfinished student.
        overrides: Changes to the inherited recipe, as `{"student.epochs": 3}`.
    """
    from epdistill.students.distill import DistillTask, build_student, measure

    if resume:
        run = unfinished_run(context, out, "student")
        recipe = validate(run.config["recipe"], str(run.path))
        source = open_run(Path(run.config["teacher"]["path"]), "teacher")
        if source.config.get("weights_sha256") != run.config["teacher"]["weights_sha256"]:
            raise RunError(f"{source.path} is not the teacher that {run.path} was started with")
        folder, config = run.path, run.config
        context.reporter.line(f"continuing {folder}")
    else:
        source = open_run(teacher, "teacher") if teacher else newest_run(context.runs, "teacher")
        folder, config = None, {}
    require_finished(source)
    if recipe is None:
        recipe = inherit(source, overrides or {})
    data = context.data_of(source)
    device = context.torch_device()
    master = load_teacher(source).to(device)
    student = build_student(recipe, master).to(device)
    task = DistillTask(student, master, recipe, data.validation)
    if folder is None:
        pointer = {
            "path": str(source.path),
            "name": source.name,
            "weights_sha256": source.config["weights_sha256"],
        }
        folder, config = _open_folder(
            context, out, "student", recipe, data, student.spec.to_dict(), {"teacher": pointer}
        )
    context.reporter.line(f"distilling from {source.path}")
    seconds = _train(
        task, folder, config, recipe, data, context, device,
        title="distill", epochs=recipe.student.epochs, batch_size=recipe.student.batch_size,
    )  # fmt: skip
    found = measure(student, master, data.test)
    results = {
        "accuracy": found.accuracy,
        "agreement": found.agreement,
        "r2": list(found.r2),
        "teacher_accuracy": source.config["results"]["accuracy"],
        "test_images": len(data.test),
        "seconds": seconds,
    }
    return _finish(folder, config, student, results)


def _dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of the weights; bfloat16 is for relaxing, never for keeping."""
    return torch.float64 if recipe.precision == "float64" else torch.float32


def inherit(source: Run, overrides: dict[str, Any]) -> Recipe:
    """The recipe of a run with some keys changed; data set and seed come with it.

    Raises:
        RecipeError: A key is unknown or a value out of range.
    """
    content = dict(source.config["recipe"])
    for dotted, value in overrides.items():
        if value is None:
            continue
        section, _, key = dotted.rpartition(".")
        if section:
            content[section] = {**content.get(section, {}), key: value}
        else:
            content[key] = value
    return validate(content, str(source.path))


def _open_folder(
    context: Context,
    out: Path | None,
    kind: str,
    recipe: Recipe,
    data: DataSet,
    model: dict[str, Any],
    extra: dict[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Make the run's folder and write down what is about to happen."""
    label = recipe.student.name if kind == "student" else "ep-cnn"
    folder = new_run_folder(out, context.runs, f"{recipe.name}-{label}")
    config = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": now(),
        "finished": None,
        "recipe": recipe.model_dump(mode="json"),
        "data": describe(data),
        "model": model,
        **extra,
        "environment": environment(),
    }
    write_json(folder / CONFIG, config)
    return folder, config


def _train(
    task: Task,
    folder: Path,
    config: dict[str, Any],
    recipe: Recipe,
    data: DataSet,
    context: Context,
    device: torch.device,
    *,
    title: str,
    epochs: int,
    batch_size: int,
) -> float:
    """Run the loop; returns the seconds that this process spent in it."""
    start = time.monotonic()
    source = recipe.data
    fit(
        task,
        data.train,
        folder,
        title=title,
        epochs=epochs,
        batch_size=batch_size,
        augmentation=Augmentation(source.crop_padding, source.flip, source.padding_mode),
        seed=recipe.seed,
        device=device,
        reporter=context.reporter,
    )
    return time.monotonic() - start


def _finish(
    folder: Path, config: dict[str, Any], model: torch.nn.Module, results: dict[str, Any]
) -> Trained:
    """Write weights, results and card; the run counts as finished with the last rename."""
    digest = save_weights(folder, model.state_dict())
    config = {**config, "finished": now(), "weights_sha256": digest, "results": results}
    run = Run(folder, config)
    atomic_write(folder / CARD, card(run))
    write_json(folder / CONFIG, config)
    (folder / STATE).unlink(missing_ok=True)
    return Trained(run, results)
