"""Check 23: the instrument is tried on two models whose condition is known.

A plain net must break under the same attacks, and the same net with its
gradients killed must be caught. An instrument that fails either says nothing
about the subject.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.diagnostics.blackbox import square
from epdistill.robustness.diagnostics.catalogue import FAIL, PASS, WARN
from epdistill.robustness.diagnostics.findings import Outcome, grade
from epdistill.robustness.diagnostics.gradients import alive_gradients
from epdistill.robustness.diagnostics.probe import Probe
from epdistill.robustness.guards import check_images, derive_seed
from epdistill.robustness.subjects import module_subject

# No plain net withstands this, and scores alone are enough to break one: of the controls,
# whatever radius the subject is looked at.
EPS = 64 / 255
HIDDEN = 64
LEARNING_RATE = 1e-2
Kill = Literal["rounded", "saturated"]


class GradientKiller(nn.Module):
    """A model with the same answers and no gradient: what a diagnosis must catch.

    Args:
        module: Images (N,C,H,W) to logits (N,K).
        kind: `"rounded"`: logits on a grid of `step`, the winner one step ahead, so that
            scores still guide a black box; `"saturated"`: one-hot, so that only labels do.
        step: The grid of `"rounded"`.
    """

    def __init__(self, module: nn.Module, kind: Kill = "rounded", step: float = 0.1) -> None:
        super().__init__()
        if kind not in ("rounded", "saturated") or not step > 0:
            raise EvaluationError(
                f"received a gradient killer of kind {kind!r} with step {step}; expected rounded "
                "or saturated, and a step above 0"
            )
        self.module, self.kind, self.step = module, kind, step

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,K) with the labels of `module` and a gradient of exactly zero."""
        logits: Tensor = self.module(images)
        winner = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
        if self.kind == "saturated":
            return 0 * logits + winner
        # Rounding may tie or swap the leaders: the winner is put one step ahead.
        return self.step * (torch.round(logits / self.step) + winner)


def plain_control(
    images: Tensor, labels: Tensor, classes: int, *, seed: int, steps: int = 200
) -> nn.Module:
    """An ordinary ReLU net fitted to the evaluation's own images, in seconds.

    It generalises to nothing; it is there to be broken. No global random number is
    drawn for it.

    Args:
        images: (N,C,H,W) in [0,1].
        labels: (N,) int64, below `classes`.
        classes: K, at least 2.
        seed: Fixes its weights.
        steps: Steps of Adam on all images at once.

    Returns:
        Images to logits (N,K), in evaluation mode on the images' device.

    Raises:
        EvaluationError: Bad images or labels.
    """
    check_images(images, labels)
    if classes < 2 or len(images) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise EvaluationError(
            f"received {len(images)} images and {classes} classes; expected at least one image, "
            "at least 2 classes and labels below their number"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "plain control"))
    pixels = images[0].numel()
    layers = []
    for inputs, outputs in ((pixels, HIDDEN), (HIDDEN, classes)):
        # skip_init, since a constructor would draw from the global generator.
        layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
        bound = 1 / math.sqrt(inputs)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        layers.append(layer)
    net = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1]).to(images.device)
    optimiser = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    with torch.inference_mode(False), torch.enable_grad():
        given, truth = images.detach().clone(), labels.clone()
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(net(given), truth).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    optimiser.zero_grad()
    return net.requires_grad_(False).eval()


def positive_controls(probe: Probe, control: nn.Module) -> Outcome:
    """Check 23: a plain net must break, and its gradient-killed twin must be caught."""
    plain = _probe_of(probe, "plain control", control)
    fitted = int((~plain.clean_wrong).sum())
    left = int((~plain.once[0]).sum())
    detail = f"plain net: {fitted} of {probe.n} right, {left} at eps = {255 * EPS:.3g}/255"
    faults = []
    if grade(left, probe.n, probe.settings.slack) == FAIL:
        faults.append("the plain net is not broken")
    if 2 * fitted < probe.n:
        return Outcome(WARN, None, f"{detail}: the control does not fit the images, so it is none")
    killed = GradientKiller(control)
    twin = _probe_of(probe, "gradient killer", killed)
    same = bool((twin.logits.argmax(dim=1) == plain.logits.argmax(dim=1)).all())
    gradients, box = alive_gradients(twin), square(twin)
    detail += f"; its gradient-killed twin: gradients {gradients.status}, black box {box.status}"
    if not same:
        faults.append("the twin answers otherwise")
    if gradients.status != FAIL:
        faults.append("the dead gradients are not seen")
    if box.status != FAIL:
        faults.append("the black box does not beat the dead gradients")
    if faults:
        return Outcome(FAIL, left / probe.n, f"{detail}: {', '.join(faults)}")
    return Outcome(PASS, left / probe.n, detail)


def _probe_of(probe: Probe, name: str, module: nn.Module) -> Probe:
    subject = module_subject(name, "control", module, probe.subject.device)
    settings = replace(probe.settings, eps=EPS)
    return Probe(subject, probe.images, probe.labels, settings, probe.seed)
