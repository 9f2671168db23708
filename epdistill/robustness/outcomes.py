"""What an evaluation found, image by image, and how it is put together.

The aggregate is the mean over images of the worst case over attacks, never the
worst of the attacks' means: an attacker chooses per image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epdistill.robustness.guards import NORMS
from epdistill.robustness.suites import QuickSuite

TRANSFER = "transfer"


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """One attack at one radius on one subject.

    Attributes:
        attack: `"pgd"`, `"square"`, ..., or `"transfer"`.
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
        scope: (N,) bool: the images that this attack is about. Costly attacks are run on
            some images only, and their accuracy is that on these.
        queries: (N,) float64: images that the model was shown per image attacked, in the
            mean over the batch; 0 where the attack was not run.
    """

    attack: str
    view: str
    norm: str
    eps: float
    attacked: Tensor
    success: Tensor
    perturbation: Tensor
    scope: Tensor
    queries: Tensor


@dataclass(frozen=True, eq=False)
class CorruptionOutcome:
    """One corruption at one severity.

    Attributes:
        family: `"cifar10c-style"` (generated here) or `"cifar10c"` (the official arrays).
        corruption: Its name.
        severity: 1..5.
        extra: Outside the fifteen types that the mean is taken over.
        wrong: (N,) bool.
    """

    family: str
    corruption: str
    severity: int
    extra: bool
    wrong: Tensor


@dataclass(frozen=True, eq=False)
class TemporalOutcome:
    """PGD along one gradient, judged after some number of sweeps.

    Attributes:
        norm: `"linf"` or `"l2"`.
        eps: The ball's radius; 0 for clean images.
        gradient: The attacked view; `"clean"` for clean images.
        attack_sweeps: Length of the unroll; None where the gradient has no horizon.
        prediction_sweeps: Sweeps after which the answer is read; None for the settled one.
        wrong: (N,) bool: the answer is wrong, on the adversarial or on the clean image.
        scope: (N,) bool: the images of the sweep.
    """

    norm: str
    eps: float
    gradient: str
    attack_sweeps: int | None
    prediction_sweeps: int | None
    wrong: Tensor
    scope: Tensor


@dataclass(frozen=True, eq=False)
class PublishedOutcome:
    """One cell of the published protocol.

    Attributes:
        attack: `"pgd"`, `"square"`, `"autoattack"`, `"carlini-wagner"`, `"clean"`, or
            `"corruption"`.
        norm: `"linf"`, `"l2"`, or empty for clean and corrupted images.
        eps: The ball's radius; None where the attack has none.
        constant: Carlini and Wagner's c; None for the other attacks.
        wrong: (N,) bool: the published prediction errs after the attack.
        perturbation: (N,) float64, the adversarial image's distance in `norm`.
        adaptive: (N,) bool: the same cell under the adaptive attacks and under these images
            clipped to [0,1], judged by `predict`.
        scope: (N,) bool: the images of the cell.
        counted: Whether the published average is taken over this cell.
        condition: A corruption's name and severity, `"fog/3"`; empty for the others.
    """

    attack: str
    norm: str
    eps: float | None
    constant: float | None
    wrong: Tensor
    perturbation: Tensor
    adaptive: Tensor
    scope: Tensor
    counted: bool = True
    condition: str = ""


@dataclass(frozen=True, eq=False)
class SubjectOutcome:
    """Everything found out about one subject; `clean_wrong` is (N,) bool.

    `diagnosis` and `basins` are JSON-ready, None where they were not asked for or
    do not apply; `notes` say how a stochastic model or the published protocol was judged.
    """

    name: str
    kind: str
    clean_wrong: Tensor
    attacks: tuple[AttackOutcome, ...]
    corruptions: tuple[CorruptionOutcome, ...]
    temporal: tuple[TemporalOutcome, ...] = ()
    published: tuple[PublishedOutcome, ...] = ()
    diagnosis: Mapping[str, Any] | None = None
    basins: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def broken(self, norm: str, eps: float) -> Tensor:
        """The images that some attack breaks: the worst case, (N,) bool.

        An image broken at a smaller radius is broken at a larger one, since the
        smaller ball lies inside the larger. An image wrong when clean is broken. The images
        of the published protocol count too, as this subject answers them inside [0,1].
        """
        broken = self.clean_wrong | broken_by(self.attacks, norm, eps, len(self.clean_wrong))
        for cell in self.published:
            if cell.norm == norm and cell.eps is not None and cell.eps <= eps:
                broken = broken | cell.adaptive
        return broken

    def radii(self) -> tuple[tuple[str, float], ...]:
        """The (norm, eps) pairs at which at least one attack ran, in order."""
        seen = {(row.norm, row.eps) for row in self.attacks}
        return tuple(sorted(seen, key=lambda case: (NORMS.index(case[0]), case[1])))


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
        subset: `"first"` or `"random"`: how `limit` images were chosen.
        skipped: What the suite holds but was not run, with the reason.
        sources: Where what was not generated here came from (official arrays), with hashes.
        split: `"test"` or `"validation"`: which part of the data set the images are.
    """

    suite: QuickSuite
    seed: int
    batch_size: int
    limit: int | None
    examples: Tensor
    labels: Tensor
    subjects: tuple[SubjectOutcome, ...]
    subset: str = "random"
    skipped: tuple[Mapping[str, str], ...] = ()
    sources: Mapping[str, Any] = field(default_factory=dict)
    split: str = "test"


def broken_by(rows: Iterable[AttackOutcome], norm: str, eps: float, n: int) -> Tensor:
    """The images that one of `rows` breaks in `norm` within radius `eps`: (n,) bool."""
    broken = torch.zeros(n, dtype=torch.bool)
    for row in rows:
        if row.norm == norm and row.eps <= eps:
            broken = broken | row.success
    return broken
