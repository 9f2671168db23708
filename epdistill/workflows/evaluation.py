"""Attacks and corruptions on runs and exported files, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epdistill.data import DataSet, Split, fingerprint
from epdistill.errors import DiskError, EpdistillError, EvaluationError, LostTouchError, RunError
from epdistill.recipes import EvaluateRecipe
from epdistill.recipes.loading import validate
from epdistill.runs import Run, finished_runs, open_run
from epdistill.workflows.cards import refresh as refresh_card
from epdistill.workflows.context import Context, gpu_name
from epdistill.workflows.request import (
    Asked,
    chosen_suite,
    forget,
    open_together,
    unfinished_evaluation,
    with_strengths,
)
from epdistill.workflows.subjects import onnx_subject, run_subject
from epdistill.workflows.survival import resume_command, told

if TYPE_CHECKING:
    from epdistill.robustness.corruptions.cifar10c import Cifar10C
    from epdistill.robustness.crafted import Crafted
    from epdistill.robustness.subjects import Subject
    from epdistill.robustness.suites import QuickSuite

EXPORTED = "model.onnx"
# Images that go through a model at once; a GPU would idle on fewer.
BATCH_SIZES = {"cpu": 128, "cuda": 256}
TEST, VALIDATION = "test", "validation"


@dataclass(frozen=True)
class Evaluated:
    """Where an evaluation was written, and what it says.

    Attributes:
        folder: Holds results.json, results.csv and the pictures.
        results: The content of results.json.
    """

    folder: Path
    results: dict[str, Any]


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


def named_models(models: Sequence[Path]) -> tuple[Path, ...]:
    """The models that a user means: `shipped` is the teacher and the file of this package.

    Args:
        models: As typed; something of that name in the current folder comes first.
    """
    from epdistill.export import pretrained as exported
    from epdistill.teachers import pretrained as taught

    found: list[Path] = []
    for typed in models:
        # The two names stand for one path each, which is what was typed unless it is `shipped`.
        found += dict.fromkeys((taught.named(typed), exported.named(typed)))
    return tuple(found)


def evaluate(
    models: Sequence[Path],
    context: Context,
    *,
    asked: Asked = Asked(),
    recipe: EvaluateRecipe | None = None,
    out: Path | None = None,
    resume: bool = False,
    lent: tuple[Path, Path] | None = None,
) -> Evaluated:
    """Run a suite on several models over the same test images.

    Args:
        models: As `Asked.models`, which they replace.
        context: Folders, device, reporter.
        asked: What is to be evaluated.
        recipe: How hard; that of the first run without it.
        out: Folder for the results; numbered automatically without it.
        resume: Go on with the interrupted evaluation in `out`, or with the newest one.
        lent: One of the models, and a folder where the images made on it lie or are to be
            kept: evaluations with the same settings make them once.

    Raises:
        RunError: Models or data that do not fit together.
        EvaluationError: A model that cannot be judged, or a folder that cannot be resumed.
    """
    from epdistill.robustness.drawing import draw
    from epdistill.robustness.examples import NAME as EXAMPLES
    from epdistill.robustness.examples import (
        find_examples,
        telling_radius,
        write_examples,
    )
    from epdistill.robustness.harness import evaluate as run_harness
    from epdistill.robustness.journal import read_header, remove
    from epdistill.robustness.results import summary, write_results
    from epdistill.robustness.suites import QUICK, find_suite

    asked = replace(asked, models=named_models(models) or asked.models)
    resumed = unfinished_evaluation(context, out) if resume else None
    if resumed is not None:
        asked = asked.over(Asked.from_json(read_header(resumed)))
    name = find_suite(asked.suite or QUICK).name
    paths = list(asked.models) or default_models(context)
    device = context.torch_device()
    subjects, runs = _open(paths, device, thorough=name != QUICK)
    chosen = asked.split or TEST
    if chosen not in (TEST, VALIDATION):
        raise EvaluationError(f"split {chosen!r}; expected {TEST} or {VALIDATION}")
    data = _common_data(runs, context, paths, chosen)
    split = data.test if chosen == TEST else data.validation
    _check_fit(subjects, data)
    content = validate(runs[0].config["recipe"], str(runs[0].path))
    how = with_strengths(recipe or content.evaluate, asked, name)
    suite = chosen_suite(name, how, horizons=bool(asked.horizons), attacks=asked.attacks)
    seed = content.seed if asked.seed is None else asked.seed
    limit = min(asked.limit or how.limit, len(split))
    official = _official(asked.corruptions)
    asked = replace(
        asked,
        models=tuple(paths),
        suite=suite.name,
        limit=limit,
        subset=asked.subset or suite.subset(),
        seed=seed,
        diagnose=bool(asked.diagnose),
        split=chosen,
    )
    header = _header(asked, suite, subjects, split, device, official)
    folder, journal = open_together(header, context, out, resumed)
    again = told(resume_command("evaluate", folder), lambda: "what was found out is kept")
    with again, journal, context.reporter.bar("evaluate", 1) as bar:
        for note in journal.notes:
            context.reporter.line(note)
        context.reporter.line(f"if interrupted: epdistill evaluate --resume --out {folder}")
        try:
            evaluation = run_harness(
                subjects,
                split.images,
                split.labels,
                suite=suite,
                limit=limit,
                subset=asked.subset,
                seed=seed,
                batch_size=BATCH_SIZES[device.type],
                progress=lambda what, done, total: bar.at(done, total, what),
                journal=journal,
                diagnose=bool(asked.diagnose),
                official=official,
                team=context.team,
                crafted=None if lent is None else _crafted(lent, header, paths, subjects),
            )
        except EpdistillError as error:
            # After those two a resumed evaluation does better; after others it fails alike.
            kept = isinstance(error, DiskError | LostTouchError)
            if journal.empty and context.team.first and not kept:
                forget(folder)
            raise
        evaluation = replace(evaluation, split=chosen)
        results = summary(evaluation)
        if not context.team.first:
            return Evaluated(folder, results)
        draw(results, folder)
        examples = find_examples(
            subjects,
            split.images,
            split.labels,
            numbers=evaluation.examples,
            classes=data.classes,
            ball=telling_radius(results, suite),
            suite=suite,
            seed=seed,
            split=chosen,
        )
        write_examples(examples, folder)
        # results.json comes last: with it the evaluation is complete.
        write_results(evaluation, folder, EXAMPLES)
        remove(folder)
    for run in runs:
        refresh_card(run.path, context.runs, folder)
    return Evaluated(folder, results)


def _header(
    asked: Asked,
    suite: QuickSuite,
    subjects: Sequence[Subject],
    split: Split,
    device: torch.device,
    official: Cifar10C | None,
) -> dict[str, Any]:
    """Everything that the figures depend on: a resumed evaluation must agree in all of it."""
    from epdistill.export.bench import hardware
    from epdistill.robustness.results import versions

    place = gpu_name(device) or hardware()["cpu"]
    return {
        **asked.to_json(),
        "settings": asdict(suite),
        "weights": {subject.name: subject.identity for subject in subjects},
        "data": fingerprint(split),
        "official": None if official is None else official.describe(),
        "batch_size": BATCH_SIZES[device.type],
        "device": f"{device.type}: {place}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _crafted(
    lent: tuple[Path, Path],
    header: Mapping[str, Any],
    paths: Sequence[Path],
    subjects: Sequence[Subject],
) -> Crafted:
    """The images of one model: good for every evaluation that differs in other models alone."""
    from epdistill.robustness.crafted import Crafted

    model, folder = lent
    facts = {key: value for key, value in header.items() if key not in ("models", "weights")}
    return Crafted(folder, subjects[paths.index(model)].identity, facts)


def _official(path: Path | None) -> Cifar10C | None:
    """The published arrays, each read once, so that all have a hash to be compared by."""
    if path is None:
        return None
    from epdistill.robustness.corruptions.cifar10c import open_cifar10c

    arrays = open_cifar10c(path)
    for name in arrays.names:
        arrays.load(name, 1, torch.arange(1))
    return arrays


def _open(
    paths: Sequence[Path], device: torch.device, *, thorough: bool
) -> tuple[list[Subject], list[Run]]:
    """What is evaluated, and the runs that tell on which data."""
    subjects, runs = [], []
    for path in paths:
        if path.suffix == ".onnx":
            subjects.append(onnx_subject(path))
            if (path.parent / "config.json").is_file():
                runs.append(open_run(path.parent))
        else:
            run = open_run(path)
            subjects.append(run_subject(run, device, thorough=thorough))
            runs.append(run)
    return subjects, runs


def _common_data(
    runs: Sequence[Run], context: Context, paths: Sequence[Path], split: str
) -> DataSet:
    """The data set that all runs share, and for the validation split also the way it was cut."""
    if not runs:
        raise RunError(
            f"none of {', '.join(map(str, paths))} lies in a run's folder, so the data set is "
            "unknown; expected at least one run among the models"
        )
    prints = {run.config["data"]["test_sha256"]: run for run in runs}
    if len(prints) > 1:
        names = ", ".join(f"{r.name}: {r.config['data']['name']}" for r in prints.values())
        raise RunError(
            f"the models were trained beside different test images ({names}); "
            "expected one data set: evaluate them apart"
        )
    keys = ("seed", "validation_fraction", "limit")
    cuts = {tuple(run.config["data"][key] for key in keys) for run in runs}
    if split == VALIDATION and len(cuts) > 1:
        raise RunError(
            f"the models were trained beside different validation images ({', '.join(keys)}: "
            f"{'; '.join(map(str, sorted(cuts, key=str)))}); expected one cut: what one of them "
            "has learnt from is no validation image"
        )
    return context.data_of(runs[0])


def _check_fit(subjects: Sequence[Subject], data: DataSet) -> None:
    """Every model takes these images and answers with these classes."""
    from epdistill.robustness.guards import check_logits
    from epdistill.robustness.units import named

    shape = (1, data.channels, data.image_size, data.image_size)
    for subject in subjects:
        with torch.no_grad(), named(subject.name):
            logits = check_logits(subject.predict(torch.zeros(shape, device=subject.device)), 1)
        if logits.shape[1] != len(data.classes):
            raise RunError(
                f"{subject.name} answers with {logits.shape[1]} classes; {data.name} has "
                f"{len(data.classes)}: evaluate it on its own data"
            )
