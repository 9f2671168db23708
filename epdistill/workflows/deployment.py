"""Exporting students, predicting with files, and timing everything in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from epdistill import __version__
from epdistill.data import describe, to_float
from epdistill.errors import RecipeError, RunError
from epdistill.loading import load_epcnn, load_student, load_teacher, model_name
from epdistill.recipes import EP_CNN, Recipe
from epdistill.runs import Run, finished_runs, new_run_folder, newest_run, open_run, write_json
from epdistill.workflows.context import Context, require_finished
from epdistill.workflows.evaluation import EXPORTED, exported_file

if TYPE_CHECKING:
    from epdistill.export.bench import Contender
    from epdistill.export.onnx_export import ExportResult
    from epdistill.export.predict import Prediction
    from epdistill.teachers.model import EPCNN

PARITY_IMAGES = 64
PUBLISHED = "teacher, published 250 sweeps"
SETTLED = "teacher, relaxed to tolerance"
STUDENT = "student, torch"
ONNX = "student, onnxruntime"


def export(
    context: Context, *, run: Path | None = None, out: Path | None = None
) -> tuple[Run, ExportResult]:
    """Export a student, or a baseline that answers without chance, behind the parity gate.

    Args:
        context: Folders, device, reporter.
        run: Its run; the newest student without it.
        out: The file to write; `model.onnx` in the run's folder without it.

    Raises:
        RunError: The run holds something that relaxes or answers at random.
    """
    from epdistill.export.onnx_export import export_onnx

    source = require_finished(open_run(run) if run else newest_run(context.runs, "student"))
    model, origin = _deployable(source)
    data = context.data_of(source)
    path = out or exported_file(source)
    if path.suffix != ".onnx":
        raise RecipeError(f"--out {path}; expected a file name that ends in .onnx")
    results = source.config["results"]
    metadata = {
        "data_set": str(data.name).partition(":")[0],
        "data_test_sha256": describe(data)["test_sha256"],
        **origin,
        "test_accuracy": f"{results['accuracy']:.6f}",
        "epdistill": __version__,
    }
    with context.reporter.bar("export", 1):
        result = export_onnx(
            model,
            path,
            image_shape=(data.channels, data.image_size, data.image_size),
            classes=data.classes,
            images=to_float(data.validation.images[:PARITY_IMAGES]),
            metadata=metadata,
        )
    return source, result


def _deployable(source: Run) -> tuple[torch.nn.Module, dict[str, str]]:
    """What is exported of a run, and what the file says about where it comes from."""
    weights = source.config["weights_sha256"]
    if source.kind == "teacher" and model_name(source) != EP_CNN:
        baseline = load_teacher(source)
        if baseline.stochastic:
            raise RunError(
                f"{source.path} is a {model_name(source)}, which answers at random; expected a "
                "network that answers alike every time: distill a student from it and export that"
            )
        return baseline, {"baseline_run": source.name, "baseline_weights_sha256": weights}
    student = load_student(source)
    teacher = source.config["teacher"]
    return student.folded(), {
        "student_run": source.name,
        "student_weights_sha256": weights,
        "teacher_run": teacher["name"],
        "teacher_weights_sha256": teacher["weights_sha256"],
    }


def predict(
    context: Context, images: Sequence[Path], *, model: Path | None = None, top: int = 3
) -> tuple[Path, list[Prediction]]:
    """Labels and probabilities for image files.

    Args:
        context: Folders.
        images: PNG or JPEG files.
        model: The `.onnx` file; the newest exported one without it.
        top: How many classes per image.
    """
    from epdistill.export.predict import predict_files
    from epdistill.export.runtime import OnnxClassifier

    path = model or newest_export(context)
    classifier = OnnxClassifier.open_checked(path, threads=torch.get_num_threads())
    return path, predict_files(classifier, list(images), top)


def newest_export(context: Context) -> Path:
    """The exported file of the newest student that has one.

    Raises:
        RunError: There is none.
    """
    for run in finished_runs(context.runs, "student"):
        if exported_file(run).is_file():
            return exported_file(run)
    raise RunError(
        f"no {EXPORTED} under {context.runs}; expected one: type `epdistill export` first, "
        "or name an .onnx file"
    )


@dataclass(frozen=True)
class Benched:
    """Where the timings were written, and what they say.

    Attributes:
        folder: Holds bench.json.
        content: The content of bench.json.
    """

    folder: Path
    content: dict[str, Any]


def teacher_contenders(teacher: EPCNN) -> list[Contender]:
    """The teacher as published (autograd of Phi, 250 synchronous sweeps), and as relaxed here."""
    from epdistill.export.bench import Contender, torch_contender
    from epdistill.teachers.reference import reference_logits

    def published(images: Tensor) -> Tensor:
        return reference_logits(teacher.network(), teacher.normalise(images))

    return [Contender(PUBLISHED, published), torch_contender(settling(teacher), SETTLED)]


def settling(teacher: EPCNN) -> EPCNN:
    """The teacher as it relaxes to a tolerance: by its own schedule if that has one.

    The published schedule has none (a fixed number of synchronous sweeps); then red-black to 1e-4.
    """
    from epdistill.teachers.schedule import Schedule

    if teacher.schedule.tolerance > 0:
        return teacher
    return teacher.with_schedule(Schedule(omega=1.3, tolerance=1e-4))


def bench(
    context: Context,
    *,
    run: Path | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    rounds: int = 20,
    max_seconds: float = 20.0,
) -> Benched:
    """Time teacher, student and exported student per image, interleaved, in one run.

    Args:
        context: Folders, device, reporter.
        run: A student's run; the newest one without it.
        recipe: Time freshly initialised networks of this recipe instead of a run.
        out: Folder for bench.json; numbered automatically without it.
        rounds: Most rounds of measurement.
        max_seconds: Time spent per contender and batch size, roughly.
    """
    from epdistill.export.bench import Contender, to_json, torch_contender
    from epdistill.export.bench import bench as run_bench
    from epdistill.export.runtime import OnnxClassifier

    if recipe is not None:
        teacher, folded, classifier, label = _fresh(recipe, context)
        images = torch.rand(
            64, teacher.architecture.in_channels, *(teacher.architecture.image_size,) * 2,
            generator=torch.Generator().manual_seed(recipe.seed),
        )  # fmt: skip
    else:
        source = open_run(run, "student") if run else newest_run(context.runs, "student")
        require_finished(source)
        path = exported_file(source)
        if not path.is_file():
            raise RunError(
                f"{source.path} has no {EXPORTED}; expected an exported student: "
                f"type `epdistill export {source.path}` first"
            )
        teacher = load_epcnn(open_run(Path(source.config["teacher"]["path"]), "teacher"))
        folded = load_student(source).folded().eval()
        classifier = OnnxClassifier.open_checked(path, threads=torch.get_num_threads())
        images = to_float(context.data_of(source).test.images[:64])
        label = source.name
    contenders = [
        *teacher_contenders(teacher),
        torch_contender(folded, STUDENT),
        Contender(ONNX, lambda batch: classifier.run(batch.numpy())),
    ]
    with context.reporter.bar("bench", 1):
        rows = run_bench(contenders, images, rounds=rounds, max_seconds=max_seconds)
    with torch.no_grad():
        relaxing = settling(teacher)
        settled = relaxing.relax(images).certificate
    content = {
        "models": label,
        "settling": {
            "sweeps_mean": float(settled.sweeps.double().mean()),
            "converged": float(settled.converged.double().mean()),
            "tolerance": relaxing.schedule.tolerance,
            "schedule": relaxing.schedule.to_dict(),
        },
        "parameters": {
            "teacher": sum(p.numel() for p in teacher.parameters()),
            "student": sum(p.numel() for p in folded.parameters()),
        },
        **to_json(rows, PUBLISHED),
    }
    folder = new_run_folder(out, context.runs, "bench")
    write_json(folder / "bench.json", content)
    return Benched(folder, content)


def speed_rows(content: dict[str, Any]) -> list[list[str]]:
    """bench.json as text: what, batch, ms per image, times the published teacher (quartiles)."""
    ratios = {(ratio["name"], ratio["batch_size"]): ratio for ratio in content["ratios"]}
    rows = []
    for row in content["rows"]:
        ratio = ratios.get((row["name"], row["batch_size"]))
        shown = f"{ratio['speedup']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})" if ratio else "1"
        rows.append(
            [row["name"], str(row["batch_size"]), f"{1e3 * row['seconds_per_image']:.3f}", shown]
        )
    return rows


def _fresh(recipe: Recipe, context: Context) -> tuple[EPCNN, torch.nn.Module, Any, str]:
    """Untrained networks of a recipe, for timing alone; no data set is needed."""
    import tempfile

    from epdistill.export.onnx_export import export_onnx
    from epdistill.export.runtime import OnnxClassifier
    from epdistill.students.distill import build_student
    from epdistill.teachers.teach import build_teacher
    from epdistill.workflows.shapes import stand_in

    data = stand_in(recipe)
    teacher = build_teacher(recipe, data).eval()
    folded = build_student(recipe, teacher).folded().eval()
    with tempfile.TemporaryDirectory() as folder:
        result = export_onnx(
            folded,
            Path(folder) / EXPORTED,
            image_shape=(data.channels, data.image_size, data.image_size),
            classes=data.classes,
            images=to_float(data.test.images),
            metadata={},
        )
        classifier = OnnxClassifier.open_checked(result.path, threads=torch.get_num_threads())
    return teacher, folded, classifier, f"untrained networks of recipe {recipe.name}"
