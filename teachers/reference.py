"""The published algorithm, as published: the oracle that tests and benchmarks compare with.

Synchronous updates s <- sigma(dPhi/ds) through autograd of Phi, every drive
recomputed in every sweep (Laborieux et al. 2021, and the codes built on it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from epdistill.teachers.energy import Network, States, activate, loss, phi, zero_states

PUBLISHED_SWEEPS = 250
PUBLISHED_NUDGED = 30


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
    return network.answer(images, reference_relax(network, images, sweeps))


def reference_gradients(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    beta: float,
    sweeps: int = PUBLISHED_SWEEPS,
    nudged: int = PUBLISHED_NUDGED,
) -> tuple[States, list[Tensor]]:
    """One published teaching step: 250 + 30 + 30 sweeps and autograd of Phi in the parameters.

    Args:
        network: The weights; the cross-entropy readout.
        images: (N, C, H, W), normalised.
        labels: (N,) int64.
        beta: Nudging strength.
        sweeps: Of the free phase.
        nudged: Of each nudged phase.

    Returns:
        The free states, and the gradients of the batch-mean loss in the weights W_1..W_L.
    """
    free = reference_relax(network, images, sweeps)
    high, low = (
        reference_relax(network, images, nudged, beta=sign * beta, labels=labels, start=free)
        for sign in (1, -1)
    )
    weights = [weight.detach().requires_grad_() for weight in network.weights]
    biases = [bias.detach().requires_grad_() for bias in network.biases]
    with torch.enable_grad():
        live = Network(network.architecture, tuple(weights), tuple(biases))
        difference = (phi(live, images, high) - phi(live, images, low)).mean() / (2 * beta)
        found = torch.autograd.grad(difference, [*weights, *biases])
    return free, [-gradient for gradient in found[: network.depth]]
