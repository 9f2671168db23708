"""From a run folder back to the model that lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from epdistill.errors import RunError
from epdistill.recipes import EP_CNN
from epdistill.runs import Run, load_weights

if TYPE_CHECKING:
    from epdistill.students.model import Student
    from epdistill.teachers.baselines.base import Baseline
    from epdistill.teachers.model import EPCNN


def model_name(run: Run) -> str:
    """Which teacher a run holds: `ep-cnn` or a baseline."""
    return str(run.config["model"].get("name", EP_CNN))


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
