"""A plain sign-gradient ascent that keeps its whole history, for looking at attacks.

The attacks that are reported live in `epdistill.robustness.attacks`; this one
exists to vary what they keep fixed (the loss) and to see what they do not tell
(every step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epdistill.robustness.diagnostics.losses import Objective
from epdistill.robustness.guards import check_adversarial, check_logits, evaluation_mode


@dataclass(frozen=True, eq=False)
class Climb:
    """One ascent.

    Attributes:
        losses: (steps + 1, N), the objective at every iterate, the start included.
        wrong: (steps + 1, N) bool, whether the view errs there.
        best: (N,C,H,W), the first iterate on which the view errs, or else that of the
            largest loss; inside the ball and [0,1].
    """

    losses: Tensor
    wrong: Tensor
    best: Tensor


def image_gradient(
    view: nn.Module, images: Tensor, labels: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of each image's loss.

    Args:
        view: Images (N,C,H,W) to logits (N,K), in the images' dtype.
        images: (N,C,H,W).
        labels: (N,) int64.
        objective: Logits and labels to losses (N,).

    Returns:
        Gradient (N,C,H,W), losses (N,) and logits (N,K), all detached. The gradient is zero
        where autograd has none; it may hold NaN or infinity.
    """
    with evaluation_mode((view,)), torch.inference_mode(False), torch.enable_grad():
        point = images.detach().clone().requires_grad_(True)
        logits = view(point)
        # Half precision is too coarse to compare losses in.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = objective(wide, labels)
        gradient = None
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(point)
    return gradient.detach(), losses.detach(), wide.detach()


def climb(
    view: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    objective: Objective,
    *,
    steps: int,
    relative_step: float = 2.5,
) -> Climb:
    """Ascend a loss by signs of its gradient inside the Linf ball, from the image itself.

    Args:
        view: Differentiable; images to logits.
        images: (N,C,H,W) in [0,1].
        labels: (N,) int64.
        eps: Radius, above 0.
        objective: What is climbed.
        steps: Gradient steps, at least 1.
        relative_step: The step is `relative_step * eps / steps`.

    Raises:
        EvaluationError: Logits that cannot be judged.
    """
    origin = images.detach()
    current, best = origin, origin
    best_loss = torch.full((len(origin),), float("-inf"), device=origin.device)
    broken = torch.zeros_like(labels, dtype=torch.bool)
    losses, wrongs = [], []
    for _ in range(steps + 1):
        # One gradient more than is used: the last iterate is looked at all the same.
        gradient, loss, logits = image_gradient(view, current, labels, objective)
        check_logits(logits, len(origin), labels)
        wrong = logits.argmax(dim=1) != labels
        better = ~broken & (wrong | (loss > best_loss))
        best = torch.where(better[:, None, None, None], current, best)
        best_loss = torch.where(better, loss.to(best_loss.dtype), best_loss)
        broken = broken | wrong
        losses.append(loss)
        wrongs.append(wrong)
        # A gradient that is not a number points nowhere.
        sign = torch.nan_to_num(gradient, nan=0.0).sign()
        delta = (current + relative_step * eps / steps * sign - origin).clamp(-eps, eps)
        current = (origin + delta).clamp(0, 1)
    check_adversarial(origin, best, "linf", eps)
    return Climb(torch.stack(losses), torch.stack(wrongs), best)
