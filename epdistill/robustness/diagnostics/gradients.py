"""Checks on the gradients: 4, 5 and 18."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, WARN
from epdistill.robustness.diagnostics.climbing import image_gradient
from epdistill.robustness.diagnostics.findings import Outcome, grade
from epdistill.robustness.diagnostics.losses import Objective, cross_entropy, log_margin, objectives
from epdistill.robustness.diagnostics.probe import Probe
from epdistill.robustness.guards import derive_seed, evaluation_mode
from epdistill.robustness.subjects import Predict
from epdistill.robustness.units import split

FAITHFUL = 0.9
SMOOTH_RADIUS = 4 / 255
ROUGH = 1.0
# Steps of the finite differences per pixel, by the precision of the forward pass.
STEP64, STEP32 = 1e-5, 1e-3


def alive_gradients(probe: Probe) -> Outcome:
    """Check 4: images whose gradient is zero, NaN or infinite.

    What decides is the direction that the attacks here climb (the log-margin); a
    loss that dies earlier (cross-entropy of confident answers) is a warning, for
    attacks that climb that one.
    """
    dead = {name: _dead(view, probe, log_margin) for name, view in probe.views.items()}
    everywhere = torch.stack(list(dead.values())).all(dim=0)
    count = int(everywhere.sum())
    parts = [f"{name} {int(rows.sum())}" for name, rows in dead.items()]
    detail = f"dead images of {probe.n} by view: " + ", ".join(parts)
    wide = doubled(probe.views)
    if wide and all(_answers_in_double(view, probe) for view in wide.values()):
        again = [_dead(view, probe, log_margin, torch.float64) for view in wide.values()]
        detail += f"; in float64 {int(torch.stack(again).all(dim=0).sum())} in every view"
    status = grade(count, probe.n, probe.settings.slack)
    faded = {
        name: sum(int(_dead(view, probe, loss).sum()) for view in probe.views.values())
        for name, loss in objectives(probe.classes).items()
        if name != "margin"
    }
    lost = [f"{name} ({number})" for name, number in faded.items() if number]
    if status == PASS and lost:
        return Outcome(WARN, count / probe.n, f"{detail}; losses that die: {', '.join(lost)}")
    return Outcome(status, count / probe.n, detail)


def _dead(
    view: nn.Module, probe: Probe, objective: Objective, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Which images have no usable gradient, (N,) bool on the CPU."""
    found = []
    size = probe.settings.batch_size
    for images, labels in zip(split(probe.images, size), split(probe.labels, size), strict=True):
        gradient, _, _ = image_gradient(view, images.to(dtype), labels, objective)
        flat = gradient.flatten(1)
        found.append(((flat == 0).all(dim=1) | ~torch.isfinite(flat).all(dim=1)).cpu())
    return torch.cat(found)


def doubled(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies in float64; empty where a module does not exist in float64.

    A copy of an EP-CNN relaxes until float64 sees its equilibrium: a derivative
    by differences is lost in a residual of 1e-4.
    """
    try:
        copies = {name: copy.deepcopy(module).double() for name, module in modules.items()}
    except (RuntimeError, TypeError):
        return {}
    for module in copies.values():
        tighten(module)
    return copies


def tighten(module: nn.Module) -> None:
    """Give an EP-CNN, if it is one, the sweeps and the tolerance that float64 allows."""
    schedule = getattr(module, "schedule", None)
    if schedule is not None and hasattr(schedule, "with_"):
        tolerance = min(schedule.tolerance, 1e-9) if schedule.tolerance else 0.0
        module.schedule = schedule.with_(tolerance=tolerance, sweeps=4 * schedule.sweeps)


def fidelity(probe: Probe) -> Outcome:
    """Check 5: autograd against central differences of what is judged, in random directions."""
    rows = torch.arange(min(probe.n, probe.settings.fidelity_images))
    predict: Predict = probe.subject.predict
    views: Mapping[str, nn.Module] = probe.views
    dtype, step = torch.float32, STEP32
    if isinstance(predict, nn.Module):
        wide = doubled({"predict": predict, **{f"view {k}": v for k, v in views.items()}})
        if wide and all(_answers_in_double(module, probe) for module in wide.values()):
            predict, dtype, step = wide["predict"], torch.float64, STEP64
            views = {name: wide[f"view {name}"] for name in views}
    images = probe.images[rows].to(dtype)
    # Pulled inside, so that a clamp at 0 or 1 does not stand in the way of the differences.
    images = images.clamp(step, 1 - step)
    labels = probe.labels[rows]
    directions = _signs(probe, images)
    with evaluation_mode([m for m in (predict,) if isinstance(m, nn.Module)]):
        measured = _differences(predict, images, labels, directions, step)
    cosines = {}
    for name, view in views.items():
        gradient, _, _ = image_gradient(view, images, labels, log_margin)
        computed = (directions * gradient).flatten(2).sum(dim=2)
        cosines[name] = float(_cosine(computed, measured).median())
    best = max(cosines.values())
    told = ", ".join(f"{name} {value:.3f}" for name, value in cosines.items())
    detail = f"median cosine over {len(rows)} images, {str(dtype)[6:]}: {told}"
    return Outcome(PASS if best >= FAITHFUL else FAIL, best, detail)


def _answers_in_double(module: nn.Module, probe: Probe) -> bool:
    """Whether the float64 copy runs, and answers in float64."""
    try:
        with torch.no_grad(), evaluation_mode((module,)):
            return bool(module(probe.images[:1].double()).dtype == torch.float64)
    except (RuntimeError, TypeError):
        return False


def _signs(probe: Probe, images: Tensor) -> Tensor:
    """Random signs, (directions, N, C, H, W)."""
    seed = derive_seed(probe.seed, "diagnosis", "directions")
    shape = (probe.settings.directions, *images.shape)
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(uniform < 0.5, -1.0, 1.0).to(images)


def _differences(
    predict: Predict, images: Tensor, labels: Tensor, directions: Tensor, step: float
) -> Tensor:
    """Central differences of the log-margin, (directions, N)."""
    found = []
    with torch.no_grad():
        for direction in directions:
            ends = [
                log_margin(predict((images + sign * step * direction).clamp(0, 1)), labels)
                for sign in (1, -1)
            ]
            found.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(found)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the first dimension, (N,); 0 where one of them is zero or not a number."""
    scale = a.norm(dim=0) * b.norm(dim=0)
    raw = (a * b).sum(dim=0) / scale.clamp_min(torch.finfo(a.dtype).tiny)
    return torch.where(scale > 0, raw, torch.zeros_like(raw)).nan_to_num(0.0)


def smoothness(probe: Probe) -> Outcome:
    """Check 18: how much the cross-entropy changes in a small cube around each image.

    Mean over random points of |L(x + d) - L(x)| / L(x), d uniform in +-4/255
    (Pintor et al. 2022); the median over images is told.
    """
    seed = derive_seed(probe.seed, "diagnosis", "smoothness")
    generator = torch.Generator().manual_seed(seed)
    labels = probe.labels.cpu()
    here = cross_entropy(probe.logits.double(), labels)
    change = torch.zeros_like(here)
    for _ in range(probe.settings.smooth_points):
        shift = (2 * torch.rand(probe.images.shape, generator=generator) - 1) * SMOOTH_RADIUS
        near = (probe.images + shift.to(probe.images)).clamp(0, 1)
        change += (cross_entropy(probe.answers(near).double(), labels) - here).abs()
    # A loss of exactly 0 has no relative change: the answer is saturated there.
    usable = here > 0
    if not bool(usable.any()):
        return Outcome(WARN, None, "the cross-entropy is exactly 0 for every image")
    relative = change[usable] / here[usable] / probe.settings.smooth_points
    value = float(relative.median())
    detail = f"median over {int(usable.sum())} images; 90th percentile "
    detail += f"{float(relative.quantile(0.9)):.3g}"
    return Outcome(WARN if value > ROUGH or not math.isfinite(value) else PASS, value, detail)
