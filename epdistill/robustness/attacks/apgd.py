"""Auto-PGD (Croce and Hein, ICML 2020), from torchattacks, mended.

The step rule is the paper's Algorithm 1 and the DLR loss its equation (6). What
torchattacks 3.5.1 does wrong, and what is done here instead:

- 10 steps by default, a tenth of the paper's: here 100.
- The first test of a step size compares with a row of the table that is not yet
  written (the loss before the first step): here that loss is in the table.
- The last image that broke the model is returned: here the best iterate (wrong
  beats right, then the larger loss).
- Cross-entropy fades in float32 on confident models: its inner margin is
  climbed, as in PGD, with the same direction and the same decisions.
- With two classes the DLR loss ends in an index error: here in one clear line.
- L2 leaves small balls by rounding, the global generators are reseeded, frozen
  BatchNorm thaws: none of that here. An image's random numbers depend on the
  seed and the image's own number alone.
"""

from __future__ import annotations

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

# Algorithm 1 of the paper: momentum, share of successful steps, checkpoints in
# parts of the budget.
ALPHA = 0.75
RHO = 0.75
FIRST_CHECKPOINT, SHRINK, SHORTEST = 0.22, 0.03, 0.06

LOSSES = ("ce", "dlr")


@dataclass(frozen=True)
class APGDSettings:
    """How hard APGD tries; there is no step size to choose.

    Attributes:
        steps: Gradient steps per restart.
        loss: `"ce"` (cross-entropy) or `"dlr"` (difference of logits ratio, which needs
            three classes). Neither is the stronger on every model: PGD climbs the
            cross-entropy already, hence the other by default.
        restarts: Independent starts; an image that is broken starts no more.
    """

    steps: int = 100
    loss: str = "dlr"
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.loss not in LOSSES:
            raise EvaluationError(
                f"received {self}; expected steps >= 1, restarts >= 1 and a loss among "
                f"{', '.join(LOSSES)}"
            )


def apgd_linf(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: APGDSettings = APGDSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Gradient ascent with momentum and a step size that adapts, in the Linf ball.

    Args:
        model: Differentiable; images in [0,1] to logits (N,K).
        images: (N,C,H,W) floating point in [0,1].
        labels: (N,) int64, the true classes.
        eps: Radius, on pixels in [0,1]; 0 returns the images as they are.
        seed: Fixes the random starts.
        settings: Steps, loss, restarts.
        index: The images' numbers in their data set; each image's random numbers depend on
            `seed` and its number. Default: 0..N-1.

    Returns:
        (N,C,H,W), detached, checked to be inside the ball and [0,1].

    Raises:
        EvaluationError: Bad arguments, non-finite logits or gradients, no gradient at all,
            or the DLR loss on a model with two classes.
    """
    craft = _climb(LINF, eps, seed, settings)
    return in_ball(craft, LINF, model, images, labels, eps, index, gradients=True)


def apgd_l2(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: APGDSettings = APGDSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """As `apgd_linf`, in the L2 ball."""
    craft = _climb(L2, eps, seed, settings)
    return in_ball(craft, L2, model, images, labels, eps, index, gradients=True)


def _climb(
    norm: str, eps: float, seed: int, settings: APGDSettings
) -> Callable[[Judged, Tensor, Tensor, Sequence[int]], Tensor]:
    def craft(model: Judged, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        attack = BestAPGD(model, norm=norm, eps=eps, steps=settings.steps, loss=settings.loss)
        attack.n_restarts = settings.restarts
        attack.use_seed(seed, numbers)
        return attack.forward(images, labels)

    return craft


# torchattacks is not typed: to mypy its classes are Any.
class BestAPGD(torchattacks.APGD):  # type: ignore[misc]
    """APGD with local random numbers that returns the best iterate of each image."""

    def use_seed(self, seed: int, numbers: Sequence[int]) -> None:
        """Fix all randomness; `numbers` are the images' numbers in their data set."""
        self.seed = seed
        self.numbers = tuple(numbers)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The best images over all restarts, (N,C,H,W)."""
        best = _Best(images)
        for restart in range(self.n_restarts):
            held = (~best.wrong).nonzero().flatten()
            if len(held) == 0:
                break
            start = self._start(images[held], [self.numbers[i] for i in held.tolist()], restart)
            self._run(images[held], labels[held], start, best, held)
        return best.images

    def _start(self, images: Tensor, numbers: Sequence[int], restart: int) -> Tensor:
        """A random point at the ball's surface, clamped to [0,1]."""
        shape = images.shape[1:]
        if self.norm == LINF:
            noise = 2 * draw(self.seed, numbers, shape, False, "start", restart).to(images) - 1
            noise = noise / noise.flatten(1).abs().amax(dim=1)[:, None, None, None]
        else:
            noise = unit(draw(self.seed, numbers, shape, True, "start", restart).to(images))
        return self._project(images, images + self.eps * noise)

    def _run(
        self, images: Tensor, labels: Tensor, start: Tensor, best: _Best, held: Tensor
    ) -> None:
        """One restart from `start`; what it finds goes into the rows `held` of `best`."""
        current = previous = start
        loss, gradient, wrong = self._ask(current, labels)
        best.offer(held, current, loss, wrong)
        top_images, top_loss, top_gradient = current, loss, gradient
        step = torch.full_like(images[:, :1, :1, :1], 2 * self.eps)
        losses = [loss]
        top_at_check, halved = loss, torch.ones_like(wrong)
        wait = max(int(FIRST_CHECKPOINT * self.steps), 1)
        since = 0
        for turn in range(self.steps):
            direction = gradient.sign() if self.norm == LINF else unit(gradient)
            plain = self._project(images, current + step * direction)
            weight = ALPHA if turn else 1.0
            moved = current + weight * (plain - current) + (1 - weight) * (current - previous)
            previous, current = current, self._project(images, moved)
            loss, gradient, wrong = self._ask(current, labels)
            best.offer(held, current, loss, wrong)
            losses.append(loss)
            up = loss > top_loss
            top_images = torch.where(up[:, None, None, None], current, top_images)
            top_gradient = torch.where(up[:, None, None, None], gradient, top_gradient)
            top_loss = torch.where(up, loss, top_loss)
            since += 1
            if since == wait:
                recent = torch.stack(losses[-wait - 1 :])
                rises = (recent[1:] > recent[:-1]).sum(dim=0)
                stuck = ~halved & (top_at_check >= top_loss)
                halved = (rises <= RHO * wait) | stuck
                top_at_check = top_loss
                back = halved[:, None, None, None]
                step = torch.where(back, step / 2, step)
                current = torch.where(back, top_images, current)
                gradient = torch.where(back, top_gradient, gradient)
                since = 0
                shortest = max(int(SHORTEST * self.steps), 1)
                wait = max(wait - max(int(SHRINK * self.steps), 1), shortest)

    def _ask(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (N,), its gradient (N,C,H,W), and whether the model errs (N,)."""
        probe = images.detach().requires_grad_()
        logits: Tensor = self.get_logits(probe)
        if self.loss == "ce":
            loss = margin_of_cross_entropy(logits, labels)
        elif logits.shape[1] > 2:
            loss = self.dlr_loss(logits, labels)
        else:
            raise EvaluationError(
                "the DLR loss compares three classes, and the model has 2; expected "
                "loss='ce' for such a model"
            )
        gradient = gradient_of(loss, probe)
        return loss.detach(), gradient, (logits.argmax(dim=1) != labels).detach()

    def _project(self, images: Tensor, moved: Tensor) -> Tensor:
        project = project_linf if self.norm == LINF else project_l2
        return project(images, moved, self.eps)


class _Best:
    """The best image of each row seen so far: wrong beats right, then the larger loss."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.wrong = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self._loss = images.new_full((len(images),), float("-inf"))

    def offer(self, rows: Tensor, images: Tensor, loss: Tensor, wrong: Tensor) -> None:
        """Take over what is better; all (M,...) for M rows."""
        loss = loss.to(self._loss)
        better = torch.where(wrong == self.wrong[rows], loss > self._loss[rows], wrong)
        taken = rows[better]
        self.images[taken] = images[better]
        self._loss[taken] = loss[better]
        self.wrong[taken] |= wrong[better]
