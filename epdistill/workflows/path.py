"""`epdistill run`: teach, distill, evaluate, export, bench and report in one go.

Its own folder holds `path.json`, which names the folder of every part as soon as the part
begins; a run that was stopped goes on from there with what is finished, half done or missing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdistill.errors import RecipeError, RunError
from epdistill.recipes import EP_CNN, Recipe
from epdistill.recipes.loading import validate
from epdistill.runs import CONFIG, new_run_folder, open_run, read_json, write_json
from epdistill.workflows.bench_models import ONNX, PUBLISHED, SETTLED
from epdistill.workflows.benchmark import Benched, bench
from epdistill.workflows.context import Context
from epdistill.workflows.deployment import export
from epdistill.workflows.evaluation import Evaluated, evaluate
from epdistill.workflows.report import report
from epdistill.workflows.request import STEM as EVALUATE
from epdistill.workflows.survival import offer
from epdistill.workflows.training import Trained, distill, stem_of, teach

STEM, PATH, SUMMARY = "report", "path.json", "summary.json"


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


@dataclass(frozen=True)
class _Parts:
    """The folder of the path, and where its parts lie.

    Attributes:
        folder: Holds path.json.
        content: That of path.json: the recipe, and by part its folder.
        context: Where new folders are made.
    """

    folder: Path
    content: dict[str, Any]
    context: Context

    def place(self, part: str, stem: str) -> Path:
        """The folder of a part, which is made and noted when it is first asked for."""
        if part not in self.content:
            made = new_run_folder(None, self.context.runs, stem)
            self.content[part] = str(made)
            write_json(self.folder / PATH, self.content)
        return Path(self.content[part])


def unfinished_path(context: Context, out: Path | None) -> Path:
    """The folder that `--resume` continues: `out`, or the newest unfinished path.

    Raises:
        RunError: There is none, or `out` is finished.
    """
    folders = [out] if out is not None else _unfinished(context)
    if not folders or not (folders[0] / PATH).is_file():
        where = context.runs if out is None else out
        raise RunError(
            f"no unfinished run of the whole path in {where}; expected one to --resume: name its "
            "folder with --out, or leave --resume out"
        )
    if (folders[0] / SUMMARY).is_file():
        raise RunError(f"{folders[0]} is finished; expected an unfinished one to --resume")
    return folders[0]


def _unfinished(context: Context) -> list[Path]:
    """The paths without a summary, the newest first."""
    found = sorted(
        context.runs.glob(f"*/{PATH}"), key=lambda path: (path.stat().st_mtime, path), reverse=True
    )
    return [path.parent for path in found if not (path.parent / SUMMARY).is_file()]


def _parts(recipe: Recipe | None, context: Context, out: Path | None) -> tuple[_Parts, Recipe]:
    """A new path, or without a recipe the one that goes on."""
    if recipe is not None:
        if out is None and (before := _unfinished(context)):
            offer(context, "run", before[0])
        folder = new_run_folder(out, context.runs, STEM)
        if (folder / PATH).exists():
            raise RunError(
                f"--out {folder} already holds a run of the whole path; expected another folder, "
                "or --resume to go on with it"
            )
        parts = _Parts(folder, {"recipe": recipe.model_dump(mode="json")}, context)
        write_json(folder / PATH, parts.content)
        return parts, recipe
    folder = unfinished_path(context, out)
    content = read_json(folder / PATH, "begin anew, without --resume")
    context.reporter.line(f"continuing {folder}")
    return _Parts(folder, content, context), validate(content["recipe"], str(folder / PATH))


def _taught(recipe: Recipe, parts: _Parts) -> Trained:
    place = parts.place("teacher", stem_of(recipe, "teacher"))
    if found := _finished(place):
        return found
    return teach(recipe, parts.context, out=place, resume=(place / CONFIG).is_file())


def _distilled(recipe: Recipe, parts: _Parts, teacher: Path) -> Trained:
    place = parts.place("student", stem_of(recipe, "student"))
    if found := _finished(place):
        return found
    going_on = (place / CONFIG).is_file()
    return distill(recipe, parts.context, teacher=teacher, out=place, resume=going_on)


def _finished(folder: Path) -> Trained | None:
    """The run in a folder if there is one and it is finished."""
    with suppress(RunError):
        run = open_run(folder)
        if run.config.get("finished"):
            return Trained(run, run.config["results"])
    return None


def _evaluated(parts: _Parts, models: list[Path]) -> Evaluated:
    from epdistill.robustness.journal import begun
    from epdistill.robustness.results import JSON_NAME, read_results

    place = parts.place("evaluation", EVALUATE)
    if (place / JSON_NAME).is_file():
        return Evaluated(place, read_results(place))
    return evaluate(models, parts.context, out=place, resume=begun(place))


def run_path(recipe: Recipe | None, context: Context, *, out: Path | None = None) -> Finished:
    """The whole path on a recipe.

    Args:
        recipe: What to do; None goes on with a path that was stopped.
        context: Folders, device, reporter.
        out: The folder of the summary and the report, numbered automatically without it; or
            the one that goes on, the newest unfinished one without it.

    Raises:
        RecipeError: The recipe's model is a baseline: speed is compared with a relaxation.
        RunError: There is nothing to go on with.
    """
    if recipe is not None and recipe.model != EP_CNN:
        raise RecipeError(
            f"recipe {recipe.name}: model = {recipe.model!r}; expected {EP_CNN} for the whole "
            "path: type `epdistill teach` and `epdistill distill` one after the other"
        )
    line = context.reporter.line
    parts, recipe = _parts(recipe, context, out)
    line(f"[bold]recipe {recipe.name}[/bold]: teach → distill → export → evaluate → bench")
    teacher = _taught(recipe, parts)
    student = _distilled(recipe, parts, teacher.run.path)
    # Again where it was done before: the same run gives the same bytes.
    exported = export(context, run=student.run.path).result
    evaluated = _evaluated(parts, [teacher.run.path, student.run.path, exported.path])
    benched = bench(context, run=student.run.path)
    folder = parts.folder
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
    write_json(folder / SUMMARY, summary)
    return Finished(teacher, student, evaluated, benched, summary)
