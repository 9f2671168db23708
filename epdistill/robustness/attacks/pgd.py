"""Projected gradient ascent and its one-step form, from torchattacks, mended.

`PGD` and `PGDL2` of torchattacks 3.5.1 with the loop replaced. What is wrong
there, and what is done here instead:

- PGDL2 leaves small balls by float32 rounding: here it stays that far inside.
- The last iterate is returned: here the best one per image (wrong beats right,
  then the larger loss).
- PGDL2 averages the loss over the batch and adds 1e-10 to the gradient's norm,
  so on confident models steps shrink with the batch size and with confidence:
  each image's gradient is normalised on its own, without a floor.
- Cross-entropy loses its direction in float32 once p(label) rounds to 1: its
  inner margin is climbed instead (see `margin_of_cross_entropy`), which has the
  same direction and never fades.
- Random numbers come from the global generator: here an image's numbers depend
  on the seed and the image's own number alone, not on the batch it is in.
- After an attack the whole model is put back into train mode, which thaws
  frozen BatchNorm: here each submodule gets back its own mode.

Right as they are, and kept: the steps along the gradient's sign and direction,
the projections in Linf and the random starts. FGSM is right but for the fading
cross-entropy: it is one step of the same loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchattacks
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks.common import (
    Judged,
    draw,
    gradient_of,
    in_ball,
    margin_of_cross_entropy,
    project_l2,
    project_linf,
    unit,
)
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.subjects import Predict


@dataclass(frozen=True)
class PGDSettings:
    """How hard PGD tries (Madry et al., ICLR 2018).

    Attributes:
        steps: Gradient steps per restart.
        restarts: Independent starts; the best image over all of them is returned.
        relative_step: The step is `relative_step * eps / steps`; above 1 the far side of
            the ball can be reached from anywhere in it.
        random_start: Start at a random point of the ball instead of at the image.
    """

    steps: int = 20
    restarts: int = 1
    relative_step: float = 2.5
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not self.relative_step > 0:
            raise EvaluationError(
                f"received {self}; expected steps >= 1, restarts >= 1 and relative_step > 0"
            )


@dataclass(frozen=True)
class FGSMSettings:
    """The one step of FGSM (Goodfellow et al., ICLR 2015).

    Attributes:
        relative_step: The step is `relative_step * eps`; 1 reaches the ball's surface.
    """

    relative_step: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.relative_step <= 1:
            raise EvaluationError(f"received {self}; expected 0 < relative_step <= 1")


def pgd_linf(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: PGDSettings = PGDSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Projected gradient ascent of the true label's cross-entropy in the Linf ball.

    Args:
        model: Differentiable; images in [0,1] to logits (N,K).
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        eps: Radius, on pixels in [0,1]; 0 returns the images as they are.
        seed: Fixes the random starts.
        settings: Steps, restarts, step size.
        index: The images' numbers in their data set; each image's random numbers depend on
            `seed` and its number. Default: 0..N-1.

    Returns:
        (N,C,H,W), detached, checked to be inside the ball and [0,1].

    Raises:
        EvaluationError: Bad arguments, non-finite logits or gradients, no gradient at all.
    """
    craft = _climb(BestPGDLinf, eps, seed, settings)
    return in_ball(craft, LINF, model, images, labels, eps, index, gradients=True)


def pgd_l2(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: PGDSettings = PGDSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Projected gradient ascent of the true label's cross-entropy in the L2 ball.

    Arguments, result and errors as for `pgd_linf`; `eps` is the Euclidean length
    of the whole image's perturbation, with pixels in [0,1].
    """
    craft = _climb(BestPGDL2, eps, seed, settings)
    return in_ball(craft, L2, model, images, labels, eps, index, gradients=True)


def fgsm(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: FGSMSettings = FGSMSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """One step along the gradient's sign, from the image to the surface of the Linf ball.

    Arguments, result and errors as for `pgd_linf`. Nothing in it is random. Where
    the step made the loss smaller, the image comes back as it was.
    """
    once = PGDSettings(1, 1, settings.relative_step, random_start=False)
    craft = _climb(BestPGDLinf, eps, seed, once)
    return in_ball(craft, LINF, model, images, labels, eps, index, gradients=True)


def _climb(
    kind: type[BestPGDLinf] | type[BestPGDL2], eps: float, seed: int, settings: PGDSettings
) -> Callable[[Judged, Tensor, Tensor, Sequence[int]], Tensor]:
    def craft(model: Judged, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        attack = kind(
            model,
            eps=eps,
            alpha=settings.relative_step * eps / settings.steps,
            steps=settings.steps,
            random_start=settings.random_start,
        )
        attack.use_seed(seed, numbers, settings.restarts)
        return attack.forward(images, labels)

    return craft


class _KeepBest(ABC):
    """The loop that replaces torchattacks' own in PGD and PGDL2."""

    steps: int
    random_start: bool
    eps: float
    alpha: float
    get_logits: Callable[[Tensor], Tensor]

    def use_seed(self, seed: int, numbers: Sequence[int], restarts: int) -> None:
        self.seed = seed
        self.numbers = tuple(numbers)
        self.restarts = restarts

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        best = images
        best_loss = torch.full_like(images[:, 0, 0, 0], float("-inf"))
        best_wrong = torch.zeros_like(labels, dtype=torch.bool)
        for restart in range(self.restarts):
            current = images
            if self.random_start:
                current = self.project(images, images + self.start(images, restart))
            for step in range(self.steps + 1):
                # The last iterate is only looked at.
                climb = step < self.steps
                current = current.detach().requires_grad_(climb)
                with torch.set_grad_enabled(climb):
                    logits = self.get_logits(current)
                    loss = margin_of_cross_entropy(logits, labels)
                wrong = logits.argmax(dim=1) != labels
                better = torch.where(wrong == best_wrong, loss > best_loss, wrong).detach()
                best = torch.where(better[:, None, None, None], current, best).detach()
                best_loss = torch.where(better, loss, best_loss).detach()
                best_wrong = best_wrong | wrong
                if climb:
                    direction = self.direction(gradient_of(loss, current))
                    moved = current.detach() + self.alpha * direction
                    current = self.project(images, moved)
        return best

    @abstractmethod
    def start(self, images: Tensor, restart: int) -> Tensor:
        """A random perturbation within the ball, (N,C,H,W)."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent in the norm, (N,C,H,W)."""

    @abstractmethod
    def project(self, images: Tensor, moved: Tensor) -> Tensor:
        """Images inside the ball and [0,1], (N,C,H,W)."""

    def draw(self, images: Tensor, normal: bool, *use: str | int) -> Tensor:
        return draw(self.seed, self.numbers, images.shape[1:], normal, *use).to(images)


# torchattacks is not typed: to mypy its classes are Any.
class BestPGDLinf(_KeepBest, torchattacks.PGD):  # type: ignore[misc]
    """PGD in the Linf ball that returns the best iterate of each image."""

    def start(self, images: Tensor, restart: int) -> Tensor:
        """A uniformly random perturbation, (N,C,H,W)."""
        return self.eps * (2 * self.draw(images, False, "start", restart) - 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent in Linf, (N,C,H,W)."""
        return gradient.sign()

    def project(self, images: Tensor, moved: Tensor) -> Tensor:
        """The nearest images inside the ball and [0,1], (N,C,H,W)."""
        return project_linf(images, moved, self.eps)


class BestPGDL2(_KeepBest, torchattacks.PGDL2):  # type: ignore[misc]
    """PGD in the L2 ball that returns the best iterate of each image."""

    def start(self, images: Tensor, restart: int) -> Tensor:
        """A perturbation of random direction and uniformly random length, (N,C,H,W)."""
        radius = draw(self.seed, self.numbers, (1, 1, 1), False, "radius", restart).to(images)
        return self.eps * radius * unit(self.draw(images, True, "start", restart))

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent in L2, (N,C,H,W)."""
        return unit(gradient)

    def project(self, images: Tensor, moved: Tensor) -> Tensor:
        """Images inside the ball and [0,1], (N,C,H,W)."""
        return project_l2(images, moved, self.eps)
