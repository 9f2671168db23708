"""Runs and exported files as the robustness harness sees them."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from epdistill.loading import load_student, load_teacher
from epdistill.runs import Run
from epdistill.workflows.context import require_finished

if TYPE_CHECKING:
    from epdistill.robustness.subjects import Horizons, Published, Subject
    from epdistill.teachers.model import EPCNN
    from epdistill.teachers.schedule import Schedule

SHORT_UNROLLS, LONG_UNROLL = (2, 5), 30


def teacher_views(teacher: EPCNN, *, thorough: bool) -> dict[str, nn.Module]:
    """The gradients an attacker may use against a teacher.

    Long unrolls saturate and look robust; the implicit gradient and short unrolls see
    through that. The attack's result is the worst case over all.

    Args:
        teacher: The model.
        thorough: Also a long unroll, and the gradient that two nudged phases estimate.
    """
    sweeps = (*SHORT_UNROLLS, LONG_UNROLL) if thorough else SHORT_UNROLLS
    views: dict[str, nn.Module] = {"implicit": teacher.with_gradient("implicit")}
    views |= {f"unrolled-{n}": teacher.with_gradient("unrolled-first", n) for n in sweeps}
    if thorough:
        views["ep"] = teacher.with_gradient("ep")
    return views


def teacher_horizons(teacher: EPCNN) -> Horizons:
    """The time inside a teacher: unrolls of any length, and answers read early."""
    from epdistill.robustness.subjects import Horizons
    from epdistill.teachers.schedule import Schedule

    unrolled = partial(teacher.with_gradient, "unrolled-first")
    after = partial(_read_after, teacher, teacher.schedule)
    settle = partial(_settle, teacher)
    # Without a tolerance every image gets all sweeps; that of new teachers serves then.
    return Horizons(unrolled, after, settle, teacher.schedule.tolerance or Schedule().tolerance)


def _read_after(teacher: EPCNN, schedule: Schedule, sweeps: int) -> EPCNN:
    """The teacher as it answers after exactly that many sweeps of a schedule."""
    return teacher.with_schedule(schedule.with_(tolerance=0.0, sweeps=sweeps))


def _settle(teacher: EPCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (N,) and all settled states (N,units) of images (N,C,H,W) in [0,1]."""
    with torch.no_grad():
        states = teacher.relax(images).states
        logits = teacher.network().answer(teacher.normalise(images), states)
    return logits.argmax(dim=1), torch.cat([state.flatten(1) for state in states], dim=1)


def teacher_published(teacher: EPCNN) -> Published:
    """The published attack and prediction: 70 unrolled and 250 synchronous sweeps."""
    from epdistill.robustness.paper import ATTACK_SWEEPS, CORRUPTED_SWEEPS, PREDICTION_SWEEPS
    from epdistill.robustness.subjects import Published
    from epdistill.teachers.schedule import PUBLISHED

    judge = _read_after(teacher, PUBLISHED, PREDICTION_SWEEPS)
    note = (
        f"attacked through {ATTACK_SWEEPS} unrolled synchronous sweeps, judged after "
        f"{PREDICTION_SWEEPS}, on corrupted images after {CORRUPTED_SWEEPS}; the adaptive cells "
        "are judged by the model's own schedule"
    )
    return Published(
        judge.with_gradient("unrolled-first", ATTACK_SWEEPS),
        judge,
        note,
        _read_after(teacher, PUBLISHED, CORRUPTED_SWEEPS),
    )


def run_subject(run: Run, device: torch.device, *, thorough: bool) -> Subject:
    """A finished run as the harness sees it; `thorough` as in `teacher_views`."""
    from epdistill.robustness.subjects import Subject, module_subject
    from epdistill.teachers.model import EPCNN

    require_finished(run)
    # The relaxation that defines a teacher's answer stands beside the weights.
    parts = [run.config["model"], run.config["weights_sha256"]]
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    model = load_teacher(run) if run.kind == "teacher" else load_student(run)
    model = model.to(device).requires_grad_(False)
    if not isinstance(model, EPCNN):
        # Students answer the same every time; a baseline says whether it does.
        random = bool(getattr(model, "stochastic", False))
        return module_subject(
            run.name, run.kind, model, device, stochastic=random, identity=identity
        )
    return Subject(
        run.name,
        run.kind,
        model,
        teacher_views(model, thorough=thorough),
        device,
        horizons=teacher_horizons(model),
        published=teacher_published(model),
        identity=identity,
    )


def onnx_subject(path: Path) -> Subject:
    """An exported file as the harness sees it: answers, no gradients."""
    from epdistill.export.runtime import OnnxClassifier
    from epdistill.robustness.subjects import Subject

    classifier = OnnxClassifier.open_checked(path, threads=torch.get_num_threads())
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    return Subject(file_name(path), "onnx", classifier, identity=identity)


def file_name(path: Path) -> str:
    """What an exported file is called in an evaluation: its folder and its name."""
    parent = path.parent.name
    return f"{parent}/{path.name}" if parent else path.name
