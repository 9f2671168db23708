"""Checks on models whose answer is an equilibrium: 24 to 26."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, WARN
from epdistill.robustness.diagnostics.findings import Outcome, grade, worst_status
from epdistill.robustness.diagnostics.numerics import replace_views, skipped
from epdistill.robustness.diagnostics.probe import Probe
from epdistill.robustness.diagnostics.softened import SoftenedUnroll

if TYPE_CHECKING:
    from epdistill.teachers.model import EPCNN
    from epdistill.teachers.schedule import Relaxed, Schedule

NOT_A_TEACHER = "the subject is not an EP-CNN judged in torch"


def prediction_sweeps(teacher: EPCNN, relaxed: Relaxed) -> int:
    """T_pred: the sweeps that the slowest of some images needed, or the schedule's fixed number."""
    if teacher.schedule.tolerance == 0:
        return teacher.schedule.sweeps
    return max(1, int(relaxed.certificate.sweeps.max()))


def attack_horizon(probe: Probe) -> Outcome:
    """Check 24: one and the same attack along every gradient that an attacker could take.

    The implicit gradient and unrolls of T_pred sweeps and more are exact: they belong to
    the function that is judged. If a gradient of another model (fewer sweeps) leads to
    more errors, the exact ones mislead, and accuracies that rest on them are too high.
    """
    teacher = probe.teacher
    if teacher is None:
        return skipped(NOT_A_TEACHER)
    rows = (~probe.clean_wrong).nonzero().flatten()
    if len(rows) == 0:
        return Outcome(PASS, None, "no image is right when clean")
    longest, slack = probe.settings.longest_unroll, probe.settings.slack
    full = prediction_sweeps(teacher, teacher.relax(probe.images[rows]))
    at, twice = (_unrolled(min(sweeps, longest)) for sweeps in (full, 2 * full))
    wanted = {min(sweeps, longest) for sweeps in (*probe.settings.horizons, full, 2 * full)}
    views: dict[str, EPCNN] = {"implicit": teacher.with_gradient("implicit")}
    for sweeps in sorted(wanted):
        views[_unrolled(sweeps)] = teacher.with_gradient("unrolled-first", sweeps)
    broken = {name: _broken_along(probe, rows, view) for name, view in views.items()}
    exact = ["implicit", *(_unrolled(t) for t in sorted(wanted) if t >= full)]
    left = {name: int((~found[rows]).sum()) for name, found in broken.items()}

    together = torch.stack(list(broken.values())).any(dim=0)
    beyond = probe.beats("attack horizons", together)
    best = min(left, key=lambda name: left[name])
    misled = max(left[name] for name in exact) - left[best]
    falling = left[at] - left[twice]
    status = worst_status(
        *(grade(max(0, count), probe.n, slack) for count in (beyond, misled, falling))
    )
    detail = f"T_pred = {full}; {best} leaves {misled} images fewer than an exact gradient; "
    detail += f"{beyond} broken beyond the reported attack"
    if falling > 0:
        detail += f"; {twice} leaves {falling} fewer than {at}"
    if 2 * full > longest:
        detail += f"; no unroll beyond {longest} sweeps was tried"
        status = worst_status(status, WARN)
    table = [(name, count, probe.n) for name, count in left.items()]
    table.append(("worst case", int((~probe.worst).sum()), probe.n))
    return Outcome(status, left[best] / probe.n, detail, tuple(table))


def _unrolled(sweeps: int) -> str:
    return f"unrolled-{sweeps}"


def _broken_along(probe: Probe, rows: Tensor, view: EPCNN) -> Tensor:
    """What PGD along one gradient breaks at the radius of comparison, (N,) bool."""
    other = replace_views(probe, {"horizon": view})
    steps = probe.settings.horizon_steps
    broken, _ = other.white(
        probe.eps,
        rows,
        lambda name, left: other.pgd(name, probe.eps, left, use="horizon", steps=steps),
    )
    return broken


def equilibrium(probe: Probe) -> Outcome:
    """Check 25: do adversarial inputs settle, and does the answer hang on when and whence."""
    teacher = probe.teacher
    if teacher is None:
        return skipped(NOT_A_TEACHER)
    adversarial = probe.reported[1]
    clean, hit = teacher.relax(probe.images), teacher.relax(adversarial)
    bound = max(teacher.schedule.tolerance, probe.settings.residual)
    loose = [int((it.certificate.residual > bound).sum()) for it in (clean, hit)]
    worst = float(hit.certificate.residual.max())
    detail = f"unsettled (residual > {bound:.1g}): {loose[0]} clean, {loose[1]} adversarial of "
    detail += f"{probe.n}, largest residual {worst:.2g}"
    slack = probe.settings.slack
    status = grade(max(0, loose[1] - loose[0]), probe.n, slack)
    if status == PASS and grade(loose[0], probe.n, slack) == FAIL:
        status = WARN

    labels = probe.labels
    answers = _labels(teacher, adversarial, hit)
    full = prediction_sweeps(teacher, hit)
    told, drift = [], 0
    for sweeps in sorted({max(1, full // 2), full, 2 * full, 4 * full}):
        schedule = teacher.schedule.with_(tolerance=0.0, sweeps=sweeps)
        there = _labels(teacher, adversarial, teacher.relax(adversarial, schedule))
        told.append(f"{sweeps}: {float((there == labels).double().mean()):.3f}")
        if sweeps >= full:
            drift = max(drift, int((there != answers).sum()))
    detail += f"; accuracy on the same images by sweeps of prediction {', '.join(told)}"
    warm = _warm_labels(teacher, adversarial, clean, teacher.schedule)
    other = int((warm != answers).sum())
    kept = float((warm == labels).double().mean())
    detail += f"; started at the clean equilibrium {other} labels differ (accuracy {kept:.3f})"
    for count in (drift, other):
        if grade(count, probe.n, slack) != PASS:
            status = worst_status(status, WARN)
    return Outcome(status, worst, detail)


def _labels(teacher: EPCNN, images: Tensor, relaxed: Relaxed) -> Tensor:
    """The labels read off settled states, (N,) int64."""
    with torch.no_grad():
        told = teacher.network().answer(teacher.normalise(images), relaxed.states)
    return told.argmax(dim=1)


def _warm_labels(teacher: EPCNN, images: Tensor, start: Relaxed, schedule: Schedule) -> Tensor:
    """The labels of images relaxed from other images' states instead of zeros."""
    from epdistill.teachers.relaxation import relax

    x = teacher.normalise(images.detach())
    states = [state.clone() for state in start.states]
    return _labels(teacher, images, relax(teacher.network(), x, schedule, start=states))


def saturation(probe: Probe) -> Outcome:
    """Check 26: how many states are stuck at 0 or 1, and an attack that looks past that."""
    teacher = probe.teacher
    if teacher is None:
        return skipped(NOT_A_TEACHER)
    states = teacher.relax(probe.images).states
    shares = [float(((s == 0) | (s == 1)).double().mean()) for s in states]
    units = torch.tensor([s[0].numel() for s in states], dtype=torch.float64)
    share = float((torch.tensor(shares, dtype=torch.float64) * units).sum() / units.sum())
    sweeps = min(probe.settings.softened_sweeps, probe.settings.longest_unroll)
    soft = replace_views(probe, {"softened": SoftenedUnroll(teacher, sweeps)})
    left = probe.survivors
    broken, _ = soft.white(
        probe.eps, left, lambda view, rows: soft.pgd(view, probe.eps, rows, use="softened")
    )
    count = probe.beats("softened clamp", broken)
    layers = ", ".join(f"{value:.2f}" for value in shares)
    detail = f"states exactly 0 or 1: {share:.2f} (by layer {layers}); the softened unroll "
    detail += f"through {sweeps} sweeps breaks {count} of {len(left)} survivors"
    if soft.broken_views:
        return Outcome(WARN, share, f"{detail}; it broke down: {soft.broken_views['softened']}")
    return Outcome(grade(count, probe.n, probe.settings.slack), share, detail)
