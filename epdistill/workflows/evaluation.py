"""Attacks and corruptions on runs and exported files, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epdistill.data import DataSet
from epdistill.errors import RunError
from epdistill.loading import load_student, load_teacher
from epdistill.recipes import EvaluateRecipe
from epdistill.recipes.loading import validate
from epdistill.runs import Run, finished_runs, new_run_folder, open_run
from epdistill.workflows.context import Context, require_finished

if TYPE_CHECKING:
    from epdistill.robustness.subjects import Subject
    from epdistill.teachers.model import EPCNN

EXPORTED = "model.onnx"
SHORT_UNROLL, LONG_UNROLL = 5, 30


@dataclass(frozen=True)
class Evaluated:
    """Where an evaluation was written, and what it says.

    Attributes:
        folder: Holds results.json, results.csv and accuracy-eps.png.
        results: The content of results.json.
    """

    folder: Path
    results: dict[str, Any]


def teacher_views(teacher: EPCNN) -> dict[str, nn.Module]:
    """The gradients an attacker may use against a teacher.

    Long unrolls saturate and look robust; the implicit gradient and a short
    unroll see through that. The attack's result is the worst case over all.
    """
    return {
        "implicit": teacher.with_gradient("implicit"),
        f"unrolled-{SHORT_UNROLL}": teacher.with_gradient("unrolled-first", SHORT_UNROLL),
        f"unrolled-{LONG_UNROLL}": teacher.with_gradient("unrolled-first", LONG_UNROLL),
    }


def run_subject(run: Run, device: torch.device) -> Subject:
    """A finished run as the harness sees it."""
    from epdistill.robustness.subjects import Subject, module_subject

    require_finished(run)
    if run.kind == "teacher":
        teacher = load_teacher(run).to(device).requires_grad_(False)
        return Subject(run.name, "teacher", teacher, teacher_views(teacher), device)
    student = load_student(run).to(device).requires_grad_(False)
    return module_subject(run.name, "student", student, device)


def onnx_subject(path: Path) -> Subject:
    """An exported file as the harness sees it: answers, no gradients."""
    from epdistill.export.runtime import OnnxClassifier
    from epdistill.robustness.subjects import Subject

    classifier = OnnxClassifier.open_checked(path, threads=torch.get_num_threads())
    parent = path.parent.name
    return Subject(f"{parent}/{path.name}" if parent else path.name, "onnx", classifier)


def exported_file(run: Run) -> Path:
    """Where `export` puts a run's file."""
    return run.path / EXPORTED


def default_models(context: Context) -> list[Path]:
    """The newest student with its teacher and its exported file, or the newest teacher alone."""
    students = finished_runs(context.runs, "student")
    if students:
        student = students[0]
        models = [Path(student.config["teacher"]["path"]), student.path]
        if exported_file(student).is_file():
            models.append(exported_file(student))
        return [model for model in models if model.exists()]
    teachers = finished_runs(context.runs, "teacher")
    if not teachers:
        raise RunError(
            f"no finished run under {context.runs}; expected one: type `epdistill teach` first, "
            "or name runs or .onnx files"
        )
    return [teachers[0].path]


def evaluate(
    models: Sequence[Path],
    context: Context,
    *,
    recipe: EvaluateRecipe | None = None,
    limit: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
) -> Evaluated:
    """Run the quick suite on several models over the same test images.

    Args:
        models: Run folders and `.onnx` files; without any, the newest student, its
            teacher and its exported file.
        context: Folders, device, reporter.
        recipe: How hard; that of the first run without it.
        limit: Test images, overriding the recipe.
        seed: Of the choice of images and of every attack; the run's own without it.
        out: Folder for the results; numbered automatically without it.
    """
    from epdistill.robustness.attacks import PGDSettings, SquareSettings
    from epdistill.robustness.harness import evaluate as run_harness
    from epdistill.robustness.results import plot_accuracy_eps, summary, write_results
    from epdistill.robustness.suites import QuickSuite

    paths = list(models) or default_models(context)
    device = context.torch_device()
    subjects, runs = [], []
    for path in paths:
        if path.suffix == ".onnx":
            subjects.append(onnx_subject(path))
            if (path.parent / "config.json").is_file():
                runs.append(open_run(path.parent))
        else:
            run = open_run(path)
            subjects.append(run_subject(run, device))
            runs.append(run)
    if not runs:
        raise RunError(
            f"none of {', '.join(map(str, paths))} lies in a run's folder, so the data set is "
            "unknown; expected at least one run among the models"
        )
    data = _common_data(runs, context)
    _check_fit(subjects, data)
    content = validate(runs[0].config["recipe"], str(runs[0].path))
    how = recipe or content.evaluate
    suite = QuickSuite(
        linf=tuple(how.linf),
        l2=tuple(how.l2),
        pgd=PGDSettings(steps=how.steps),
        square=SquareSettings(queries=how.queries),
    )
    with context.reporter.bar("evaluate", 1) as bar:
        evaluation = run_harness(
            subjects,
            data.test.images,
            data.test.labels,
            suite=suite,
            limit=min(limit or how.limit, len(data.test)),
            seed=content.seed if seed is None else seed,
            progress=lambda what, done, total: bar.at(done, total, what),
        )
    folder = new_run_folder(out, context.runs, "evaluate")
    write_results(evaluation, folder)
    plot_accuracy_eps(evaluation, folder / "accuracy-eps.png")
    return Evaluated(folder, summary(evaluation))


def threat_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """results.json as text: clean, worst case per norm and radius, corruptions; in percent.

    Args:
        models: The models of results.json; one column each after the threat's name.
    """

    def share(row: dict[str, Any]) -> str:
        low, high = row["ci95"]
        return f"{100 * row['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    rows = [["clean", *(share(model["clean"]) for model in models)]]
    cases = [{(row["norm"], row["eps"]): row for row in model["worst_case"]} for model in models]
    seen = {case for found in cases for case in found}
    for norm, eps in sorted(seen, key=lambda case: (case[0] != "linf", case[1])):
        shown = f"Linf {255 * eps:.3g}/255" if norm == "linf" else f"L2 {eps:.3g}"
        # A model that nothing attacked is not robust: it has no figure.
        cells = [share(found[norm, eps]) if (norm, eps) in found else "-" for found in cases]
        rows.append([f"worst, {shown}", *cells])
    means = [model["corruption_mean"] for model in models]
    if all(means):
        rows.append(["corrupted, mean", *(f"{100 * mean['accuracy']:.1f}" for mean in means)])
    return rows


def _common_data(runs: Sequence[Run], context: Context) -> DataSet:
    """The data set that all runs share."""
    prints = {run.config["data"]["test_sha256"]: run for run in runs}
    if len(prints) > 1:
        names = ", ".join(f"{r.name}: {r.config['data']['name']}" for r in prints.values())
        raise RunError(
            f"the models were trained beside different test images ({names}); "
            "expected one data set: evaluate them apart"
        )
    return context.data_of(runs[0])


def _check_fit(subjects: Sequence[Subject], data: DataSet) -> None:
    """Every model takes these images and answers with these classes."""
    shape = (1, data.channels, data.image_size, data.image_size)
    for subject in subjects:
        with torch.no_grad():
            logits = subject.predict(torch.zeros(shape, device=subject.device))
        if logits.shape != (1, len(data.classes)):
            raise RunError(
                f"{subject.name} answers with {logits.shape[1]} classes; {data.name} has "
                f"{len(data.classes)}: evaluate it on its own data"
            )
