"""What every model and every attack must obey: checked, not assumed.

Also here: the seeds. Every random number of an evaluation comes from a local
generator seeded with `derive_seed`, so the global generators are neither read
nor moved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError

LINF = "linf"
L2 = "l2"
NORMS = (LINF, L2)

# How far outside its ball an image may be, in either norm: float32 images near 1
# carry a rounding error of up to 6e-8 per pixel.
TOLERANCE = 1e-6


def derive_seed(seed: int, *parts: str | int | float) -> int:
    """A seed of its own for each use, from the evaluation's seed and what it is used for."""
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, and restore the mode of each submodule afterwards.

    `module.train()` would not do as the way back: it thaws submodules that were
    frozen on purpose (a BatchNorm held in evaluation mode inside a training model).
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_images(images: Tensor, labels: Tensor) -> None:
    """Refuse what is not a batch of images in [0,1] with one label each.

    Args:
        images: (N,C,H,W), floating point, in [0,1].
        labels: (N,) int64.

    Raises:
        EvaluationError: Wrong shape, type or range.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise EvaluationError(
            f"received images of shape {tuple(images.shape)} and type {images.dtype}; expected "
            "(N,C,H,W) floating point: divide 8-bit images by 255"
        )
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise EvaluationError(
            f"received labels of shape {tuple(labels.shape)} and type {labels.dtype}; expected "
            f"({len(images)},) int64: give one class number per image"
        )
    _check_range(images, "an image")


def check_eps(eps: float) -> None:
    """Refuse a radius that is negative, infinite or not a number.

    Raises:
        EvaluationError: `eps` is not a finite number >= 0.
    """
    if not math.isfinite(eps) or eps < 0:
        raise EvaluationError(
            f"received eps = {eps}; expected a finite radius >= 0 on pixels in [0,1]: "
            "for 8 grey levels write 8/255"
        )


def check_logits(logits: Tensor, n: int, labels: Tensor | None = None) -> Tensor:
    """Return `logits` if they can be judged.

    Args:
        logits: What a model returned.
        n: How many images it was given.
        labels: int64, of any number; when given, each must be one of the K classes.

    Returns:
        The same tensor, (n,K) with K >= 2 and every value finite.

    Raises:
        EvaluationError: Wrong shape, a label outside 0..K-1, or NaN or infinity.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(
            f"the model returned {got} for {n} images; expected logits of shape ({n}, classes)"
        )
    classes = logits.shape[1]
    if classes < 2:
        raise EvaluationError(f"the model has {classes} class(es); expected at least 2")
    if (
        labels is not None
        and len(labels)
        and not 0 <= int(labels.min()) <= int(labels.max()) < classes
    ):
        raise EvaluationError(
            f"received labels {int(labels.min())}..{int(labels.max())} for a model with {classes} "
            f"classes; expected 0..{classes - 1}: evaluate on the data the model was trained for"
        )
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        bad = int((~finite).any(dim=1).sum())
        raise EvaluationError(
            f"the model returned NaN or infinite logits for {bad} of {n} images; expected finite "
            "numbers: such a model cannot be judged, look at its weights and input scaling"
        )
    return logits


def distances(images: Tensor, others: Tensor, norm: str) -> Tensor:
    """How far each image of `others` is from its original.

    Args:
        images: (N,C,H,W).
        others: (N,C,H,W).
        norm: `"linf"` or `"l2"`.

    Returns:
        (N,) float64 on the CPU.

    Raises:
        EvaluationError: An unknown norm.
    """
    # In double precision, so that what is measured is the images and not the measuring.
    delta = (others.detach().cpu().double() - images.detach().cpu().double()).flatten(1)
    if norm == LINF:
        return delta.abs().amax(dim=1)
    if norm == L2:
        lengths: Tensor = delta.norm(dim=1)
        return lengths
    raise EvaluationError(f"received norm {norm!r}; expected one of {', '.join(NORMS)}")


def check_adversarial(images: Tensor, adversarial: Tensor, norm: str, eps: float) -> Tensor:
    """Verify that adversarial images are finite, in [0,1] and inside the ball.

    Args:
        images: (N,C,H,W) in [0,1], the originals.
        adversarial: (N,C,H,W).
        norm: `"linf"` or `"l2"`.
        eps: The ball's radius; `TOLERANCE` more is allowed.

    Returns:
        The distances, (N,) float64 on the CPU.

    Raises:
        EvaluationError: The attack broke the threat model.
    """
    if adversarial.shape != images.shape:
        raise EvaluationError(
            f"an attack returned images of shape {tuple(adversarial.shape)}; expected "
            f"{tuple(images.shape)}: the attack is at fault, not the model"
        )
    _check_range(adversarial, "an adversarial image")
    found = distances(images, adversarial, norm)
    if len(found) and float(found.max()) > eps + TOLERANCE:
        raise EvaluationError(
            f"an adversarial image is {float(found.max()):.8g} away from its original in {norm}; "
            f"expected at most {eps:.8g}: the attack is at fault, not the model"
        )
    return found


def _check_range(images: Tensor, what: str) -> None:
    if images.numel() == 0:
        return
    if not bool(torch.isfinite(images).all()):
        raise EvaluationError(f"{what} holds NaN or infinity; expected finite pixels in [0,1]")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise EvaluationError(
            f"{what} has pixels in {low:.6g}..{high:.6g}; expected 0..1: normalisation belongs "
            "inside the model"
        )
