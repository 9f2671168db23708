"""The losses an attack may climb, per image; larger means nearer to an error."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.robustness.attacks.common import lead_of_label, margin_of_cross_entropy

Objective = Callable[[Tensor, Tensor], Tensor]

TINY = 1e-12

# The cross-entropy's direction, never fading: what the reported attack climbs.
log_margin: Objective = margin_of_cross_entropy


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label), (N,), from logits (N,K) and labels (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, (N,) (Carlini & Wagner 2017); above 0 where the answer is wrong."""
    return -lead_of_label(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (N,): -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)).

    Croce & Hein, ICML 2020, eq. 6. Needs K > 2.
    """
    ranked = logits.sort(dim=1, descending=True).values
    return margin(logits, labels) / (ranked[:, 0] - ranked[:, 2] + TINY)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of the outputs to the one-hot label, (N,)."""
    target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return (logits - target).square().mean(dim=1)


def towards(target: Tensor) -> Objective:
    """z_target - z_y, (N,): the loss of a targeted attack; `target` is (N,) int64."""

    def lead(logits: Tensor, labels: Tensor) -> Tensor:
        both = torch.stack((target, labels), dim=1)
        picked = logits.gather(1, both)
        return picked[:, 0] - picked[:, 1]

    return lead


def objectives(classes: int) -> dict[str, Objective]:
    """The untargeted losses that make sense for a number of classes."""
    found: dict[str, Objective] = {"cross-entropy": cross_entropy, "margin": margin}
    if classes > 2:
        found["DLR"] = dlr
    return {**found, "MSE": squared_error}
