"""The input gradient as Equilibrium Propagation would estimate it: from two more fixed points.

A loss enters through its slope g in the states. With the constant force
+-beta g / |g| the states settle at s^+ and s^-, and

    lambda_1 = |g| (s_1^+ - s_1^-) / (2 beta)  ->  ((a I - H)^-1 g)_1   for beta -> 0,

which is the adjoint of `epdistill.teachers.implicit` without a linear solve
(Scellier & Bengio 2017, section 3; Laborieux et al. 2021, eq. 7, read for the
input instead of the weights). Unlike the implicit gradient it sees units that a
finite force frees from 0 or 1, so it is an attack of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epdistill.teachers.energy import Network, Pooled, States
from epdistill.teachers.phase import pools_at
from epdistill.teachers.relaxation import relax
from epdistill.teachers.schedule import Push, Schedule


@torch.no_grad()
def estimate_adjoint(
    network: Network,
    images: Tensor,
    states: States,
    gradient: States,
    *,
    beta: float,
    schedule: Schedule,
) -> tuple[Tensor, Pooled]:
    """Estimate lambda_1 of every image from two nudged phases.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        states: The fixed point s_1..s_L, where both phases start.
        gradient: g, the loss's gradient in each state.
        beta: Euclidean length of each image's force over all layers.
        schedule: Of the nudged phases.

    Returns:
        lambda_1, shaped like s_1 and 0 where g is 0, and P(u_1).
    """
    drive = network.pool(1, network.drive(1, images))
    pooled = pools_at(network, states, drive)
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradient])
    length = squares.sum(0).sqrt().view(-1, 1, 1, 1)
    scale = beta / length.clamp_min(torch.finfo(length.dtype).tiny)
    # Layers without a slope are left alone, in one look for the whole batch.
    felt = squares.sum(1).tolist()

    def lowest(sign: int) -> Tensor:
        forces = [
            sign * scale * g if some else None for g, some in zip(gradient, felt, strict=True)
        ]
        nudge = Push(forces)
        end = relax(network, images, schedule, nudge=nudge, start=states, pooled=pooled)
        return end.states[0]

    return (lowest(1) - lowest(-1)) * (length / (2 * beta)), drive
