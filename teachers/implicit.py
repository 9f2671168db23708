"""The gradient through the equilibrium, without unrolling it.

At the fixed point s = sigma(dPhi/ds), the implicit function theorem gives for a
loss with gradient g in s

    dloss/dx = (d^2 Phi / dx ds)^T lambda,   (a I - H) lambda = g  on the free units,

where H = d^2 Phi / ds^2 with the pools' argmax held fixed, a free unit is one
strictly inside [0,1], and lambda is 0 on all others. At a minimum of the energy
the matrix is symmetric positive definite, so conjugate gradients solve it with
the convolutions of the relaxation and constant memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epdistill.teachers.energy import Network, Pooled, States
from epdistill.teachers.phase import Phase

ITERATIONS = 200


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative residual at which the solve stops: 1e-3, and 1e-10 where float64 asks for it.

    On the small teacher of this package 1e-3 leaves 99.9 % of the input gradient's signs
    and a cosine of .9998 in the worst of 64 images; 1e-2 leaves .993.
    """
    return 1e-10 if dtype == torch.float64 else 1e-3


@dataclass(frozen=True)
class Adjoint:
    """The solution of the linear system and how well it was solved.

    Attributes:
        states: lambda_1..lambda_L, shaped like the states.
        residual: (N,), ||(a I - H) lambda - g|| / ||g|| on the free units (0 where g is 0).
        iterations: Conjugate-gradient iterations done.
    """

    states: States
    residual: Tensor
    iterations: int


def _dot(a: States, b: States) -> Tensor:
    return torch.stack([(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)


def _column(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


@torch.no_grad()
def solve_adjoint(
    network: Network,
    images: Tensor,
    states: States,
    gradient: States,
    *,
    tolerance: float | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Adjoint, list[Pooled]]:
    """Solve (a I - H) lambda = g on the free units, per image, by conjugate gradients.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        states: The fixed point s_1..s_L.
        gradient: g, the loss's gradient in each state.
        tolerance: Relative residual at which an image's solve stops; by dtype without it.
        iterations: The most iterations.

    Returns:
        The adjoint states, and the pools at the fixed point.
    """
    if tolerance is None:
        tolerance = default_tolerance(images.dtype)
    a, depth = network.architecture.curvature, network.depth
    drive = network.pool(1, network.drive(1, images))
    batch = Phase(network, drive, states, None)
    pooled = batch.pooled
    free = [((h > 0) & (h < a)).to(h.dtype) for h in batch.forces()]
    zero_bias = Network(network.architecture, network.weights, (None,) * depth)  # type: ignore[arg-type]

    def apply(v: States) -> States:
        """(a I - H) v on the free units."""
        out = []
        for n in range(1, depth + 1):
            w = a * v[n - 1]
            if n > 1:
                w = w - network.select(n, zero_bias.drive(n, v[n - 2]), pooled[n - 1])
            if n < depth:
                top = network.unpool(n + 1, v[n], pooled[n])
                w = w - network.feedback(n + 1, top, v[n - 1].shape[2:])
            out.append(w * free[n - 1])
        return out

    r = [g * m for g, m in zip(gradient, free, strict=True)]
    x = [torch.zeros_like(g) for g in r]
    p = r
    rr = _dot(r, r)
    scale = rr.sqrt()
    tiny = torch.finfo(rr.dtype).tiny
    done_at = (tolerance * scale).square()
    steps = 0
    while steps < iterations and bool((rr > done_at).any()):
        ap = apply(p)
        curvature = _dot(p, ap)
        # An image that is solved, or whose state is no minimum (an unconverged one
        # can have negative curvature), keeps what it has.
        go = (rr > done_at) & (curvature > 0)
        if not bool(go.any()):
            break
        alpha = torch.where(go, rr / curvature.clamp_min(tiny), torch.zeros_like(rr))
        x = [xi + _column(alpha) * pi for xi, pi in zip(x, p, strict=True)]
        r = [ri - _column(alpha) * api for ri, api in zip(r, ap, strict=True)]
        new = _dot(r, r)
        ratio = torch.where(go, new / rr.clamp_min(tiny), torch.zeros_like(rr))
        p = [ri + _column(ratio) * pi for ri, pi in zip(r, p, strict=True)]
        rr = new
        steps += 1
    relative = torch.where(scale > 0, rr.sqrt() / scale.clamp_min(tiny), torch.zeros_like(rr))
    return Adjoint(x, relative, steps), pooled


def image_gradient(network: Network, images: Tensor, lowest: Tensor, pooled: Pooled) -> Tensor:
    """(d^2 Phi/dx ds_1)^T lambda_1: the loss's gradient in the normalised images, (N, C, H, W).

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        lowest: lambda_1, shaped like s_1.
        pooled: P(u_1), which depends on the images alone.
    """
    top = network.unpool(1, lowest, pooled)
    return network.feedback(1, top, images.shape[2:])
