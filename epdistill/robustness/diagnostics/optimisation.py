"""Checks on how well the attack was optimised: 8, 12 to 17 and 19."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, WARN
from epdistill.robustness.diagnostics.findings import NEGLIGIBLE, Outcome, grade, worst_status
from epdistill.robustness.diagnostics.losses import Objective, log_margin, objectives, towards
from epdistill.robustness.diagnostics.probe import Probe

SETTLED_GAIN, RISING_GAIN = 0.05, 0.25
MOVED = 1e-6


def one_step(probe: Probe) -> Outcome:
    """Check 8: FGSM (Goodfellow et al. 2015) may not break what PGD leaves, at any radius."""
    worst, told = 0, []
    right = (~probe.clean_wrong).nonzero().flatten()
    for eps, (broken, _) in probe.curve.items():
        left = right[~broken[right]]
        found, _ = probe.white(
            eps,
            left,
            # One step of length eps along the sign from the image itself is FGSM.
            lambda view, rows, eps=eps: probe.pgd(  # type: ignore[misc]
                view, eps, rows, use="fgsm", steps=1, relative_step=1.0, random_start=False
            ),
        )
        more = int(found.sum())
        if eps == probe.eps:
            probe.beats("fgsm", found)
        worst = max(worst, more)
        told.append(f"{255 * eps:.3g}/255: {more}")
    detail = "images that only one step breaks: " + ", ".join(told)
    return Outcome(grade(worst, probe.n, probe.settings.slack), worst, detail)


def unbounded(probe: Probe) -> Outcome:
    """Check 12: at Linf eps = 1 every image can become any other."""
    left = int((~probe.unbounded).sum())
    detail = f"{left} of {probe.n} images withstand PGD-{probe.settings.unbounded_steps} at eps = 1"
    return Outcome(grade(left, probe.n, probe.settings.slack), left / probe.n, detail)


def budget_curve(probe: Probe) -> Outcome:
    """Check 13: accuracy against radius, each radius attacked on its own."""
    n, slack = probe.n, probe.settings.slack
    points = [(0.0, int((~probe.clean_wrong).sum()))]
    points += [(eps, int((~broken).sum())) for eps, (broken, _) in probe.curve.items()]
    points.append((1.0, int((~probe.unbounded).sum())))
    rise = max(after - before for (_, before), (_, after) in pairwise(points))
    above = max(0, points[-1][1] - round(n / probe.classes))
    told = ", ".join(f"{255 * eps:.3g}/255: {count / n:.2f}" for eps, count in points)
    status = worst_status(grade(max(rise, 0), n, slack), grade(above, n, slack))
    return Outcome(status, points[-1][1] / n, f"accuracy at {told}")


def step_convergence(probe: Probe) -> Outcome:
    """Check 14: two and four times the steps on what the reported attack left."""
    n = probe.settings.steps
    return _variants(
        probe, "steps", {f"{n * k} steps": {"steps": n * k} for k in (2, 4)}, f"{n} steps leave"
    )


def restarts_and_steps(probe: Probe) -> Outcome:
    """Check 16: further starts and other step sizes on what the reported attack left."""
    variants: dict[str, dict[str, float]] = {
        f"{count} more": {"restarts": count} for count in probe.settings.restarts
    }
    for factor in probe.settings.step_factors:
        variants[f"step x {factor:g}"] = {"relative_step": 2.5 * factor}
    once = int((~probe.once[0]).sum())
    start = f"1 start leaves {once}, {probe.settings.starts} starts leave"
    return _variants(probe, "restarts", variants, start)


def _variants(
    probe: Probe, name: str, variants: dict[str, dict[str, float]], start: str
) -> Outcome:
    left = probe.survivors
    together = torch.zeros(probe.n, dtype=torch.bool)
    told = [f"{start} {len(left)} of {probe.n}"]
    for variant, changes in variants.items():
        found, _ = probe.white(
            probe.eps,
            left,
            lambda view, rows, variant=variant, changes=changes: probe.pgd(  # type: ignore[misc]
                view, probe.eps, rows, use=variant, **changes
            ),
        )
        together |= found
        told.append(f"{variant} break {int(found.sum())} more")
    more = probe.beats(name, together)
    return Outcome(grade(more, probe.n, probe.settings.slack), more / probe.n, "; ".join(told))


def complete_optimisation(probe: Probe) -> Outcome:
    """Check 15: whether the loss of the survivors was still rising when the attack ended.

    The running best of the log-margin, rescaled by its range per image, gained in
    the last quarter of the steps (Pintor et al. 2022, indicator of incomplete
    optimisation; theirs looks at the last 10 of more steps).
    """
    left = probe.survivors
    if len(left) == 0:
        return Outcome(PASS, None, "no image withstood the reported attack")
    losses = probe.climb(probe.first_view, left, log_margin).losses.double()
    best = losses.cummax(dim=0).values
    spread = best[-1] - losses.amin(dim=0)
    # A loss that only trembles by rounding has not moved.
    moved = spread > MOVED * losses.abs().amax(dim=0).clamp_min(1)
    still = int((~moved).sum())
    if still > max(1.0, probe.settings.slack * len(left)):
        return Outcome(FAIL, None, f"the loss of {still} of {len(left)} survivors never moved")
    late = best[-1] - best[-1 - max(1, (len(best) - 1) // 4)]
    gain = float((late[moved] / spread[moved]).median()) if bool(moved.any()) else 0.0
    status = PASS if gain <= SETTLED_GAIN else WARN if gain <= RISING_GAIN else FAIL
    return Outcome(status, gain, f"median over {len(left)} survivors")


def silent_success(probe: Probe) -> Outcome:
    """Check 17: images broken on the way that the last step, or the report, has lost."""
    rows = (~probe.clean_wrong).nonzero().flatten()
    if len(rows) == 0:
        return Outcome(PASS, None, "no image is right when clean")
    found = probe.climb(probe.first_view, rows, log_margin)
    passed = (found.wrong.any(dim=0) & ~found.wrong[-1]).cpu()
    broken = torch.zeros(probe.n, dtype=torch.bool)
    broken[rows] = probe.errs(found.best, rows)
    lost = probe.beats("recorded ascent", broken)
    share = float(passed.double().mean())
    detail = f"the last iterate misses {int(passed.sum())} of {len(rows)} images, the best one none"
    detail += f"; {lost} of them the reported attack has not broken"
    status = grade(lost, probe.n, probe.settings.slack)
    if status == PASS and share > NEGLIGIBLE:
        # The reported attack keeps the best iterate, so nothing is lost by it.
        detail += "; the reported attack keeps the best"
    return Outcome(status, share, detail)


def diverse_objectives(probe: Probe) -> Outcome:
    """Check 19: other losses on what the reported attack left, on every view."""
    left = probe.survivors
    broken = torch.zeros(probe.n, dtype=torch.bool)
    told = []
    for name, objective in _all_objectives(probe, left).items():
        more = torch.zeros(probe.n, dtype=torch.bool)
        for view in probe.live_views.values():
            if len(left):
                more[left] |= probe.errs(probe.climb(view, left, objective).best, left)
        broken |= more
        told.append(f"{name} {int(more.sum())}")
    count = probe.beats("other objectives", broken)
    detail = f"of {len(left)} survivors broken by " + ", ".join(told)
    return Outcome(grade(count, probe.n, probe.settings.slack), count / probe.n, detail)


def _all_objectives(probe: Probe, rows: Tensor) -> dict[str, Objective]:
    """Untargeted losses, and one targeted loss per runner-up class of each image."""
    found: dict[str, Objective] = dict(objectives(probe.classes))
    labels = probe.labels[rows]
    scores = probe.logits[rows].to(labels.device)
    ranked = scores.scatter(1, labels.unsqueeze(1), float("-inf")).argsort(dim=1, descending=True)
    for rank in range(min(probe.settings.targets, probe.classes - 1)):
        found[f"target {rank + 1}"] = towards(ranked[:, rank])
    return found
