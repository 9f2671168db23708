"""From a run folder or an exported file back to the model that lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from epdistill.errors import RunError
from epdistill.recipes import EP_CNN
from epdistill.runs import CONFIG, Run, load_weights, open_run

if TYPE_CHECKING:
    from epdistill.export.runtime import OnnxClassifier
    from epdistill.students.model import Student
    from epdistill.teachers.baselines.base import Baseline
    from epdistill.teachers.model import EPCNN


def model_name(run: Run) -> str:
    """Which teacher a run holds: `ep-cnn` or a baseline."""
    return str(run.config["model"].get("name", EP_CNN))


def load(path: str | Path) -> EPCNN | Baseline | Student | OnnxClassifier:
    """The model that lies somewhere, ready to answer; nothing is fetched from anywhere.

    Args:
        path: A run's folder (on this machine or copied from another), or an exported `.onnx`
            file. A folder without a run that holds one exported file gives that file.

    Returns:
        Images float32 (N, C, H, W) in [0,1] to logits (N, K), on the CPU: a torch module in
        eval mode, or for a file an `OnnxClassifier`, which takes numpy arrays as well.

    Raises:
        RunError: No run, an unfinished or a damaged one.
        ExportError: A file that is damaged, or that its manifest does not vouch for.
    """
    place = Path(path)
    if place.is_dir() and not (place / CONFIG).is_file():
        files = sorted(place.glob("*.onnx"))
        if len(files) == 1:
            place = files[0]
    if place.suffix == ".onnx":
        from epdistill.export.runtime import OnnxClassifier

        return OnnxClassifier.open_checked(place)
    run = open_run(place)
    if not run.config.get("finished"):
        raise RunError(
            f"{run.path} is not finished; expected a finished run: continue it with "
            f"`epdistill {'teach' if run.kind == 'teacher' else 'distill'} --resume --out "
            f"{run.path}`"
        )
    return load_teacher(run) if run.kind == "teacher" else load_student(run)


def load_teacher(run: Run) -> EPCNN | Baseline:
    """The teacher of a finished run, an EP-CNN or a baseline, in eval mode on the CPU.

    Raises:
        RunError: The run is of another kind, unfinished or damaged.
    """
    from epdistill.teachers.baselines.registry import baseline_from

    _expect(run, "teacher")
    if model_name(run) == EP_CNN:
        return load_epcnn(run)
    weights = load_weights(run)
    try:
        return baseline_from(run.config["model"], weights)
    except (KeyError, TypeError, RuntimeError, StopIteration) as error:
        raise _unfit(run.path, error) from error


def load_epcnn(run: Run) -> EPCNN:
    """The EP-CNN of a finished run, in eval mode on the CPU: for what needs its dynamics.

    Raises:
        RunError: The run holds something else, is unfinished or damaged.
    """
    from epdistill.teachers.architecture import Architecture
    from epdistill.teachers.model import EPCNN
    from epdistill.teachers.schedule import Schedule

    _expect(run, "teacher")
    if model_name(run) != EP_CNN:
        raise RunError(
            f"{run.path} is a {model_name(run)}, which does not relax; expected an ep-cnn: "
            "name the run of one"
        )
    weights = load_weights(run)
    try:
        model = run.config["model"]
        teacher = EPCNN(
            Architecture.from_dict(model["architecture"]), Schedule(**model["schedule"])
        )
        teacher.to(next(iter(weights.values())).dtype)
        teacher.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError, StopIteration) as error:
        raise _unfit(run.path, error) from error
    return teacher.eval()


def load_student(run: Run) -> Student:
    """The student of a finished run, in eval mode on the CPU.

    Raises:
        RunError: The run is of another kind, unfinished or damaged.
    """
    from epdistill.students.model import student_from

    _expect(run, "student")
    weights = load_weights(run)
    try:
        return student_from(run.config, weights)
    except (KeyError, TypeError) as error:
        raise _unfit(run.path, error) from error


def _expect(run: Run, kind: str) -> None:
    if run.kind != kind:
        raise RunError(f"{run.path} is a {run.kind} run; expected a {kind} run")


def _unfit(path: Path, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(f"{path}: config.json and model.safetensors do not fit together ({reason})")
