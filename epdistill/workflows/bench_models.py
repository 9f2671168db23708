"""Who is timed: the models of a run, or untrained ones of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epdistill.data import DataSet, to_float
from epdistill.errors import RunError
from epdistill.loading import load_epcnn, load_student
from epdistill.recipes import Recipe
from epdistill.runs import Run, newest_run, open_run
from epdistill.workflows.context import Context, require_finished
from epdistill.workflows.deployment import reduced_file
from epdistill.workflows.evaluation import EXPORTED, exported_file

if TYPE_CHECKING:
    from epdistill.export.bench import Contender
    from epdistill.export.runtime import OnnxClassifier
    from epdistill.teachers.model import EPCNN

BATCH_SIZES = (1, 64)
PUBLISHED = "teacher, published 250 sweeps"
SETTLED = "teacher, relaxed to tolerance"
STUDENT = "student, torch"
COMPILED = "student, torch.compile"
ONNX = "student, onnxruntime"
INT8 = "student, onnxruntime int8"


@dataclass(frozen=True)
class Rival:
    """An exported file of another run, timed in the same rounds.

    Attributes:
        run: The name of its run.
        contender: What it is called in the results.
        onnx: The file, opened.
        facts: Of the contender, as in bench.json; operations as its run counted them.
    """

    run: str
    contender: str
    onnx: OnnxClassifier
    facts: dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """The models.

    Attributes:
        label: What it is called in the results.
        teacher: The teacher.
        student: The folded student, in eval mode.
        onnx: Its exported file, opened.
        int8: Its quantised file, or why there is none.
        images: float32 (N, C, H, W) in [0,1].
        sizes: Bytes of the exported files by contender.
        path: The student's run; None for untrained networks.
        rivals: Exported files of other runs.
    """

    label: str
    teacher: EPCNN
    student: torch.nn.Module
    onnx: OnnxClassifier
    int8: OnnxClassifier | str
    images: Tensor
    sizes: dict[str, int]
    path: Path | None = None
    rivals: tuple[Rival, ...] = ()


def _opened(run: Run, threads: int) -> dict[str, tuple[OnnxClassifier, int]]:
    """A finished run's exported file and its int8 version where there is one, with their bytes."""
    from epdistill.export.manifest import INT8 as PRECISION
    from epdistill.export.runtime import OnnxClassifier

    path = exported_file(require_finished(run))
    if not path.is_file():
        raise RunError(
            f"{run.path} has no {EXPORTED}; expected an exported run: "
            f"type `epdistill export {run.path}` first"
        )
    files = {ONNX: path, INT8: reduced_file(path, PRECISION)}
    return {
        name: (OnnxClassifier.open_checked(file, threads=threads), file.stat().st_size)
        for name, file in files.items()
        if file.is_file()
    }


def _rivals(run: Run, threads: int) -> list[Rival]:
    """The exported files of a run."""
    results = run.config["results"]
    return [
        Rival(
            run.name,
            f"{run.name}, {name.partition(', ')[2]}",
            onnx,
            {
                "flops_per_image": results["flops"],
                "parameters": results["parameters"],
                "size_bytes": size,
            },
        )
        for name, (onnx, size) in _opened(run, threads).items()
    ]


def trained(context: Context, run: Path | None, threads: int, beside: Sequence[Path] = ()) -> Timed:
    """The models of a student's run.

    Args:
        context: Folders.
        run: The run; the newest student's without it.
        threads: Of onnxruntime.
        beside: Further runs, of whatever kind, whose exported files are timed too.

    Raises:
        RunError: A run is unfinished or was not exported, two have one name, or one takes
            images of another size.
    """
    source = open_run(run, "student") if run else newest_run(context.runs, "student")
    files = _opened(source, threads)
    others = [open_run(other) for other in beside]
    for number, other in enumerate(others):
        if other.name in {source.name, *(before.name for before in others[:number])}:
            raise RunError(f"two runs are called {other.name}; expected names that tell them apart")
        shapes = [
            [one.config["data"][key] for key in ("channels", "image_size")]
            for one in (source, other)
        ]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"{other.path} takes images of {shapes[1][0]} channels and {shapes[1][1]} pixels; "
                f"expected {shapes[0][0]} and {shapes[0][1]}, as {source.path}"
            )
    return Timed(
        source.name,
        load_epcnn(open_run(Path(source.config["teacher"]["path"]), "teacher")),
        load_student(source).folded().eval(),
        files[ONNX][0],
        files[INT8][0]
        if INT8 in files
        else f"no int8 file: type `epdistill export {source.path} --int8`",
        to_float(context.data_of(source).test.images[: max(BATCH_SIZES)]),
        {name: size for name, (_, size) in files.items()},
        source.path,
        tuple(rival for other in others for rival in _rivals(other, threads)),
    )


def export_untrained(recipe: Recipe, folder: Path) -> tuple[Path, EPCNN, nn.Module, DataSet]:
    """An untrained student of a recipe as an exported file, for timing alone.

    Args:
        recipe: Whose networks; no data set is needed.
        folder: Where the file is written.

    Returns:
        The file, the teacher, the folded student, and noise of the data set's shapes.
    """
    from epdistill.export.onnx_export import export_onnx
    from epdistill.students.distill import build_student
    from epdistill.teachers.teach import build_teacher
    from epdistill.workflows.shapes import stand_in

    data = stand_in(recipe, images=max(BATCH_SIZES))
    teacher = build_teacher(recipe, data).eval()
    folded = build_student(recipe, teacher).folded().eval()
    path = folder / EXPORTED
    export_onnx(
        folded,
        path,
        image_shape=(data.channels, data.image_size, data.image_size),
        classes=data.classes,
        images=to_float(data.test.images[:16]),
        metadata={},
    )
    return path, teacher, folded, data


def untrained(recipe: Recipe, threads: int) -> Timed:
    """Untrained networks of a recipe, for timing alone; no data set is needed."""
    import tempfile

    from epdistill.export.quantise import SEARCHED, quantise
    from epdistill.export.reduced import read_source, ship
    from epdistill.export.runtime import OnnxClassifier

    with tempfile.TemporaryDirectory() as folder:
        path, teacher, folded, data = export_untrained(recipe, Path(folder))
        images, quantised = to_float(data.test.images[:]), Path(folder) / "int8.onnx"
        content, manifest = read_source(path)
        pixels, labels = images.numpy(), data.test.labels.numpy()
        # Untrained networks have no accuracy to lose.
        reduced = quantise(
            content, manifest, calibration=pixels[:16], images=pixels, labels=labels,
            max_drop=100.0, searched=SEARCHED[:1],
        )  # fmt: skip
        ship(reduced, quantised, manifest, pixels, max_drop=100.0)
        onnx, int8 = (OnnxClassifier.open_checked(file, threads=threads)
                      for file in (path, quantised))  # fmt: skip
        sizes = {ONNX: path.stat().st_size, INT8: quantised.stat().st_size}
    label = f"untrained networks of recipe {recipe.name}"
    return Timed(label, teacher, folded, onnx, int8, images, sizes)


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
