"""The gradient through the equilibrium, without unrolling it.

At the fixed point s = sigma(dPhi/ds), the implicit function theorem gives for a
loss with gradient g in s

    dloss/dx = (d^2 Phi / dx ds)^T lambda,   (a I - H) lambda = g  on the free units,

where H = d^2 Phi / ds^2 with the pools' argmax held fixed, a free unit is one
strictly inside [0,1], and lambda is 0 on all others. Layers of equal parity do not
touch each other, so the odd ones are eliminated exactly,

    (a I - H_eo H_oe / a) lambda_e = g_e + H_eo g_o / a,    lambda_o = (g_o + H_oe lambda_e) / a,

which halves the iterations at the same price each (cyclic reduction; Hageman & Young
1981, chapter 9). At a minimum of the energy the matrix is symmetric positive definite,
so conjugate gradients solve it with the convolutions of the relaxation and constant
memory.
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
    odd, even = range(1, depth + 1, 2), range(2, depth + 1, 2)

    def pull(n: int, beside: dict[int, Tensor]) -> Tensor:
        """(H v)_n on the free units, from v in the layers beside n."""
        total = None
        if n < depth:
            top = network.unpool(n + 1, beside[n + 1], pooled[n])
            total = network.feedback(n + 1, top, states[n - 1].shape[2:])
        if n > 1:
            below = network.select(n, zero_bias.drive(n, beside[n - 1]), pooled[n - 1])
            total = below if total is None else total.add_(below)
        return torch.zeros_like(free[n - 1]) if total is None else total.mul_(free[n - 1])

    g = {n: gradient[n - 1] * free[n - 1] for n in range(1, depth + 1)}

    def apply(v: dict[int, Tensor]) -> States:
        """(a I - H_eo H_oe / a) v."""
        through = {n: pull(n, v).div_(a) for n in odd}
        return [a * v[n] - pull(n, through) for n in even]

    lifted = {n: g[n] / a for n in odd}
    r = [g[n] + pull(n, lifted) for n in even]
    x = [torch.zeros_like(part) for part in r]
    p = r
    scale = _dot(list(g.values()), list(g.values())).sqrt()
    rr = _dot(r, r) if r else torch.zeros_like(scale)
    tiny = torch.finfo(rr.dtype).tiny
    done_at = (tolerance * scale).square()
    steps = 0
    while steps < iterations and bool((rr > done_at).any()):
        ap = apply(dict(zip(even, p, strict=True)))
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
    solved = dict(zip(even, x, strict=True))
    solved |= {n: lifted[n] + pull(n, solved).div_(a) for n in odd}
    relative = torch.where(scale > 0, rr.sqrt() / scale.clamp_min(tiny), torch.zeros_like(rr))
    return Adjoint([solved[n] for n in range(1, depth + 1)], relative, steps), pooled


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
