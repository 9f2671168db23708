"""Attacks as pure functions: model, images, labels and radius in, adversarial images out.

They stand on torchattacks, mended where it is wrong (see
`epdistill.robustness.mended`, which says where). No attack touches the global
generators, `.grad`, or a module's mode, and every image that leaves this module
has been checked against the ball and [0,1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import (
    L2,
    LINF,
    check_adversarial,
    check_eps,
    check_images,
    evaluation_mode,
)
from epdistill.robustness.mended import BestPGDL2, BestPGDLinf, Judged, LocalSquare
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
class SquareSettings:
    """How hard Square tries (Andriushchenko et al., ECCV 2020), on the margin loss.

    Attributes:
        queries: Proposals per image, after the first query with random stripes.
        p_init: Share of the pixels that the first squares cover; the schedule that
            shrinks it is stretched or squeezed to `queries`.
    """

    queries: int = 200
    p_init: float = 0.8

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.p_init <= 1:
            raise EvaluationError(f"received {self}; expected queries >= 1 and 0 < p_init <= 1")


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
    return _pgd(BestPGDLinf, LINF, model, images, labels, eps, seed, settings, index)


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
    return _pgd(BestPGDL2, L2, model, images, labels, eps, seed, settings, index)


def square_linf(
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64
    eps: float,
    *,
    seed: int,
    settings: SquareSettings = SquareSettings(),
    index: Tensor | None = None,  # (N,) int64
) -> Tensor:
    """Random search with squares of extreme perturbation: needs answers, not gradients.

    Arguments, result and errors as for `pgd_linf`, except that `model` may be any
    callable (an ONNX session). An image that withstood is returned in its best attempt.
    """
    check_images(images, labels)
    check_eps(eps)
    if eps == 0 or len(images) == 0:
        return images.detach().clone()
    origin = images.detach().clone()
    with evaluation_mode(_modules(model)), torch.no_grad():
        attack = LocalSquare(
            Judged(model, origin.device, labels),
            eps=eps,
            n_queries=settings.queries,
            p_init=settings.p_init,
            loss="margin",
            resc_schedule=True,
        )
        attack.use_seed(seed, _numbers(index, len(images)))
        attack.init_hyperparam(origin)
        _, found = attack.attack_single_run(origin, labels.detach().to(origin.device))
    check_adversarial(origin, found, LINF, eps)
    return _plain(found)


def _pgd(
    kind: type[BestPGDLinf] | type[BestPGDL2],
    norm: str,
    model: Predict,
    images: Tensor,
    labels: Tensor,
    eps: float,
    seed: int,
    settings: PGDSettings,
    index: Tensor | None,
) -> Tensor:
    check_images(images, labels)
    check_eps(eps)
    if eps == 0 or len(images) == 0:
        return images.detach().clone()
    # A caller's no_grad or inference_mode must not switch the gradients off.
    with evaluation_mode(_modules(model)), torch.inference_mode(False), torch.enable_grad():
        origin = images.detach().clone()
        attack = kind(
            Judged(model, origin.device, labels),
            eps=eps,
            alpha=settings.relative_step * eps / settings.steps,
            steps=settings.steps,
            random_start=settings.random_start,
        )
        attack.use_seed(seed, _numbers(index, len(images)), settings.restarts)
        found: Tensor = attack.forward(origin, labels.detach().clone().to(origin.device))
    check_adversarial(origin, found, norm, eps)
    return _plain(found)


def _numbers(index: Tensor | None, n: int) -> Sequence[int]:
    if index is None:
        return range(n)
    if index.shape != (n,):
        raise EvaluationError(
            f"received an index of shape {tuple(index.shape)}; expected ({n},), one per image"
        )
    return [int(number) for number in index.tolist()]


def _modules(model: Predict) -> tuple[nn.Module, ...]:
    return (model,) if isinstance(model, nn.Module) else ()


def _plain(images: Tensor) -> Tensor:
    return images.detach().clone()
