"""Other learning rules on the same network and the same equilibrium, for comparison.

Equilibrium Propagation estimates the gradient of the loss through the fixed
point. Here that gradient is computed outright: by the implicit function theorem
(`implicit`), or by backpropagation through the last sweeps (`bptt`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from epdistill.teachers.energy import Network, Pooled, States, loss
from epdistill.teachers.implicit import ITERATIONS, solve_adjoint
from epdistill.teachers.learning import Gradients, Step
from epdistill.teachers.relaxation import relax, unrolled
from epdistill.teachers.schedule import Relaxed, Schedule

Rule = Literal["ep", "bptt", "implicit"]


def _free(
    network: Network, images: Tensor, schedule: Schedule, start: States | None = None
) -> tuple[Relaxed, Tensor]:
    if start is not None:
        schedule = schedule.with_(sweeps=1, tolerance=0.0)
    rest = relax(network, images, schedule, start=start)
    return rest, network.answer(images, rest.states)


def phi_slope(
    network: Network, images: Tensor, states: States, direction: States, pooled: list[Pooled]
) -> tuple[list[Tensor], list[Tensor]]:
    """d/de dPhi/dtheta(s + e * direction) at e = 0, argmax held fixed, summed over the batch.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        states: s_1..s_L.
        direction: Shaped like the states.
        pooled: P(u_1)..P(u_L) at the states.

    Returns:
        The slopes for the weights and for the biases.
    """
    weights, biases = [], []
    below, below_move = images, None
    for n, layer in enumerate(network.architecture.layers, start=1):
        shape = network.weights[n - 1].shape
        moved = network.unpool(n, direction[n - 1], pooled[n - 1])
        slope = conv2d_weight(below, shape, moved, layer.stride, layer.padding)  # type: ignore[no-untyped-call]
        if below_move is not None:
            top = network.unpool(n, states[n - 1], pooled[n - 1])
            slope = slope + conv2d_weight(below_move, shape, top, layer.stride, layer.padding)  # type: ignore[no-untyped-call]
        weights.append(slope)
        biases.append(moved.sum((0, 2, 3)))
        below, below_move = states[n - 1], direction[n - 1]
    return weights, biases


def loss_gradient(network: Network, states: States, labels: Tensor) -> States:
    """dloss/ds_n per image, shaped like the states; only the top state meets the loss."""
    with torch.enable_grad():
        top = states[-1].detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(network, [*states[:-1], top], labels).sum(), top)
    return [*(torch.zeros_like(state) for state in states[:-1]), slope]


@torch.no_grad()
def implicit_step(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    free: Schedule,
    tolerance: float | None = None,
    iterations: int = ITERATIONS,
) -> Step:
    """The gradient through the equilibrium by the implicit function theorem.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        labels: (N,) int64.
        free: Schedule of the free phase.
        tolerance: Of the linear solve, relative; by dtype without it.
        iterations: The most conjugate-gradient iterations.
    """
    rest, logits = _free(network, images, free)
    force = loss_gradient(network, rest.states, labels)
    adjoint, pooled = solve_adjoint(
        network, images, rest.states, force, tolerance=tolerance, iterations=iterations
    )
    weights, biases = phi_slope(network, images, rest.states, adjoint.states, pooled)
    count = images.shape[0]
    readout_weight = readout_bias = None
    if network.readout_weight is not None:
        error = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / count
        readout_weight = error.T @ rest.states[-1].flatten(1)
        readout_bias = error.sum(0)
    gradients = Gradients(
        tuple(weight / count for weight in weights),
        tuple(bias / count for bias in biases),
        readout_weight,
        readout_bias,
    )
    return Step(gradients, rest, None, None, logits, adjoint.residual)


def bptt_step(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    free: Schedule,
    sweeps: int,
    start: States | None = None,
) -> Step:
    """Backpropagation through the last `sweeps` sweeps at the fixed point.

    Started from the free fixed point, the unroll stands still; its gradient is
    the Neumann series of the implicit one, cut after `sweeps` terms.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        labels: (N,) int64.
        free: Schedule of the free phase, which also says in which order layers update.
        sweeps: Length of the unroll; memory grows with it.
        start: The fixed point, if it is at hand; `free` relaxes to it otherwise.
    """
    rest, logits = _free(network, images, free, start)
    leaves = [
        tensor.detach().clone().requires_grad_() for tensor in (*network.weights, *network.biases)
    ]
    readout = [
        tensor.detach().clone().requires_grad_()
        for tensor in (network.readout_weight, network.readout_bias)
        if tensor is not None
    ]
    depth = network.depth
    live = Network(
        network.architecture,
        tuple(leaves[:depth]),
        tuple(leaves[depth:]),
        *(readout or (None, None)),
    )
    with torch.enable_grad():
        schedule = free.with_(sweeps=sweeps, tolerance=0.0, precision="full")
        states = unrolled(live, images, schedule, start=rest.states)
        total = loss(live, states, labels).mean()
        # Fewer sweeps than layers do not reach the lowest ones: their gradient is 0.
        found = torch.autograd.grad(
            total, [*leaves, *readout], allow_unused=True, materialize_grads=True
        )
    gradients = Gradients(
        tuple(found[:depth]), tuple(found[depth : 2 * depth]), *(found[2 * depth :] or (None, None))
    )
    return Step(gradients, rest, None, None, logits)
