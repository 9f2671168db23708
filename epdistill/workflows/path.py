"""`epdistill run`: teach, distill, evaluate, export, bench and report in one go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdistill.errors import RecipeError
from epdistill.recipes import EP_CNN, Recipe
from epdistill.runs import new_run_folder, write_json
from epdistill.workflows.bench_models import ONNX, PUBLISHED, SETTLED
from epdistill.workflows.benchmark import Benched, bench
from epdistill.workflows.context import Context
from epdistill.workflows.deployment import export
from epdistill.workflows.evaluation import Evaluated, evaluate
from epdistill.workflows.report import report
from epdistill.workflows.training import Trained, distill, teach


@dataclass(frozen=True)
class Finished:
    """Everything the whole path left behind.

    Attributes:
        teacher: The teacher's run.
        student: The student's run.
        evaluated: Attacks and corruptions.
        benched: Timings.
        summary: The machine-readable closing facts (`--json`).
    """

    teacher: Trained
    student: Trained
    evaluated: Evaluated
    benched: Benched
    summary: dict[str, Any]


def speedup(content: dict[str, Any], name: str, batch_size: int) -> float:
    """How many times faster than the published teacher `name` was, per image."""
    for ratio in content["ratios"]:
        if ratio["name"] == name and ratio["batch_size"] == batch_size:
            return float(ratio["speedup"])
    raise KeyError(name)


def worst_case(model: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Worst-case accuracy by norm and radius, from one model of results.json."""
    table: dict[str, dict[str, float]] = {}
    for row in model["worst_case"]:
        table.setdefault(row["norm"], {})[f"{row['eps']:.5g}"] = row["accuracy"]
    return table


def run_path(recipe: Recipe, context: Context, *, out: Path | None = None) -> Finished:
    """The whole path on a recipe; `out` names the folder of the summary and the report.

    Raises:
        RecipeError: The recipe's model is a baseline: speed is compared with a relaxation.
    """
    if recipe.model != EP_CNN:
        raise RecipeError(
            f"recipe {recipe.name}: model = {recipe.model!r}; expected {EP_CNN} for the whole "
            "path: type `epdistill teach` and `epdistill distill` one after the other"
        )
    line = context.reporter.line
    line(f"[bold]recipe {recipe.name}[/bold]: teach → distill → export → evaluate → bench")
    teacher = teach(recipe, context)
    student = distill(recipe, context, teacher=teacher.run.path)
    exported = export(context, run=student.run.path).result
    evaluated = evaluate([teacher.run.path, student.run.path, exported.path], context)
    benched = bench(context, run=student.run.path)
    folder = new_run_folder(out, context.runs, "report")
    page = report(
        [teacher.run, student.run], folder / "report.html", evaluated=evaluated, benched=benched
    )
    models = {model["kind"]: model for model in evaluated.results["models"]}

    def robustness(kind: str) -> dict[str, Any]:
        model = models[kind]
        mean = model["corruption_mean"]
        return {
            "worst_case": worst_case(model),
            "corrupted": None if mean is None else mean["accuracy"],
        }

    content = benched.content
    summary = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "teacher": {**teacher.results, **robustness("teacher")},
        "student": {**student.results, **robustness("student")},
        "onnx": robustness("onnx"),
        "attacked_images": evaluated.results["n"],
        "speedup": {
            "student_over_published": speedup(content, ONNX, 1),
            "student_over_published_batch64": speedup(content, ONNX, 64),
            "student_over_settled": speedup(content, ONNX, 1) / speedup(content, SETTLED, 1),
            "settled_over_published": speedup(content, SETTLED, 1),
            "reference": PUBLISHED,
        },
        "parity": exported.parity.to_json(),
        "paths": {
            "teacher": str(teacher.run.path),
            "student": str(student.run.path),
            "onnx": str(exported.path),
            "results": str(evaluated.folder / "results.json"),
            "bench": str(benched.folder / "bench.json"),
            "report": str(page),
        },
    }
    write_json(folder / "summary.json", summary)
    return Finished(teacher, student, evaluated, benched, summary)
