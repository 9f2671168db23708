"""`epdistill report`: finds what was recorded about some runs, and writes one page of it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from epdistill import __version__
from epdistill.errors import EvaluationError, RunError
from epdistill.page.document import document
from epdistill.page.examples import examples
from epdistill.page.making import making
from epdistill.page.masking import masking
from epdistill.page.overview import overview
from epdistill.page.robustness import robustness
from epdistill.page.shipping import files, speed
from epdistill.page.training import training
from epdistill.robustness.examples import read_examples
from epdistill.runs import Run, atomic_write, newest_run, open_run
from epdistill.workflows.benchmark import Benched
from epdistill.workflows.commands import evaluation_command, export_command, training_command
from epdistill.workflows.context import now, require_finished
from epdistill.workflows.evaluation import Evaluated
from epdistill.workflows.evidence import Exports, exports_of, newest_bench
from epdistill.workflows.measured import newest_first

PAGE = "report.html"


def report_on(models: Sequence[Path], runs: Path, *, out: Path | None = None) -> Path:
    """Write the page about some runs with all that lies under `runs` about them.

    Args:
        models: The runs; the newest student with its teacher, or the newest teacher, without any.
        runs: In whose folders evaluations and timings are looked for.
        out: The HTML file; `report.html` in `runs` without it.

    Raises:
        RunError: No run, or one that is not finished.
    """
    chosen = [require_finished(open_run(path)) for path in models] or default_runs(runs)
    evaluated = newest_evaluation(chosen, runs)
    bench = next((found for run in chosen if (found := newest_bench(runs, run))), None)
    benched = None if bench is None else Benched(runs, bench)
    return report(chosen, out or runs / PAGE, evaluated=evaluated, benched=benched)


def default_runs(runs: Path) -> list[Run]:
    """The newest student after its teacher; without a student the newest teacher.

    Raises:
        RunError: There is no finished run.
    """
    try:
        student = newest_run(runs, "student")
    except RunError:
        return [newest_run(runs, "teacher")]  # a teacher alone is worth a page too
    try:
        teacher = open_run(Path(student.config["teacher"]["path"]), "teacher")
    except RunError:  # moved or thrown away
        return [student]
    return [require_finished(teacher), student]


def newest_evaluation(chosen: Sequence[Run], runs: Path) -> Evaluated | None:
    """The newest evaluation of most of the runs, later than their training; None without any."""
    from epdistill.robustness.results import JSON_NAME, read_results

    trained = {
        (run.name, run.kind): datetime.datetime.fromisoformat(run.config["finished"]).timestamp()
        for run in chosen
    }
    best: tuple[int, Evaluated | None] = (0, None)
    for when, path in newest_first(runs, JSON_NAME):
        try:
            results = read_results(path.parent)
        except EvaluationError:  # damaged, or of another version
            continue
        names = {(model["name"], model["kind"]) for model in results["models"]}
        count = sum(name in names and when > then for name, then in trained.items())
        if count > best[0]:
            best = (count, Evaluated(path.parent, results))
    return best[1]


def report(
    runs: Sequence[Run],
    path: Path,
    *,
    evaluated: Evaluated | None = None,
    benched: Benched | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        runs: Finished runs, teacher first.
        path: The HTML file.
        evaluated: Attacks and corruptions to show.
        benched: Timings to show.

    Raises:
        RunError: The page cannot be written there.
    """
    exports = [(run, export) for run in runs for export in exports_of(run)]
    results = None if evaluated is None else evaluated.results
    shown = None
    if evaluated is not None:
        try:
            shown = read_examples(evaluated.folder)
        except EvaluationError:  # an illustration is not worth an error
            shown = None
    timings = None if benched is None else benched.content
    lines = _commands(runs, exports, results, timings)
    sections = [
        ("runs", "Runs", overview(runs)),
        ("robustness", "Robustness", robustness(results)),
        ("images", "Images", examples(shown)),
        ("masking", "Masking", masking(results)),
        ("speed", "Speed", speed(timings)),
        ("files", "Files", files([(run.name, export) for run, export in exports])),
        ("training", "Training", training(runs)),
        ("again", "Make it again", making(runs, lines)),
    ]
    title = ", ".join(run.name for run in runs)
    foot = (
        f'<p class="soft">epdistill {escape(__version__)}, {now()[:16].replace("T", " ")} UTC</p>'
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, document(title, sections, foot))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); expected a writable place: "
            "name another one with --out"
        ) from error
    return path


def _commands(
    runs: Sequence[Run],
    exports: Sequence[tuple[Run, Exports]],
    results: dict[str, Any] | None,
    bench: dict[str, Any] | None,
) -> list[str]:
    """Everything that is typed to get to this page again, in order."""
    lines = [training_command(run) for run in runs]
    for run in runs:
        made = [export.manifest.precision for owner, export in exports if owner is run]
        if made:
            reduced = [precision for precision in made if precision != "float32"]
            lines.append(export_command(str(run.path), reduced))
    places = {run.name: str(run.path) for run in runs}
    # An exported file is called by its folder and its name.
    places |= {f"{run.name}/{found.name}": str(run.path / found.name) for run, found in exports}
    if results is not None:
        models = [places.get(model["name"], model["name"]) for model in results["models"]]
        lines.append(evaluation_command(results, models))
    if bench is not None:
        lines.append(f"epdistill bench {places.get(bench['models'], bench['models'])}")
    return [*lines, f"epdistill report {' '.join(str(run.path) for run in runs)}"]
