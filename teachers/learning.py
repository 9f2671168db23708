"""Equilibrium Propagation: parameter gradients from the fixed points alone.

With Phi_beta = Phi - beta * loss and s^beta its fixed point, the gradient of the
loss through the equilibrium is the limit beta -> 0 of

    one-sided    -[dPhi/dtheta(s^beta) - dPhi/dtheta(s^*)] / beta
    symmetric    -[dPhi/dtheta(s^{+beta}) - dPhi/dtheta(s^{-beta})] / (2 beta)

(Scellier & Bengio 2017; Laborieux et al. 2021, eq. 4-7). dPhi/dtheta is local:
it is the correlation of s_{n-1} with s_n put back at the argmax of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from epdistill.distributed import ALONE, Team
from epdistill.teachers.energy import Network, Pooled, States
from epdistill.teachers.mixed import LOW, make_base
from epdistill.teachers.phase import pools_at
from epdistill.teachers.relaxation import is_mixed, relax
from epdistill.teachers.schedule import Nudge, Relaxed, Schedule, make_nudge

Estimator = Literal["symmetric", "one-sided", "random-sign"]
Tipped = Literal["keep", "exclude", "clip"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the batch-mean loss, shaped like the parameters of `Network`."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    readout_weight: Tensor | None
    readout_bias: Tensor | None


@dataclass(frozen=True)
class Step:
    """What one EP step gives.

    Attributes:
        gradients: To be descended.
        free: The free phase, whose readout is the prediction.
        plus: The phase nudged with +beta (None for the other one-sided sign).
        minus: The phase nudged with -beta (None likewise).
        logits: (N, classes), of the free phase.
        adjoint_residual: (N,), of the implicit solve where there was one.
        tipped: (N,) bool, images in another basin; None without two nudged phases.
    """

    gradients: Gradients
    free: Relaxed
    plus: Relaxed | None
    minus: Relaxed | None
    logits: Tensor
    adjoint_residual: Tensor | None = None
    tipped: Tensor | None = None


def phi_difference(
    network: Network,
    images: Tensor,
    high: States,
    low: States,
    high_pools: list[Pooled],
    low_pools: list[Pooled],
    *,
    dtype: torch.dtype | None = None,
    weight: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """dPhi/dtheta(high) - dPhi/dtheta(low), summed over the batch.

    Written as products of differences and means, a+ b+ - a- b- =
    (a+ - a-)(b+ + b-)/2 + (a+ + a-)/2 (b+ - b-), so that two nearly equal
    large sums are never subtracted. That is also why the products may be formed
    in bfloat16: what is rounded is already a difference.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        high: States of the one phase.
        low: States of the other.
        high_pools: P(u_1)..P(u_L) at `high`.
        low_pools: The same at `low`.
        dtype: Of the correlations; that of the states without it.
        weight: (N,), of each image in the sum; 1 without it.

    Returns:
        The differences for the weights and for the biases, in the states' dtype.
    """
    weights, biases = [], []
    kind = dtype or images.dtype
    below_high = below_low = images
    share = None if weight is None else weight.view(-1, 1, 1, 1)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return a - b if share is None else (a - b).mul_(share)

    for n, layer in enumerate(network.architecture.layers, start=1):
        if n == 1:
            difference = network.unpool(1, apart(high[0], low[0]), high_pools[0])
            pairs = [(images, difference)]
        else:
            up_high = network.unpool(n, high[n - 1], high_pools[n - 1])
            up_low = network.unpool(n, low[n - 1], low_pools[n - 1])
            difference = apart(up_high, up_low)
            pairs = [
                (apart(below_high, below_low), (up_high + up_low).mul_(0.5)),
                ((below_high + below_low).mul_(0.5), difference),
            ]
        shape = network.weights[n - 1].shape
        parts = [
            conv2d_weight(a.to(kind), shape, b.to(kind), layer.stride, layer.padding)  # type: ignore[no-untyped-call]
            for a, b in pairs
        ]
        weights.append(torch.stack(parts).sum(0, dtype=images.dtype))
        biases.append(difference.sum((0, 2, 3)))
        below_high, below_low = high[n - 1], low[n - 1]
    return weights, biases


def _readout_gradients(
    network: Network, phases: list[States], target: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The loss gradient of the readout, averaged over phases and batch."""
    if network.readout_weight is None:
        return None, None
    weight, bias = (
        torch.zeros_like(network.readout_weight),
        torch.zeros(network.readout_weight.shape[0], dtype=target.dtype, device=target.device),
    )
    scale = 1 / (len(phases) * target.shape[0])
    for states in phases:
        error = network.logits(states[-1]).softmax(1) - target
        weight += scale * error.T @ states[-1].flatten(1)
        bias += scale * error.sum(0)
    return weight, bias


def _length(parts: States) -> Tensor:
    """The Euclidean length over all layers, (N,)."""
    return torch.stack([part.flatten(1).square().sum(1) for part in parts]).sum(0).sqrt()


def tipped_images(free: States, plus: States, minus: States) -> tuple[Tensor, Tensor]:
    """Which images a nudge has pushed into another basin, and how far apart the phases are.

    Near one fixed point the two nudges move the state to opposite sides by
    equal amounts, so s^+ + s^- - 2 s* is small beside s^+ - s^-. An image is
    counted as tipped where it is more than half as long, over all layers.

    Returns:
        (N,) bool, tipped; (N,), the length of s^+ - s^-.
    """
    bend = _length([p + m - 2 * s for p, m, s in zip(plus, minus, free, strict=True)])
    span = _length([p - m for p, m in zip(plus, minus, strict=True)])
    return bend > 0.5 * span, span


def tipped_weights(
    tipped: Tensor, span: Tensor, treatment: Tipped, team: Team = ALONE
) -> Tensor | None:
    """What each image counts in the gradient's sum, so that the rest is divided by N.

    A tipped image's difference is that of two equilibria and not beta times a slope:
    it is as long as it happens to be. `exclude` leaves it out and lets the others
    stand for it; `clip` shortens it to the longest of the images that did not tip.

    Args:
        tipped: (N,) bool.
        span: (N,), lengths of s^+ - s^-.
        treatment: What to do.
        team: The processes that share out the batch, which is treated as one.

    Returns:
        (N,), or None where every image counts once.
    """
    if treatment == "keep":
        return None
    count, settled = team.sum(torch.tensor([len(tipped), int((~tipped).sum())])).tolist()
    if settled in (0, count):
        return None
    if treatment == "exclude":
        shares: Tensor = (~tipped).to(span.dtype) * (count / settled)
        return shares
    longest = team.max(torch.where(tipped, 0.0, span).max())
    shorter = (longest / span.clamp_min(torch.finfo(span.dtype).tiny)).clamp(max=1.0)
    return torch.where(tipped, shorter, torch.ones_like(span))


@torch.no_grad()
def ep_step(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    beta: float,
    free: Schedule,
    nudged: Schedule,
    estimator: Estimator = "symmetric",
    sign: int = 1,
    bounded: bool = True,
    treat_tipped: Tipped = "keep",
    team: Team = ALONE,
) -> Step:
    """One step of Equilibrium Propagation on a batch.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        labels: (N,) int64.
        beta: Nudging strength, > 0.
        free: Schedule of the free phase, from zero states.
        nudged: Schedule of the nudged phases, from the free fixed point.
        estimator: Which of the three estimators; random-sign uses `sign`.
        sign: +1 or -1, drawn by the caller for `"random-sign"`.
        bounded: Use the curvature bound in the positive phase.
        treat_tipped: What becomes of images that a nudge has pushed into another basin (see
            `tipped_weights`). Symmetric estimator only.
        team: The processes that share out the batch, whose own part `images` is.

    Returns:
        Gradients of the batch-mean loss and the phases they came from.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    strength = beta if estimator != "random-sign" else beta * sign
    # Before anything is asked of a GPU: the bound is found on the processor.
    up = make_nudge(network, labels, strength, bounded=bounded) if strength > 0 else None
    down = None
    if estimator == "symmetric" or strength < 0:
        down = make_nudge(network, labels, -beta, bounded=bounded)
    drive = network.pool(1, network.drive(1, images))
    rest = relax(network, images, free, drive=drive)
    logits = network.answer(images, rest.states)

    # Both nudged phases take their differences from the free fixed point.
    mixed = is_mixed(network, nudged)
    base = (rest.base or make_base(network, drive, rest.states)) if mixed else None
    start = base.states if base else rest.states
    pooled = base.pooled if base else (rest.pooled or pools_at(network, rest.states, drive))

    def phase(nudge: Nudge | None) -> Relaxed | None:
        if nudge is None:
            return None
        return relax(network, images, nudged, nudge=nudge, start=start, pooled=pooled, base=base)

    plus, minus = phase(up), phase(down)
    # Without the opposite phase the free state stands in, and the distance is beta.
    high, low = plus or rest, minus or rest
    gap = 2 * beta if plus and minus else beta
    tipped = weight = None
    if plus and minus:
        tipped, span = tipped_images(rest.states, plus.states, minus.states)
        weight = tipped_weights(tipped, span, treat_tipped, team)
    pools = [
        pooled if end is rest else end.pooled or pools_at(network, end.states, drive)
        for end in (high, low)
    ]
    weights, biases = phi_difference(
        network,
        images,
        high.states,
        low.states,
        *pools,
        dtype=LOW if mixed else None,
        weight=weight,
    )
    scale = -1 / (gap * images.shape[0])
    target = make_nudge(network, labels, 0.0).target
    phases = [relaxed.states for relaxed in (plus, minus) if relaxed is not None]
    readout = _readout_gradients(network, phases, target)
    gradients = Gradients(
        tuple(w.mul_(scale) for w in weights), tuple(b.mul_(scale) for b in biases), *readout
    )
    return Step(gradients, rest, plus, minus, logits, tipped=tipped)
