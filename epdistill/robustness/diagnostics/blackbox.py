"""Checks that compare the gradient attack with attacks that need none: 9 to 11, 20 and 21."""

from __future__ import annotations

import torch

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    HopSkipJumpSettings,
    SquareSettings,
    hop_skip_jump,
    square_linf,
)
from epdistill.robustness.diagnostics.catalogue import PASS
from epdistill.robustness.diagnostics.findings import Outcome, grade
from epdistill.robustness.diagnostics.numerics import skipped
from epdistill.robustness.diagnostics.probe import Probe
from epdistill.robustness.guards import LINF, check_adversarial, derive_seed, distances
from epdistill.robustness.subjects import Subject
from epdistill.robustness.units import split


def square(probe: Probe) -> Outcome:
    """Check 9: Square's random search on what the reported attack left."""
    left = probe.survivors
    broken = torch.zeros(probe.n, dtype=torch.bool)
    for rows in split(left, probe.settings.batch_size):
        found = square_linf(
            probe.subject.predict,
            probe.images[rows],
            probe.labels[rows],
            probe.eps,
            seed=derive_seed(probe.seed, "diagnosis", "square"),
            settings=SquareSettings(queries=probe.settings.square_queries),
            index=rows,
        )
        broken[rows] = probe.errs(found, rows)
    detail = f"of {len(left)} survivors, {probe.settings.square_queries} queries each"
    return _more(probe, "square", broken, detail)


def hard_label(probe: Probe) -> Outcome:
    """Check 10: HopSkipJump, which reads nothing but the label, on some survivors."""
    rows = probe.survivors[: probe.settings.decision_images]
    broken = torch.zeros(probe.n, dtype=torch.bool)
    if len(rows):
        settings = HopSkipJumpSettings(queries=probe.settings.decision_queries, norm=LINF)
        found = hop_skip_jump(
            probe.subject.predict,
            probe.images[rows],
            probe.labels[rows],
            seed=derive_seed(probe.seed, "diagnosis", "hop-skip-jump"),
            settings=settings,
            index=rows,
        )
        near = distances(probe.images[rows], found, LINF) <= probe.eps
        broken[rows] = probe.errs(found, rows) & near
    detail = f"of {len(rows)} survivors tried, {probe.settings.decision_queries} queries each"
    return _more(probe, "hop-skip-jump", broken, detail)


def random_noise(probe: Probe) -> Outcome:
    """Check 11: random points of the ball, half of them corners, on the survivors."""
    left = probe.survivors
    broken = torch.zeros(probe.n, dtype=torch.bool)
    seed = derive_seed(probe.seed, "diagnosis", "noise")
    generator = torch.Generator().manual_seed(seed)
    for sample in range(probe.settings.noise_samples):
        rows = left[~broken[left]]
        if len(rows) == 0:
            break
        # Drawn for every image, so that an image's noise does not hang on the others' fate.
        draw = 2 * torch.rand(probe.images.shape, generator=generator) - 1
        draw = draw.sign() if sample % 2 else draw
        moved = probe.images[rows] + probe.eps * draw[rows].to(probe.images)
        broken[rows] = probe.errs(moved.clamp(0, 1), rows)
    detail = f"of {len(left)} survivors, {probe.settings.noise_samples} samples each"
    return _more(probe, "noise", broken, detail)


def _more(probe: Probe, name: str, broken: torch.Tensor, detail: str) -> Outcome:
    count = probe.beats(name, broken)
    return Outcome(grade(count, probe.n, probe.settings.slack), count, f"{count} {detail}")


def transfer(probe: Probe) -> Outcome:
    """Check 20: adversarial examples of the rivals tried on the subject, and the other way."""
    sources = [rival for rival in probe.rivals if rival.views]
    if not sources:
        return skipped("no rival with gradients was given")
    broken = torch.zeros(probe.n, dtype=torch.bool)
    told = []
    for rival in sources:
        try:
            theirs = _probe_of(rival, probe)
            wrong, images = theirs.attack_all(probe.eps)
        except EvaluationError as error:
            # What is wrong with a rival is no evidence against the subject.
            told.append(f"{rival.name}: not used ({error})")
            continue
        check_adversarial(probe.images.cpu(), images.cpu(), LINF, probe.eps)
        right = (~probe.clean_wrong).nonzero().flatten()
        found = torch.zeros(probe.n, dtype=torch.bool)
        found[right] = probe.errs(images.to(probe.images.device)[right], right)
        broken |= found
        line = f"{rival.name}: {int(found.sum())} here"
        if probe.views:
            back = theirs.errs(probe.reported[1].to(theirs.images.device), torch.arange(probe.n))
            line += f", {int((back & ~wrong).sum())} there beyond its own attack"
        told.append(line)
    if not probe.views:
        detail = "examples of " + "; ".join(told) + "; there is no white box to compare with"
        return Outcome(PASS, float((broken | probe.clean_wrong).double().mean()), detail)
    return _more(probe, "transfer", broken, "survivors; broken by " + "; ".join(told))


def _probe_of(rival: Subject, probe: Probe) -> Probe:
    device = rival.device
    theirs = Probe(
        rival, probe.images.to(device), probe.labels.to(device), probe.settings, probe.seed
    )
    if theirs.classes != probe.classes:
        raise EvaluationError(
            f"rival {rival.name} has {theirs.classes} classes; expected {probe.classes}: give "
            "rivals trained for the same labels"
        )
    return theirs


def aggregation(probe: Probe) -> Outcome:
    """Check 21: the worst case per image, beside the worst of the attacks' means.

    Runs last: it puts together what all other checks tried at the radius of comparison.
    """
    if not probe.views:
        return skipped("no attack was run on this subject: it has no gradients")
    exact = float((~probe.worst).double().mean())
    means = {"reported": float((~probe.reported[0]).double().mean())}
    for name, broken in probe.tried.items():
        # Counted with what it was seen to break: some ran on the survivors only.
        means[name] = float((~(broken | probe.clean_wrong)).double().mean())
    least = min(means.values())
    detail = f"worst case per image {exact:.3f}; lowest mean of one attack {least:.3f}"
    if probe.claimed is None:
        return Outcome(PASS, exact, f"{detail}; no accuracy was given to compare with")
    excess = round((probe.claimed - exact) * probe.n)
    status = grade(max(excess, 0), probe.n, probe.settings.slack)
    detail += f"; quoted {probe.claimed:.3f}"
    return Outcome(status, exact, detail)
