"""Teaching and distilling, from a recipe to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epdistill.augment import Augmentation
from epdistill.checkpoints import forget_checkpoints, load_checkpoint, spent
from epdistill.data import DataSet, describe, to_float
from epdistill.distributed import synchronised
from epdistill.errors import DiskError, RecipeError, RunError
from epdistill.loading import load_teacher
from epdistill.recipes import Recipe
from epdistill.recipes.loading import validate, with_keys
from epdistill.runs import (
    CARD,
    CONFIG,
    FILES,
    FORMAT_VERSION,
    METRICS,
    Run,
    atomic_write,
    digests_of,
    new_run_folder,
    newest_run,
    open_run,
    save_weights,
    write_json,
)
from epdistill.training import Task, fit
from epdistill.workflows.cards import card
from epdistill.workflows.context import (
    Context,
    environment,
    now,
    require_finished,
    unfinished_run,
)
from epdistill.workflows.survival import offer_run, training_in

# On how many images the cost of an answer is measured: a relaxation's differs between them.
FLOPS_IMAGES = 16


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
    """Train a teacher: an EP-CNN, or the baseline that the recipe names.

    Args:
        recipe: What to train; with `resume` the run's own recipe counts.
        context: Folders, device, reporter.
        out: The run's folder; numbered automatically without it.
        resume: Continue `out`, or the newest unfinished teacher.
    """
    from epdistill.teachers.figures import flops, parameters, published_accuracy
    from epdistill.workflows.lessons import lesson_for

    if resume:
        run = unfinished_run(context, out, "teacher")
        recipe = validate(run.config["recipe"], str(run.path))
        data = context.data_of(run)
        folder, config = run.path, run.config
        context.reporter.line(f"continuing {folder}")
    else:
        data = context.load_data(recipe.data, recipe.seed)
        folder, config = None, {}
        if out is None:
            offer_run(context, "teacher")
    device = context.torch_device()
    lesson = lesson_for(recipe, data, device, dtype_of(recipe), context.reporter.line, context.team)
    if folder is None:
        folder, config = _open_folder(
            context, out, "teacher", recipe, data, {"name": recipe.model, **lesson.described}, {}
        )
    seconds = _train(
        lesson.task, folder, config, recipe, data, context, device,
        title="teach", epochs=lesson.epochs, batch_size=lesson.batch_size,
    )  # fmt: skip
    sample = to_float(data.validation.images[:FLOPS_IMAGES].to(device))
    results = {
        **lesson.measure(data.test),
        "test_images": len(data.test),
        "parameters": parameters(lesson.model),
        "flops": flops(lesson.model, sample),
        "published": published_accuracy(recipe),
        "seconds": seconds,
    }
    return _finish(folder, config, lesson.model, results, context)


def distill(
    recipe: Recipe | None,
    context: Context,
    *,
    teacher: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
) -> Trained:
    """Train a student on a teacher's answers.

    Args:
        recipe: What to train; without it the teacher's own recipe, with `resume` the run's.
        context: Folders, device, reporter.
        teacher: The teacher's run, or `shipped`; the newest one without it.
        out: The run's folder; numbered automatically without it.
        resume: Continue `out`, or the newest unfinished student.
        overrides: Changes to the recipe, as `{"student.epochs": 3}`; another student than its
            own does not inherit width, stages and weights.
    """
    from epdistill.students.distill import DistillTask, build_student, cache_for, check
    from epdistill.students.fidelity import fidelities
    from epdistill.teachers.figures import flops, parameters
    from epdistill.teachers.pretrained import named

    if resume:
        run = unfinished_run(context, out, "student")
        recipe = validate(run.config["recipe"], str(run.path))
        source = open_run(Path(run.config["teacher"]["path"]), "teacher")
        if source.config.get("weights_sha256") != run.config["teacher"]["weights_sha256"]:
            raise RunError(f"{source.path} is not the teacher that {run.path} was started with")
        folder, config = run.path, run.config
        context.reporter.line(f"continuing {folder}")
    else:
        source = (
            open_run(named(teacher), "teacher") if teacher else newest_run(context.runs, "teacher")
        )
        folder, config = None, {}
        if out is None:
            offer_run(context, "student")
        if recipe is None:
            recipe = inherit(source.config["recipe"], overrides or {}, str(source.path))
        else:
            given = recipe.model_dump(exclude_unset=True)
            recipe = inherit(given, overrides or {}, recipe.name)
        recipe = _on_data_of(recipe, source)
    require_finished(source)
    data = context.data_of(source, recipe.data)
    device = context.torch_device()
    master = load_teacher(source).to(device)
    check(recipe.student, master, data)
    if recipe.student.cached_views and context.team.size > 1:
        raise RecipeError(
            f"cached_views = {recipe.student.cached_views} with {context.team.size} processes, "
            "which cannot share the file; expected 0: the teacher answers online in each of them"
        )
    student = build_student(recipe, master).to(device)
    synchronised(student, context.team, device)
    if folder is None:
        pointer = {
            "path": str(source.path),
            "name": source.name,
            "weights_sha256": source.config["weights_sha256"],
        }
        folder, config = _open_folder(
            context, out, "student", recipe, data, student.spec.to_dict(), {"teacher": pointer}
        )
    with training_in(folder, "student"):
        cache = cache_for(recipe.student, student, master, data, folder)
    if cache is not None:
        context.reporter.line(f"{cache.path}: up to {cache.size_bytes / 1e9:.2f} GB of answers")
    task = DistillTask(student, master, recipe, data.validation, cache, context.team)
    context.reporter.line(f"distilling from {source.path}")
    seconds = _train(
        task, folder, config, recipe, data, context, device,
        title="distill", epochs=recipe.student.epochs, batch_size=recipe.student.batch_size,
    )  # fmt: skip
    found = fidelities(student, master, data.test, recipe.student, recipe.seed, context.team)
    folded = student.folded().eval()
    sample = to_float(data.validation.images[:1].to(device))
    results = {
        **{key: found["clean"][key] for key in ("accuracy", "agreement", "ece")},
        "r2": list(found["clean"]["r2"]),
        "fidelity": found,
        "teacher_accuracy": source.config["results"]["accuracy"],
        "test_images": len(data.test),
        "parameters": parameters(folded),
        "flops": flops(folded, sample),
        "seconds": seconds,
    }
    trained = _finish(folder, config, student, results, context)
    if cache is not None:
        cache.remove()
    return trained


def _on_data_of(recipe: Recipe, source: Run) -> Recipe:
    """The recipe on the data that a teacher was taught on.

    Raises:
        RecipeError: It asks for another data set or image size.
    """
    taught = {key: source.config["data"][key] for key in ("name", "image_size")}
    for key in {"name", "image_size"} & recipe.data.model_fields_set:
        asked = getattr(recipe.data, key)
        if asked is not None and asked != taught[key]:
            raise RecipeError(
                f"recipe {recipe.name}: data.{key} = {asked!r}, but {source.path} was taught on "
                f"{taught[key]!r}; expected the same: leave it away, or teach on {asked!r} first"
            )
    size = source.config["recipe"]["data"]["image_size"]
    data = recipe.data.model_copy(update={"name": taught["name"], "image_size": size})
    return recipe.model_copy(update={"data": data})


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The dtype of the weights; bfloat16 is for relaxing, never for keeping."""
    return torch.float64 if recipe.precision == "float64" else torch.float32


def inherit(content: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> Recipe:
    """A recipe with some keys changed; another student does not inherit what is one's own.

    Args:
        content: The recipe, as a run keeps it.
        overrides: Changes, as `{"student.epochs": 3}`; None values are skipped.
        source: Where the recipe is from, for error messages.

    Raises:
        RecipeError: A key is unknown or a value out of range.
    """
    return validate(with_keys(content, overrides), source)


def stem_of(recipe: Recipe, kind: str) -> str:
    """What the folder of a `teacher` or `student` is called, before its number."""
    label = recipe.student.name.replace(":", "-") if kind == "student" else recipe.model
    return f"{recipe.name}-{label}"


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
    made = (
        str(new_run_folder(out, context.runs, stem_of(recipe, kind))) if context.team.first else ""
    )
    folder = Path(context.team.tell(made.encode()).decode())
    config = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": now(),
        "finished": None,
        "recipe": recipe.model_dump(mode="json"),
        "data": describe(data),
        "model": model,
        **extra,
        "environment": {**environment(context.torch_device()), "processes": context.team.size},
    }
    if not context.team.first:
        return folder, config
    try:
        write_json(folder / CONFIG, config)
    except DiskError:  # nothing has begun
        (folder / CONFIG).unlink(missing_ok=True)
        with suppress(OSError):  # it may hold other files
            folder.rmdir()
        raise
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
    """Run the loop; returns the seconds spent in it, before interruptions too."""
    earlier = load_checkpoint(folder) if context.team.first else None
    before = 0.0 if earlier is None else spent(earlier)
    start = time.monotonic()
    source = recipe.data
    with training_in(folder, config["kind"]):
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
            team=context.team,
            track=context.track,
        )
    return before + time.monotonic() - start


def _finish(
    folder: Path,
    config: dict[str, Any],
    model: torch.nn.Module,
    results: dict[str, Any],
    context: Context,
) -> Trained:
    """Write weights, results and card; the run counts as finished with the last rename."""
    if not context.team.first:
        return Trained(Run(folder, {**config, "results": results}), results)
    with training_in(folder, config["kind"]):
        digest = save_weights(folder, model.state_dict())
        config = {**config, "finished": now(), "weights_sha256": digest, "results": results}
        atomic_write(folder / CARD, card(Run(folder, config)))
        config[FILES] = digests_of(folder, METRICS, CARD)
        write_json(folder / CONFIG, config)
        forget_checkpoints(folder)
    return Trained(Run(folder, config), results)
