"""The matching loss: how far a student is from the teacher's fixed points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A layer that hardly varies (std under 0.01 of its range [0,1]) must not drown the others.
VARIANCE_FLOOR = 1e-4


@dataclass(frozen=True)
class Loss:
    """The parts of the matching loss, each a scalar tensor.

    Attributes:
        total: What is descended.
        states: Mean over layers of MSE / Var of the fixed points (1 - R^2 of each layer).
        logits: KL divergence from the teacher's to the student's class probabilities, nats.
    """

    total: Tensor
    states: Tensor
    logits: Tensor


def matching_loss(
    landed: Sequence[Tensor],
    logits: Tensor,
    targets: Sequence[Tensor],
    teacher_logits: Tensor,
    settled: Tensor,
    *,
    state_weight: float,
    logit_weight: float,
) -> Loss:
    """Variance-normalised distance to the fixed points plus KL on the answers.

    Dividing each layer's squared error by the variance of its fixed points over
    the batch makes layers comparable: 1 is what a constant guess of the mean gets.
    The variance counts as at least `VARIANCE_FLOOR`.

    Args:
        landed: The student's map per layer, (N, C, h, w).
        logits: The student's, (N, K).
        targets: s_1*..s_L*, shaped like `landed`.
        teacher_logits: (N, K).
        settled: (N,) bool; images whose teacher has not settled do not count.
        state_weight: Weight of the states' term.
        logit_weight: Weight of the KL term.
    """
    keep = settled.nonzero().squeeze(1)
    if len(keep) == 0:
        # Nothing to learn from, yet the step must stay differentiable.
        zero = logits.sum() * 0.0
        return Loss(zero, zero.detach(), zero.detach())
    parts = []
    for ours, theirs in zip(landed, targets, strict=True):
        goal = theirs[keep]
        variance = goal.var(unbiased=False).clamp_min(VARIANCE_FLOOR)
        parts.append(F.mse_loss(ours[keep], goal) / variance)
    states = torch.stack(parts).mean()
    kl = F.kl_div(
        logits[keep].log_softmax(1),
        teacher_logits[keep].log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    return Loss(state_weight * states + logit_weight * kl, states.detach(), kl.detach())


def place(images: Tensor, inputs: str, std: float, generator: torch.Generator) -> Tensor:
    """Where in input space a batch is matched.

    Args:
        images: (N, C, H, W) in [0,1].
        inputs: `clean`; `noise`: Gaussian noise on every image; `mix`: on every second one.
        std: Largest standard deviation; each image draws its own, uniform in [0, std].
        generator: A CPU generator of this step.

    Returns:
        Images of the same shape, clipped to [0,1]; both teacher and student see them.
    """
    if inputs == "clean" or std == 0:
        return images
    count = images.shape[0]
    scale = torch.rand(count, 1, 1, 1, generator=generator) * std
    if inputs == "mix":
        scale[::2] = 0
    noise = torch.randn(images.shape, generator=generator)
    return (images + (scale * noise).to(images)).clamp(0, 1)
