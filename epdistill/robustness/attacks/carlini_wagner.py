"""The L2 attack of Carlini and Wagner (S&P 2017), from torchattacks, mended.

It minimises ||x' - x||^2 + c f(x'), f = max(z_y - max_{k != y} z_k, -kappa),
with Adam. What torchattacks 3.5.1 does wrong, and what is done here instead:

- It multiplies logits by a one-hot mask, so that 0 stands in for the other
  classes: with negative logits (log-softmax, say) it breaks nothing. Here the
  margin is that of the logits, the same under any shift.
- Through tanh, pixels at exactly 0 or 1 never move: here x' = (1 + sin w) / 2,
  which has the same slope at mid-grey and lets go of 0 and 1 within a few steps;
  the start is pulled inside by a millionth.
- It stops when the batch's cost rises: here each image stops on its own, when a
  tenth of the steps brought its cost no lower.
- Confidence kappa shapes the loss but is not asked of the result: here it is.
- There is no search for c: here there is one, per image, in decades first and
  then by bisecting its logarithm; it can be switched off.
- `cost.backward()` leaves gradients on the parameters: not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchattacks
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import (
    Judged,
    gradient_of,
    lead_of_label,
    nearest,
)
from epdistill.robustness.subjects import Predict

# Adam's usual decay rates; the floor is far below any gradient that counts.
BETA1, BETA2, FLOOR = 0.9, 0.999, 1e-20
# Where the start is pulled to, so that the sine has a slope: 1e-6 of a grey range.
INSIDE = 1e-6
# A tenth of the steps must lower an image's cost by this factor, or it stops.
PROGRESS = 0.9999
# Largest c that the search tries.
LARGEST_C = 1e10


@dataclass(frozen=True)
class CWSettings:
    """How hard Carlini and Wagner's attack tries.

    Attributes:
        c: Weight of breaking the model against staying close: fixed, or the search's first.
        kappa: Margin by which the model must err, in logits.
        steps: Adam steps for each c.
        lr: Adam's step size on w, where x' = (1 + sin w) / 2.
        binary_search_steps: How many values of c are tried per image; 0 (or 1) leaves it at
            `c`, as torchattacks does.
    """

    c: float = 0.1
    kappa: float = 0.0
    steps: int = 200
    lr: float = 0.01
    binary_search_steps: int = 9

    def __post_init__(self) -> None:
        numbers_fit = (
            0 < self.c < math.inf and 0 <= self.kappa < math.inf and 0 < self.lr < math.inf
        )
        if not numbers_fit or self.steps < 1 or self.binary_search_steps < 0:
            raise EvaluationError(
                f"received {self}; expected c > 0, kappa >= 0, lr > 0, steps >= 1 and "
                "binary_search_steps >= 0"
            )


def carlini_wagner(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    *,
    seed: int,
    settings: CWSettings = CWSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """The nearest images in L2 that the attack could find to break the model.

    Args:
        model: Differentiable; images in [0,1] to logits (N,K).
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        seed: Accepted like everywhere; nothing in this attack is random.
        settings: Weights and steps.
        index: Accepted like everywhere; not needed.

    Returns:
        (N,C,H,W), detached, inside [0,1]. An image that the attack could not break, or that
        the model got wrong from the start, comes back as it was.

    Raises:
        EvaluationError: Bad arguments, non-finite logits or gradients, no gradient at all.
    """

    def craft(judged: Judged, origin: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        attack = NearestCW(
            judged, c=settings.c, kappa=settings.kappa, steps=settings.steps, lr=settings.lr
        )
        attack.rounds = max(settings.binary_search_steps, 1)
        return attack.forward(origin, labels)

    return nearest(craft, model, images, labels, index, gradients=True)


# torchattacks is not typed: to mypy its classes are Any.
class NearestCW(torchattacks.CW):  # type: ignore[misc]
    """CW with a true margin, per-image stops and a search for c."""

    rounds: int

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images and labels to the nearest images that break the model, (N,C,H,W)."""
        best = images.clone()
        with torch.no_grad():
            right = self.get_logits(images).argmax(dim=1) == labels
        rows = right.nonzero().flatten()
        reach = torch.full_like(images[:, 0, 0, 0], float("inf"))
        c = torch.full_like(reach, self.c)
        low, high = torch.zeros_like(c), torch.full_like(c, float("inf"))
        for _ in range(self.rounds):
            if len(rows) == 0:
                break
            found, squared = self._descend(images[rows], labels[rows], c[rows])
            closer = squared < reach[rows]
            best[rows[closer]] = found[closer]
            reach[rows[closer]] = squared[closer]
            broken = torch.isfinite(squared)
            high[rows] = torch.where(broken, c[rows], high[rows])
            low[rows] = torch.where(broken, low[rows], c[rows])
            # c is a scale: decades until it is bracketed, then its logarithm is bisected.
            between = (low * high).sqrt()
            c = torch.where(high.isinf(), low * 10, torch.where(low == 0, high / 10, between))
            rows = rows[c[rows] <= LARGEST_C]
        return best

    def _descend(self, images: Tensor, labels: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Adam at given c (M,): best images (M,C,H,W), squared distances (M,), inf if unbroken."""
        w = self.inverse_tanh_space(images)
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        best = images.clone()
        reach = torch.full_like(c, float("inf"))
        lowest = torch.full_like(c, float("inf"))
        checked = lowest.clone()
        rows = torch.arange(len(images), device=images.device)
        tenth = max(self.steps // 10, 1)
        for step in range(1, self.steps + 1):
            probe = self.tanh_space(w[rows]).requires_grad_()
            logits = self.get_logits(probe)
            lead = lead_of_label(logits, labels[rows])
            # Of the margin alone: a model without a gradient must not hide behind the distance.
            slope = gradient_of(lead, probe)
            moved, lead = probe.detach(), lead.detach().to(c)
            squared = (moved - images[rows]).flatten(1).square().sum(dim=1)
            weight = torch.where(lead >= -self.kappa, c[rows], 0.0)[:, None, None, None]
            gradient = (2 * (moved - images[rows]) + weight * slope) * torch.cos(w[rows]) / 2
            broken = (logits.argmax(dim=1) != labels[rows]) & (lead <= -self.kappa)
            closer = broken & (squared < reach[rows])
            best[rows[closer]] = moved[closer]
            reach[rows[closer]] = squared[closer]
            cost = squared + c[rows] * lead.clamp_min(-self.kappa)
            lowest[rows] = torch.minimum(lowest[rows], cost)
            mean[rows] = BETA1 * mean[rows] + (1 - BETA1) * gradient
            square[rows] = BETA2 * square[rows] + (1 - BETA2) * gradient.square()
            first = mean[rows] / (1 - BETA1**step)
            second = (square[rows] / (1 - BETA2**step)).sqrt()
            w[rows] -= self.lr * first / (second + FLOOR)
            if step % tenth == 0:
                rows = rows[lowest[rows] < checked[rows] - (1 - PROGRESS) * lowest[rows].abs()]
                checked = lowest.clone()
                if len(rows) == 0:
                    break
        return best, reach

    # The names are torchattacks': what is in them is not tanh any more.
    def tanh_space(self, x: Tensor) -> Tensor:
        """From w to images in [0,1]."""
        return (torch.sin(x) + 1) / 2

    def inverse_tanh_space(self, x: Tensor) -> Tensor:
        """From images in [0,1] to w, where the sine has a slope."""
        return torch.asin(2 * x.clamp(INSIDE, 1 - INSIDE) - 1)
