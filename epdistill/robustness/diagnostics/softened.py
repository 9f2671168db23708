"""An unrolled EP-CNN whose clamp is exact forwards and soft backwards.

sigma(h) = clip(h/a, 0, 1) has slope 0 outside the interval, so a saturated
state passes no gradient on. Here it passes some, fading with the distance from
the interval: the backward pass differentiable approximation (BPDA) of Athalye
et al., ICML 2018. If attacks along it succeed where exact gradients fail, the
exact ones were masked by saturation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError

if TYPE_CHECKING:
    from epdistill.teachers.model import EPCNN


class _SoftClip(torch.autograd.Function):
    """x -> clip(x, 0, 1); slope 1 inside, exp(-distance to the interval) outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        distance = (x - x.clamp(0, 1)).abs()
        return grads[0] * torch.exp(-distance)


def soft_clip(x: Tensor) -> Tensor:
    """clip(x, 0, 1), elementwise, with a slope that never vanishes."""
    clipped: Tensor = _SoftClip.apply(x)
    return clipped


class SoftenedUnroll(nn.Module):
    """A view of an EP-CNN: `sweeps` sweeps from zero, softened in the backward pass.

    Forwards it is exactly the unrolled model, by the teacher's own schedule.

    Args:
        teacher: Whose parameters are used.
        sweeps: Length of the unroll, at least 1.
    """

    def __init__(self, teacher: EPCNN, sweeps: int) -> None:
        super().__init__()
        if sweeps < 1:
            raise EvaluationError(f"received an unroll of {sweeps} sweeps; expected at least 1")
        self.teacher, self.sweeps = teacher, sweeps

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) in [0,1] to logits (N,K)."""
        from epdistill.teachers.relaxation import unrolled

        x = self.teacher.normalise(images)
        network = self.teacher.network()
        schedule = self.teacher.schedule.with_(sweeps=self.sweeps)
        return network.answer(x, unrolled(network, x, schedule, clip=soft_clip))
