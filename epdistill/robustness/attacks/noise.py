"""Random noise: the weakest attack, and the yardstick for all others.

A model that noise breaks where gradients did not has masked its gradients
(Athalye et al., ICML 2018; Carlini et al., 2019). Written here: torchattacks
has Gaussian noise of a given deviation, which stays in no ball.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import (
    Judged,
    draw,
    in_ball,
    margin_of_cross_entropy,
    project_l2,
    project_linf,
    unit,
)
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.subjects import Predict

# (images (N,C,H,W), their numbers, which sample) -> noisy images (N,C,H,W)
_Sample = Callable[[Tensor, Sequence[int], int], Tensor]


@dataclass(frozen=True)
class NoiseSettings:
    """How many samples of noise are tried.

    Attributes:
        samples: Per image; an image that is broken asks no further.
    """

    samples: int = 100

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise EvaluationError(f"received {self}; expected samples >= 1")


def noise_linf(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: NoiseSettings = NoiseSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """The best of many random images of the Linf ball: inside it and at its corners in turn.

    Args:
        model: Any callable, images in [0,1] to logits (N,K).
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        eps: Radius, on pixels in [0,1]; 0 returns the images as they are.
        seed: Fixes the noise.
        settings: How many samples.
        index: The images' numbers in their data set; each image's noise depends on `seed`
            and its number. Default: 0..N-1.

    Returns:
        (N,C,H,W), detached, checked to be inside the ball and [0,1]. An image that
        withstood comes back in its best attempt.

    Raises:
        EvaluationError: Bad arguments or non-finite logits.
    """

    def sample(origin: Tensor, numbers: Sequence[int], turn: int) -> Tensor:
        noise = 2 * draw(seed, numbers, origin.shape[1:], False, "noise", turn).to(origin) - 1
        # Uniform noise seldom comes near the ball's corners, where models break first.
        noise = noise.sign() if turn % 2 else noise
        return project_linf(origin, origin + eps * noise, eps)

    craft = _BestOf(sample, settings.samples)
    return in_ball(craft, LINF, model, images, labels, eps, index, gradients=False)


def noise_l2(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: NoiseSettings = NoiseSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """The best of many images in random directions, at the surface of the L2 ball.

    Arguments, result and errors as for `noise_linf`.
    """

    def sample(origin: Tensor, numbers: Sequence[int], turn: int) -> Tensor:
        noise = draw(seed, numbers, origin.shape[1:], True, "noise", turn).to(origin)
        return project_l2(origin, origin + eps * unit(noise), eps)

    craft = _BestOf(sample, settings.samples)
    return in_ball(craft, L2, model, images, labels, eps, index, gradients=False)


@dataclass(frozen=True)
class _BestOf:
    """Tries samples until the model errs; wrong beats right, then the larger loss."""

    sample: _Sample
    samples: int

    def __call__(
        self, model: Judged, images: Tensor, labels: Tensor, numbers: Sequence[int]
    ) -> Tensor:
        best = images.clone()
        loss = torch.full_like(images[:, 0, 0, 0], float("-inf"))
        held = torch.arange(len(images), device=images.device)
        for turn in range(self.samples):
            chosen = [numbers[row] for row in held.tolist()]
            tried = self.sample(images[held], chosen, turn)
            logits = model(tried)
            found = margin_of_cross_entropy(logits, labels[held]).to(loss)
            wrong = logits.argmax(dim=1) != labels[held]
            better = wrong | (found > loss[held])
            best[held[better]] = tried[better]
            loss[held[better]] = found[better]
            held = held[~wrong]
            if len(held) == 0:
                break
        return best
