"""Exporting runs, also to int8 and float16, and predicting with the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epdistill.data import DataSet, Split, batches, describe, to_float
from epdistill.errors import RecipeError, RunError
from epdistill.loading import load_epcnn, load_student, load_teacher, model_name
from epdistill.recipes import EP_CNN
from epdistill.runs import Run, finished_runs, newest_run, open_run
from epdistill.workflows.cards import refresh as refresh_card
from epdistill.workflows.context import Context, require_finished
from epdistill.workflows.evaluation import (
    BATCH_SIZES,
    EXPORTED,
    Evaluated,
    evaluate,
    exported_file,
)
from epdistill.workflows.measured import newest_robustness, robustness_of
from epdistill.workflows.request import Asked
from epdistill.workflows.subjects import file_name

if TYPE_CHECKING:
    from epdistill.export.onnx_export import ExportResult
    from epdistill.export.predict import Prediction
    from epdistill.export.reduced import ReducedResult
    from epdistill.export.triton import TritonModel

PARITY_IMAGES = 64
# Validation images on which int8 and float16 are judged. Where one label in twenty changes, the
# standard error of the points lost is .5 on 2,000 images, as large as what is allowed, and .3 on
# these.
JUDGED_IMAGES = 5000


@dataclass(frozen=True)
class Wanted:
    """What is to be exported beside the float32 file.

    Attributes:
        int8: A quantised file.
        fp16: A float16 file.
        pixels: All of them take uint8 (batch, H, W, C) instead of floats.
        max_drop: Points of top-1 accuracy that those two may lose.
        sweeps: Of a teacher's relaxation; the most of its own schedule when None.
        robustness: Attack all files on so many test images; not at all when None.
        triton: A model repository with all files.
    """

    int8: bool = False
    fp16: bool = False
    pixels: bool = False
    max_drop: float = 0.5
    sweeps: int | None = None
    robustness: int | None = None
    triton: bool = False


@dataclass(frozen=True)
class Exported:
    """What an export left behind.

    Attributes:
        run: Where the model comes from.
        result: The float32 file.
        reduced: The int8 and the float16 file, as far as wanted.
        evaluated: The attacks on all files, if wanted.
        triton: The models of the repository, if wanted.
    """

    run: Run
    result: ExportResult
    reduced: tuple[ReducedResult, ...]
    evaluated: Evaluated | None
    triton: tuple[TritonModel, ...] = ()


def reduced_file(path: Path, precision: str) -> Path:
    """Where the version of another precision of an exported file stands."""
    return path.with_name(f"{path.stem}-{precision}.onnx")


def export(
    context: Context,
    *,
    run: Path | None = None,
    out: Path | None = None,
    wanted: Wanted = Wanted(),
) -> Exported:
    """Export a run behind the parity gate: a student, a baseline, or a teacher's relaxation.

    Args:
        context: Folders, device, reporter.
        run: The run; the newest student without it.
        out: The float32 file to write; `model.onnx` in the run's folder without it. Files
            of other precisions stand beside it.
        wanted: What else is made.

    Raises:
        RunError: The run holds something that answers at random.
        RecipeError: What is wanted does not fit the run.
        ExportError, ParityError: A file cannot be made, or did not pass; it is not written.
    """
    source = require_finished(open_run(run) if run else newest_run(context.runs, "student"))
    path = out or exported_file(source)
    if path.suffix != ".onnx":
        raise RecipeError(f"--out {path}; expected a file name that ends in .onnx")
    relaxes = source.kind == "teacher" and model_name(source) == EP_CNN
    if relaxes and (wanted.int8 or wanted.fp16):
        raise RecipeError(
            f"{source.path} relaxes, and rounding takes it to other states; expected a student "
            "for --int8 and --fp16: type `epdistill distill` first"
        )
    if wanted.sweeps is not None and not relaxes:
        raise RecipeError(f"--sweeps for {source.path}, which does not relax; leave it out")
    data = context.data_of(source)
    with context.reporter.bar("export", 1):
        result = _float_file(source, path, data, context, wanted)
        reduced = _reduced_files(path, data, wanted, source.config["recipe"]["seed"])
    evaluated = None
    files = [path, *(found.path for found in reduced)]
    if wanted.robustness is not None:
        asked = Asked(suite="quick", limit=wanted.robustness)
        evaluated = evaluate([source.path, *files], context, asked=asked)
        for file in files:
            _add_robustness(file, evaluated)
    refresh_card(source.path, context.runs)
    models: tuple[TritonModel, ...] = ()
    if wanted.triton:
        from epdistill.export.triton import write_models

        models = write_models(files, path.parent / "triton")
    return Exported(source, result, reduced, evaluated, models)


def _float_file(
    source: Run, path: Path, data: DataSet, context: Context, wanted: Wanted
) -> ExportResult:
    """The float32 file of a run."""
    from epdistill.export.labelling import ROBUSTNESS_KEY, TEST_ACCURACY_KEY, text
    from epdistill.export.onnx_export import export_onnx, export_teacher

    results, weights = source.config["results"], source.config["weights_sha256"]
    figures: dict[str, Any] = {
        "test_accuracy": results["accuracy"],
        "test_images": results["test_images"],
    }
    metadata = {
        "data_set": str(data.name).partition(":")[0],
        "data_test_sha256": describe(data)["test_sha256"],
        TEST_ACCURACY_KEY: f"{results['accuracy']:.6f}",
    }
    robustness = newest_robustness(context.runs, source)
    if robustness is not None:
        figures["robustness"] = robustness
        metadata[ROBUSTNESS_KEY] = text(robustness)
    classes, images = data.classes, to_float(data.validation.images[:PARITY_IMAGES])
    if source.kind == "teacher" and model_name(source) == EP_CNN:
        teacher = load_epcnn(source)
        sweeps = wanted.sweeps or teacher.schedule.sweeps
        how = teacher.schedule
        metadata |= {
            "teacher_run": source.name,
            "teacher_weights_sha256": weights,
            "relaxation": f"{how.kind}, omega {how.omega:g}, {sweeps} sweeps, float32",
        }
        return export_teacher(
            teacher, path, sweeps=sweeps, classes=classes, images=images, metadata=metadata,
            pixels=wanted.pixels, figures={**figures, "sweeps": sweeps},
        )  # fmt: skip
    kind, model, origin = _feedforward(source)
    return export_onnx(
        model,
        path,
        image_shape=(data.channels, data.image_size, data.image_size),
        classes=classes,
        images=images,
        metadata={**metadata, **origin},
        kind=kind,
        pixels=wanted.pixels,
        figures=figures,
    )


def _feedforward(source: Run) -> tuple[str, torch.nn.Module, dict[str, str]]:
    """What kind of run, what is exported of it, and what the file says about its origin."""
    weights = source.config["weights_sha256"]
    if source.kind == "teacher":
        baseline = load_teacher(source)
        if baseline.stochastic:
            raise RunError(
                f"{source.path} is a {model_name(source)}, which answers at random; expected a "
                "network that answers alike every time: distill a student from it and export that"
            )
        about = {"baseline_run": source.name, "baseline": model_name(source)}
        return "baseline", baseline, {**about, "baseline_weights_sha256": weights}
    teacher = source.config["teacher"]
    return (
        "student",
        load_student(source).folded(),
        {
            "student_run": source.name,
            "student_weights_sha256": weights,
            "teacher_run": teacher["name"],
            "teacher_weights_sha256": teacher["weights_sha256"],
        },
    )


def _reduced_files(
    path: Path, data: DataSet, wanted: Wanted, seed: int
) -> tuple[ReducedResult, ...]:
    """The int8 and the float16 version of a float32 file."""
    if not (wanted.int8 or wanted.fp16):
        return ()
    from epdistill.export.half import halve
    from epdistill.export.quantise import calibration_choice, quantise
    from epdistill.export.reduced import read_source, ship

    content, manifest = read_source(path)
    judged = Split(data.validation.images[:JUDGED_IMAGES], data.validation.labels[:JUDGED_IMAGES])
    images, labels = to_float(judged.images[:]).numpy(), judged.labels.numpy()
    made = []
    if wanted.int8:
        chosen = calibration_choice(len(data.train.images), seed)
        made.append(
            quantise(
                content,
                manifest,
                calibration=to_float(data.train.images[torch.from_numpy(chosen)]).numpy(),
                images=images,
                labels=labels,
                max_drop=wanted.max_drop,
            )
        )
    if wanted.fp16:
        made.append(halve(content, manifest, images=images, labels=labels))
    # All are judged before any is written.
    written = []
    for reduced in made:
        file = reduced_file(path, reduced.precision)
        found = ship(reduced, file, manifest, images, max_drop=wanted.max_drop)
        written.append(_with_test_accuracy(found, data.test))
    return tuple(written)


def _with_test_accuracy(found: ReducedResult, test: Split) -> ReducedResult:
    """The file's own accuracy on the test images, measured once and put into its manifest."""
    from epdistill.export.manifest import write_manifest
    from epdistill.export.runtime import OnnxClassifier

    classifier = OnnxClassifier.open_checked(found.path, threads=torch.get_num_threads())
    right = sum(
        int((classifier(to_float(images)).argmax(1) == labels).sum())
        for images, labels in batches(test, BATCH_SIZES["cpu"], generator=None)
    )
    figures = {
        "test_accuracy": right / len(test.labels),
        "test_images": len(test.labels),
        **found.manifest.figures,
    }
    manifest = replace(found.manifest, figures=figures)
    write_manifest(found.path, manifest)
    return replace(found, manifest=manifest)


def _add_robustness(path: Path, evaluated: Evaluated) -> None:
    """Put what attacks on the very file found into its manifest and card."""
    from epdistill.export.manifest import manifest_path, read_manifest, write_manifest

    name = file_name(path)
    found = robustness_of(evaluated.results, name, "onnx", evaluated.folder.name)
    if found is None:
        raise RunError(f"{evaluated.folder} says nothing of {name}; expected it there")
    manifest = read_manifest(manifest_path(path))
    write_manifest(path, replace(manifest, figures={**manifest.figures, "robustness": found}))


def predict(
    context: Context, images: Sequence[Path], *, model: Path | None = None, top: int = 3
) -> tuple[Path, list[Prediction]]:
    """Labels and probabilities for image files.

    Args:
        context: Folders.
        images: PNG or JPEG files.
        model: The `.onnx` file, or `shipped`; the newest exported one without it.
        top: How many classes per image.
    """
    from epdistill.export.predict import predict_files
    from epdistill.export.pretrained import named
    from epdistill.export.runtime import OnnxClassifier

    path = newest_export(context) if model is None else named(model)
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
        "name an .onnx file, or `shipped` for the one that comes with the package"
    )
