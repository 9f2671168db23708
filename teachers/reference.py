"""The published algorithm, as published: the oracle that tests and benchmarks compare with.

Synchronous updates s <- sigma(dPhi/ds) through autograd of Phi, every drive
recomputed in every sweep (Laborieux et al. 2021, and the codes built on it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from epdistill.teachers.energy import Network, States, activate, loss, phi, zero_states

PUBLISHED_SWEEPS = 250


def reference_relax(
    network: Network,
    images: Tensor,
    sweeps: int = PUBLISHED_SWEEPS,
    *,
    beta: float = 0.0,
    labels: Tensor | None = None,
    start: States | None = None,
) -> States:
    """Relax by the published synchronous dynamics.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        sweeps: How many synchronous updates.
        beta: Nudging strength, 0 for the free phase.
        labels: (N,) int64, for a nudged phase.
        start: Where to start; zeros without it.

    Returns:
        s_1..s_L.
    """
    states = list(start) if start is not None else zero_states(network, images.shape[0])
    for _ in range(sweeps):
        with torch.enable_grad():
            variables = [state.detach().requires_grad_() for state in states]
            total = phi(network, images, variables).sum()
            if beta:
                assert labels is not None
                total = total - beta * loss(network, variables, labels).sum()
            forces = torch.autograd.grad(total, variables)
        states = [activate(force, network.architecture.curvature) for force in forces]
    return states


def reference_logits(network: Network, images: Tensor, sweeps: int = PUBLISHED_SWEEPS) -> Tensor:
    """The published answer for normalised images: (N, classes) after `sweeps` sweeps."""
    states = reference_relax(network, images, sweeps)
    return network.logits(states[-1], states[-2] if len(states) > 1 else images)
