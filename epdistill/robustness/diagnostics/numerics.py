"""Checks on the answers themselves: 1 to 3, 6, 7 and 22."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, SKIP, WARN
from epdistill.robustness.diagnostics.findings import Outcome, grade
from epdistill.robustness.diagnostics.probe import Probe
from epdistill.robustness.guards import LINF, TOLERANCE, derive_seed, distances
from epdistill.robustness.units import split

FORWARDS = 5
UNSTEADY = 1e-4
SUMS_TO_ONE = 1e-5
SHIFT = -20.0


class Shifted(nn.Module):
    """A model with one number added to every logit: the same answers, the same odds."""

    def __init__(self, module: nn.Module, shift: float) -> None:
        super().__init__()
        self.module, self.shift = module, shift

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) to logits (N,K)."""
        logits: Tensor = self.module(images)
        return logits + self.shift


def determinism(probe: Probe) -> Outcome:
    """Check 1: the same images asked five times."""
    told = [_drawn(probe) for _ in range(FORWARDS)]
    unit = [F.normalize(logits.double(), dim=1) for logits in told]
    gap = max(float((other - unit[0]).norm(dim=1).max()) for other in unit[1:])
    labels = probe.labels.cpu()
    right = [int((logits.argmax(dim=1) == labels).sum()) for logits in told]
    detail = f"largest gap {gap:.2g}; right answers {min(right)}..{max(right)} of {probe.n}"
    if gap <= UNSTEADY and len(set(right)) == 1:
        return Outcome(PASS, gap, detail)
    if probe.stochastic:
        return Outcome(WARN, gap, f"declared stochastic, attacked and judged in the mean; {detail}")
    return Outcome(FAIL, gap, detail)


def _drawn(probe: Probe) -> Tensor:
    """One forward of the subject as it is, not averaged over draws."""
    with torch.no_grad():
        parts = split(probe.images, probe.settings.batch_size)
        return torch.cat([probe.single(part).detach().cpu() for part in parts])


def logits_are_logits(probe: Probe) -> Outcome:
    """Check 2: outputs that have gone through softmax, rounding or a clamp."""
    seed = derive_seed(probe.seed, "diagnosis", "uniform images")
    noise = torch.rand(probe.images.shape, generator=torch.Generator().manual_seed(seed))
    told = torch.cat((probe.logits, probe.answers(noise.to(probe.images)))).double()
    low, high = float(told.min()), float(told.max())
    detail = f"outputs in {low:.4g}..{high:.4g}"
    if low >= -SUMS_TO_ONE and high <= 1 + SUMS_TO_ONE:
        if bool(((told.sum(dim=1) - 1).abs() <= SUMS_TO_ONE).all()):
            hard = bool(((told == 0) | (told == 1)).all())
            return Outcome(FAIL, "one-hot" if hard else "probabilities", detail)
        return Outcome(WARN, "bounded", f"{detail}: not logits, but not probabilities either")
    if high <= SUMS_TO_ONE and bool(((told.exp().sum(dim=1) - 1).abs() <= SUMS_TO_ONE).all()):
        return Outcome(WARN, "log-probabilities", f"{detail}: safe only for shift-invariant losses")
    if bool(((told == low) | (told == high)).all()):
        return Outcome(FAIL, "two values", f"{detail}: a decision, not a score")
    return Outcome(PASS, "logits", detail)


def shift_invariance(probe: Probe) -> Outcome:
    """Check 3: attacks must do the same to f and to f - 20."""
    broken, _ = probe.once
    right = (~probe.clean_wrong).nonzero().flatten()
    shifted = {name: Shifted(view, SHIFT) for name, view in probe.views.items()}
    moved = replace_views(probe, shifted)
    again, _ = moved.white(
        probe.eps, right, lambda view, rows: moved.pgd(view, probe.eps, rows, use="reported")
    )
    differ = int((again[right] != broken[right]).sum())
    highest = float(probe.logits.max())
    detail = f"{differ} of {len(right)} images differ; the largest output is {highest:.4g}"
    status = grade(differ, probe.n, probe.settings.slack)
    if status == PASS and highest < 0:
        return Outcome(
            WARN,
            differ,
            f"{detail}: all are negative, which blinds margin attacks that fill up with zeros",
        )
    return Outcome(status, differ, detail)


def replace_views(probe: Probe, views: Mapping[str, nn.Module]) -> Probe:
    """The same images and judge, other gradients; nothing cached is shared."""
    subject = replace(probe.subject, views=views)
    return Probe(subject, probe.images, probe.labels, probe.settings, probe.seed)


def inference_loop(probe: Probe) -> Outcome:
    """Check 6: whether a forward itself asks autograd for gradients."""
    calls: list[str] = []
    with torch.no_grad(), _watching(calls):
        probe.single(probe.images[:1])
    if calls:
        names = ", ".join(sorted(set(calls)))
        return Outcome(FAIL, len(calls), f"a forward calls {names}")
    loop = "; its relaxation is a loop, which checks 24 to 26 attack" if probe.teacher else ""
    return Outcome(PASS, 0, f"no call of autograd in a forward{loop}")


@contextmanager
def _watching(calls: list[str]) -> Iterator[None]:
    """Note every call of autograd's entry points in this thread."""
    watched: dict[CodeType, str] = {
        torch.autograd.grad.__code__: "torch.autograd.grad",
        torch.autograd.backward.__code__: "torch.autograd.backward",
    }
    before = sys.getprofile()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in watched:
            calls.append(watched[frame.f_code])

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def class_count(probe: Probe) -> Outcome:
    """Check 7: losses that need more classes than there are."""
    classes, top = probe.classes, int(probe.labels.max())
    if top >= classes:
        return Outcome(FAIL, classes, f"label {top} with {classes} classes")
    if classes <= 3:
        lost = "DLR and targeted DLR" if classes <= 2 else "targeted DLR"
        return Outcome(WARN, classes, f"{lost} cannot be formed with {classes} classes")
    return Outcome(PASS, classes, f"labels 0..{top} of {classes} classes")


def validity(probe: Probe) -> Outcome:
    """Check 22: what the reported attack returned, and what all attacks have left behind."""
    broken, images = probe.reported
    # Everything was put into evaluation mode before the first check.
    training = any(part.training for module in probe.subject.modules for part in module.modules())
    finite = bool(torch.isfinite(images).all())
    inside = bool(((images >= 0) & (images <= 1)).all())
    reach = float(distances(probe.images, images, LINF).max())
    faults = [
        name
        for name, wrong in (
            ("NaN", not finite),
            ("pixels outside [0,1]", not inside),
            (f"distance {reach:.6g}", reach > probe.eps + TOLERANCE),
            ("modes changed", training),
        )
        if wrong
    ]
    if faults:
        return Outcome(FAIL, ", ".join(faults), "the attack is at fault, not the model")
    rows = (broken & ~probe.clean_wrong).nonzero().flatten()
    if len(rows) == 0:
        return Outcome(PASS, None, "nothing was broken, so nothing was rounded")
    kept = int(probe.errs((images[rows] * 255).round() / 255, rows).sum())
    share = kept / len(rows)
    detail = f"{kept} of {len(rows)} adversarial images survive rounding to 8 bits"
    # As for every comparison, one image is no evidence.
    lost = grade(len(rows) - kept, len(rows), 0.1)
    return Outcome(WARN if lost == FAIL else PASS, share, detail)


def run_or_explain(reason: EvaluationError) -> Outcome:
    """A check that broke down is evidence in itself: the model's answers or gradients failed."""
    return Outcome(FAIL, None, f"could not be completed: {reason}")


def skipped(reason: str) -> Outcome:
    """A check that was not run, and why."""
    return Outcome(SKIP, None, reason)
