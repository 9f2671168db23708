"""The losses: how far a student is from the teacher's states and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.distributed import ALONE, Team

Distance = Literal["mse", "bce", "cosine"]

# A layer that hardly varies (std under 0.01 of its range [0,1]) must not drown the others.
VARIANCE_FLOOR = 1e-4


@dataclass(frozen=True)
class Matching:
    """What is compared, and how.

    Attributes:
        distance: Between states: `mse`, `bce` (layers below the last) or `cosine`.
        state_weight: Weight of the states' term.
        logit_weight: Weight of the KL term.
        temperature: That both sides' logits are divided by.
    """

    distance: Distance = "mse"
    state_weight: float = 1.0
    logit_weight: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Loss:
    """The parts of the matching loss, each a scalar tensor.

    Attributes:
        total: What is descended.
        states: Mean over the matched layers of the distance to the states.
        logits: KL divergence from the teacher's to the student's class probabilities at the
            temperature T, in nats, times T^2.
    """

    total: Tensor
    states: Tensor
    logits: Tensor


def _mean(values: Tensor, team: Team) -> Tensor:
    """The mean over all elements in the team, a scalar, detached; 0 of none."""
    if team.size == 1:
        return values.mean()
    count = torch.tensor(values.numel(), dtype=values.dtype, device=values.device)
    total, everything = team.sum(torch.stack([values.sum(), count]))
    mean: Tensor = total / everything.clamp_min(1)
    return mean


def mse_over_variance(landed: Tensor, goal: Tensor, team: Team = ALONE) -> Tensor:
    """MSE / Var(goal), a scalar; 1 is what a constant guess of the mean gets.

    The variance, over the team's batch and all units, counts as at least `VARIANCE_FLOOR`.
    """
    if team.size == 1:
        variance = goal.var(unbiased=False)
    else:
        variance = _mean((goal - _mean(goal, team)).square(), team)
    error = F.mse_loss(landed, goal) if len(goal) else landed.sum()
    found: Tensor = error / variance.clamp_min(VARIANCE_FLOOR)
    return found


def bce_over_entropy(landed: Tensor, goal: Tensor, team: Team = ALONE) -> Tensor:
    """Binary cross-entropy of sigmoid(landed) with a goal in [0,1], a scalar.

    Its least value, the goal's own entropy, is taken off, and what is left is divided by
    what a constant guess of the mean gets; that counts as at least `VARIANCE_FLOOR`.
    """
    least = _mean(_entropy(goal), team)
    guess = (_entropy(_mean(goal, team)) - least).clamp_min(VARIANCE_FLOOR)
    if len(goal) == 0:
        return landed.sum()
    return (F.binary_cross_entropy_with_logits(landed, goal) - least) / guess


def _entropy(p: Tensor) -> Tensor:
    """Of a coin with probability p, in nats, element by element; 0 at 0 and 1."""
    other: Tensor = 1 - p
    found: Tensor = torch.special.entr(p) + torch.special.entr(other)
    return found


def one_minus_cosine(landed: Tensor, goal: Tensor, team: Team = ALONE) -> Tensor:
    """1 - cosine of each image's whole map with its goal, (N, C, h, w), averaged: a scalar."""
    if len(goal) == 0:
        return landed.sum()
    loss: Tensor = 1 - F.cosine_similarity(landed.flatten(1), goal.flatten(1)).mean()
    return loss


def matching_loss(
    landed: Sequence[Tensor],
    logits: Tensor,
    targets: Sequence[Tensor],
    teacher_logits: Tensor,
    settled: Tensor,
    how: Matching,
    team: Team = ALONE,
) -> Loss:
    """Distance to the states plus KL on the answers, over the settled images.

    The KL term is classic distillation's: at temperature T, times T^2, so that its
    gradient keeps its size (Hinton, Vinyals and Dean 2015).

    In a team the batch is this process's part of a global one. What the distances are
    divided by is measured on all of it, and no gradient flows through that; so the mean of
    the losses, and of their gradients, each process counting as often as it has settled
    images, is that of the global batch.

    Args:
        landed: The student's map per matched layer, (N, C, h, w), the teacher's last layer
            last; none to match the logits alone.
        logits: The student's, (N, K).
        targets: The teacher's states, shaped like `landed`.
        teacher_logits: (N, K).
        settled: (N,) bool; images whose teacher has not settled do not count.
        how: Distance and weights.
        team: The processes that share out the batch.
    """
    keep = settled.nonzero().squeeze(1)
    if int(team.sum(torch.tensor(len(keep)))) == 0:
        # Nothing to learn from, yet the step must stay differentiable.
        zero = logits.sum() * 0.0
        return Loss(zero, zero.detach(), zero.detach())
    below = {
        "mse": mse_over_variance,
        "bce": bce_over_entropy,
        "cosine": one_minus_cosine,
    }[how.distance]
    # The last layer is read linearly: no sigmoid stands between it and the readout.
    last = mse_over_variance if how.distance == "bce" else below
    kinds = [*[below] * (len(landed) - 1), last][: len(landed)]
    parts = [
        distance(ours[keep], theirs[keep], team)
        for distance, ours, theirs in zip(kinds, landed, targets, strict=True)
    ]
    states = torch.stack(parts).mean() if parts else torch.zeros_like(logits[0, 0])
    t = how.temperature
    kl = F.kl_div(
        (logits[keep] / t).log_softmax(1),
        (teacher_logits[keep] / t).log_softmax(1),
        log_target=True,
        reduction="batchmean" if len(keep) else "sum",
    )
    kl = kl * t * t
    total = how.state_weight * states + how.logit_weight * kl
    return Loss(total, states.detach(), kl.detach())
