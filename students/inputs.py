"""Where in input space a student is matched: beside clean images, noisy, corrupted, adversarial."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from epdistill.distributed import Shard
from epdistill.robustness.attacks.common import lengths, project_l2, project_linf, unit
from epdistill.robustness.corruptions import CORRUPTIONS, SEVERITIES
from epdistill.robustness.guards import check_adversarial

# A batch is corrupted in this many parts, each with a type and a severity of its own.
PARTS = 4
# PGD's step, in radii over steps: the far side of the ball can be reached.
RELATIVE_STEP = 2.5


def noisy(
    images: Tensor,
    inputs: str,
    std: float,
    generator: torch.Generator,
    shard: Shard | None = None,
) -> Tensor:
    """Images with Gaussian noise.

    Args:
        images: (N, C, H, W) in [0,1].
        inputs: `noise`: on every image; `mix`: on every second one; others: as they are.
        std: Largest standard deviation; each image draws its own, uniform in [0, std].
        generator: A CPU generator of this step.
        shard: Which rows of a batch the images are; the whole of it without.

    Returns:
        Images of the same shape, clipped to [0,1].
    """
    if inputs not in ("noise", "mix") or std == 0:
        return images
    shard = shard or Shard(0, len(images), len(images))
    scale = torch.rand(shard.count, 1, 1, 1, generator=generator) * std
    if inputs == "mix":
        scale[::2] = 0
    noise = torch.randn((shard.count, *images.shape[1:]), generator=generator)
    return (images + (scale * noise)[shard.rows].to(images)).clamp(0, 1)


def corrupted(images: Tensor, types: Sequence[str], generator: torch.Generator) -> Tensor:
    """Images with random corruptions, in contiguous parts.

    Args:
        images: (N, C, H, W) in [0,1], C of 1 or 3, at least 8x8.
        types: Names of `epdistill.robustness.corruptions`.
        generator: A CPU generator of this step.

    Returns:
        Images of the same shape, clipped to [0,1].
    """
    parts = []
    for part in images.cpu().chunk(PARTS):
        draws = torch.randint(2**31, (2,), generator=generator).tolist()
        chosen = CORRUPTIONS[types[draws[0] % len(types)]]
        constant = chosen.constants[draws[1] % len(SEVERITIES)]
        parts.append(chosen.function(part, constant, generator).clamp(0, 1))
    return torch.cat(parts).to(images)


def climb(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    norm: str,
    eps: float,
    steps: int,
    generator: torch.Generator,
    shard: Shard | None = None,
) -> Tensor:
    """Projected gradient ascent of a loss from a random point of the ball (Madry et al. 2018).

    Args:
        loss: Images to a scalar, in which each image's part depends on it alone.
        images: (N, C, H, W) in [0,1].
        norm: `linf` or `l2`.
        eps: Radius, on pixels in [0,1].
        steps: Gradient steps.
        generator: A CPU generator of this step.
        shard: Which rows of a batch the images are; the whole of it without.

    Returns:
        (N, C, H, W), detached, checked to be inside the ball and [0,1].
    """
    project = project_linf if norm == "linf" else project_l2
    shard = shard or Shard(0, len(images), len(images))
    whole = (shard.count, *images.shape[1:])
    start = torch.randn(whole, generator=generator)[shard.rows].to(images)
    if norm == "linf":
        start = 2 * torch.special.ndtr(start) - 1
    else:
        radius = torch.rand(shard.count, 1, 1, 1, generator=generator)[shard.rows].to(images)
        start = radius * start / lengths(start)
    current = project(images, images + eps * start, eps)
    for _ in range(steps):
        current = current.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(current), current)
        direction = gradient.sign() if norm == "linf" else unit(gradient)
        moved = current.detach() + RELATIVE_STEP * eps / steps * direction
        current = project(images, moved, eps)
    check_adversarial(images, current, norm, eps)
    return current.detach()
