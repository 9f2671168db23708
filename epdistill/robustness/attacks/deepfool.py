"""DeepFool (Moosavi-Dezfooli et al., CVPR 2016), from torchattacks, mended.

What torchattacks 3.5.1 does wrong, and what is done here instead:

- The overshoot is applied to every step, where it piles up: here, as in the
  paper's Algorithm 2, once to the sum of the steps.
- Images are worked on one by one, all their classes each time: here together,
  with the likeliest classes as the authors' own code has it.
- The image of the last step is never looked at, and an image that was not broken
  comes back changed: here it comes back as it was.
- A class without a gradient gives NaN: here it is no candidate.
- `backward()` leaves gradients on the parameters: not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchattacks
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import Judged, gradient_of, nearest
from epdistill.robustness.subjects import Predict

# As in the authors' code: a step of length 0, from a tie, would never leave it.
NUDGE = 1e-4


@dataclass(frozen=True)
class DeepFoolSettings:
    """How far DeepFool goes.

    Attributes:
        steps: Linearisations at most; an image that is broken takes no more.
        overshoot: Share by which the sum of the steps is lengthened to cross the boundary.
        classes: The label and the likeliest others on the original image, together.
    """

    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.overshoot < math.inf or self.classes < 2:
            raise EvaluationError(
                f"received {self}; expected steps >= 1, overshoot >= 0 and classes >= 2"
            )


def deepfool(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    *,
    seed: int,
    settings: DeepFoolSettings = DeepFoolSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Step after step to the nearest boundary of the linearised model, in L2.

    Args:
        model: Differentiable; images in [0,1] to logits (N,K).
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        seed: Accepted like everywhere; nothing in this attack is random.
        settings: Steps, overshoot, classes.
        index: Accepted like everywhere; not needed.

    Returns:
        (N,C,H,W), detached, inside [0,1]. An image that the attack could not break, or that
        the model got wrong from the start, comes back as it was.

    Raises:
        EvaluationError: Bad arguments, non-finite logits or gradients, no gradient at all.
    """

    def craft(judged: Judged, origin: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        attack = BatchedDeepFool(judged, steps=settings.steps, overshoot=settings.overshoot)
        attack.classes = settings.classes
        return attack.forward(origin, labels)

    return nearest(craft, model, images, labels, index, gradients=True)


# torchattacks is not typed: to mypy its classes are Any.
class BatchedDeepFool(torchattacks.DeepFool):  # type: ignore[misc]
    """DeepFool on a whole batch, with one overshoot."""

    classes: int

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (N,C,H,W) and labels (N,) to broken images, or the originals."""
        best = images.clone()
        total = torch.zeros_like(images)
        rows = torch.arange(len(images), device=images.device)
        rivals: Tensor | None = None
        for step in range(self.steps + 1):
            current = (images[rows] + (1 + self.overshoot) * total[rows]).clamp(0, 1)
            probe = current.detach().requires_grad_()
            logits: Tensor = self.get_logits(probe)
            wrong = logits.argmax(dim=1) != labels[rows]
            best[rows[wrong]] = probe.detach()[wrong]
            if step == self.steps or bool(wrong.all()):
                break
            if rivals is None:
                others = logits.detach().scatter(1, labels[:, None], float("-inf"))
                count = min(self.classes, logits.shape[1]) - 1
                rivals = others.topk(count, dim=1).indices
            move = self._to_boundary(logits, probe, labels[rows], rivals[rows])
            rows, move = rows[~wrong], move[~wrong]
            total[rows] += move
        return best

    def _to_boundary(self, logits: Tensor, probe: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
        """The shortest step (M,C,H,W) to a linearised boundary with one of the rivals (M,R)."""
        own = logits.gather(1, labels[:, None])
        nearest_reach = torch.full_like(own[:, 0], float("inf")).detach()
        move = torch.zeros_like(probe).detach()
        for column in range(rivals.shape[1]):
            lead = (own - logits.gather(1, rivals[:, column : column + 1])).squeeze(1)
            slope = gradient_of(lead, probe, keep_graph=True)
            size = slope.flatten(1).norm(dim=1)
            lead = lead.detach()
            # Divided by the length twice below, since its square may underflow.
            reach = torch.where(size > 0, lead.abs() / size, float("inf"))
            closer = reach < nearest_reach
            step = -((reach + NUDGE) / size)[:, None, None, None] * slope
            move = torch.where(closer[:, None, None, None], step, move)
            nearest_reach = torch.where(closer, reach, nearest_reach)
        return move
