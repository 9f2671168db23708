"""What an evaluation found, image by image, and how it is put together.

The aggregate is the mean over images of the worst case over attacks, never the
worst of the attacks' means: an attacker chooses per image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from epdistill.robustness.suites import QuickSuite

TRANSFER = "transfer"


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """One attack at one radius on one subject.

    Attributes:
        attack: `"pgd"`, `"square"`, or `"transfer"`.
        view: The view that was attacked; for a transfer, the subject whose views were; for a
            black box attack, empty.
        norm: `"linf"` or `"l2"`.
        eps: The ball's radius.
        attacked: (N,) bool: images that this attack was run on.
        success: (N,) bool: images on which the subject's `predict` errs. True also where the
            attack was not needed: wrong when clean, or broken before by another attack of
            the same subject and norm at this radius or a smaller one.
        perturbation: (N,) float64: how far the adversarial image is from its original, in
            `norm`; 0 where it was wrong when clean, the earlier attack's where it was broken
            before.
    """

    attack: str
    view: str
    norm: str
    eps: float
    attacked: Tensor
    success: Tensor
    perturbation: Tensor


@dataclass(frozen=True, eq=False)
class CorruptionOutcome:
    """One corruption at one severity: `wrong` is (N,) bool."""

    corruption: str
    severity: int
    wrong: Tensor


@dataclass(frozen=True, eq=False)
class SubjectOutcome:
    """Everything found out about one subject; `clean_wrong` is (N,) bool."""

    name: str
    kind: str
    clean_wrong: Tensor
    attacks: tuple[AttackOutcome, ...]
    corruptions: tuple[CorruptionOutcome, ...]

    def broken(self, norm: str, eps: float) -> Tensor:
        """The images that some attack breaks: the worst case, (N,) bool.

        An image broken at a smaller radius is broken at a larger one, since the
        smaller ball lies inside the larger. An image wrong when clean is broken.
        """
        return self.clean_wrong | broken_by(self.attacks, norm, eps, len(self.clean_wrong))

    def radii(self) -> tuple[tuple[str, float], ...]:
        """The (norm, eps) pairs at which at least one attack ran, in order."""
        return tuple(dict.fromkeys((row.norm, row.eps) for row in self.attacks))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of one call of `evaluate`.

    Attributes:
        suite: The settings of the attacks and corruptions.
        seed: Fixes everything random.
        batch_size: How many images went through a model at once.
        limit: The number of images asked for, None for all.
        examples: (N,) int64: the images' numbers among those given to `evaluate`.
        labels: (N,) int64.
        subjects: In the order given.
    """

    suite: QuickSuite
    seed: int
    batch_size: int
    limit: int | None
    examples: Tensor
    labels: Tensor
    subjects: tuple[SubjectOutcome, ...]


def broken_by(rows: Iterable[AttackOutcome], norm: str, eps: float, n: int) -> Tensor:
    """The images that one of `rows` breaks in `norm` within radius `eps`: (n,) bool."""
    broken = torch.zeros(n, dtype=torch.bool)
    for row in rows:
        if row.norm == norm and row.eps <= eps:
            broken = broken | row.success
    return broken
