"""How a student stands to its teacher: answers, states, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epdistill.data import Split, to_float
from epdistill.distributed import ALONE, Team
from epdistill.recipes.schema import StudentRecipe
from epdistill.students.model import Student
from epdistill.teachers.targets import Teacher
from epdistill.training import generator_of

BATCH = 256
BINS = 15
ATTACKED_IMAGES, ATTACK_STEPS = 200, 10
# A teacher may relax for longer than its student trained; so many bound a share to ±.022.
NOISY_IMAGES = 2000
# (images (N, C, H, W) in [0,1], labels (N,), number of the first one) -> images.
Change = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Fidelity:
    """How a student stands to its teacher on some images.

    Attributes:
        images: How many.
        accuracy: Share of images the student answers rightly.
        teacher_accuracy: Share of images the teacher answers rightly.
        agreement: Share of images on which student and teacher give the same label.
        ece: Expected calibration error of the student over 15 bins of confidence.
        settled: Share of images whose teacher had settled; the states of the others are
            left out of what follows.
        r2: Per layer, 1 - MSE / Var of the teacher's states; None for layers not matched.
        cosine: Per layer, mean over images of the cosine with the teacher's state.
    """

    images: int
    accuracy: float
    teacher_accuracy: float
    agreement: float
    ece: float
    settled: float
    r2: tuple[float | None, ...]
    cosine: tuple[float | None, ...]

    @property
    def mean_r2(self) -> float | None:
        """Over the matched layers; None where there are none."""
        known = [value for value in self.r2 if value is not None]
        return sum(known) / len(known) if known else None


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., ICML 2017): sum_b n_b / n |acc_b - conf_b|.

    Args:
        probabilities: (N, K).
        labels: (N,) int64.
        bins: Of equal width in (0, 1]; a confidence on a border belongs to the lower one.
    """
    confidence, answer = probabilities.double().max(1)
    return _calibration(confidence, answer == labels, bins)


def _calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """The same from confidences (N,) float64 and whether they were justified (N,) bool."""
    gap = right.double() - confidence
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, place, gap)
    return float(sums.abs().sum() / len(gap))


class _Layer:
    """Running sums of one layer."""

    def __init__(self) -> None:
        self.square = self.total = self.error = self.cosine = 0.0
        self.units = self.images = 0

    @staticmethod
    def sums(goal: Tensor, got: Tensor) -> tuple[float, float, float, float, int, int]:
        """Of one batch, what `add` takes."""
        goal, got = goal.flatten(1).double(), got.flatten(1).double()
        return (
            float(goal.square().sum()),
            float(goal.sum()),
            float((got - goal).square().sum()),
            float(torch.cosine_similarity(got, goal, dim=1).sum()),
            goal.numel(),
            len(goal),
        )

    def add(
        self, square: float, total: float, error: float, cosine: float, units: int, images: int
    ) -> None:
        self.square += square
        self.total += total
        self.error += error
        self.cosine += cosine
        self.units += units
        self.images += images

    def r2(self) -> float | None:
        if self.units == 0:
            return None
        variance = self.square - self.total * self.total / self.units
        return 1 - self.error / variance if variance > 0 else float(self.error == 0)

    def mean_cosine(self) -> float | None:
        return self.cosine / self.images if self.images else None


@torch.no_grad()
def measure(
    student: Student,
    teacher: Teacher,
    split: Split,
    *,
    change: Change | None = None,
    batch_size: int = BATCH,
    team: Team = ALONE,
) -> Fidelity:
    """A student beside its teacher on a split, every image once.

    Args:
        student: In any mode; measured in eval mode.
        teacher: Sees the same images.
        split: Images and labels.
        change: What becomes of the images first.
        batch_size: Images at a time.
        team: Processes that share out the batches; the sums are made in the batches' order,
            so the result is the same for every number of them.
    """
    training = student.training
    student.eval()
    depth, matched = len(teacher.shapes), student.spec.matched
    device = teacher.mean.device

    def look(start: int) -> tuple[list[int], list[Any], list[float], list[bool]]:
        images = to_float(split.images[start : start + batch_size].to(device))
        labels = split.labels[start : start + batch_size].to(device)
        if change is not None:
            images = change(images, labels, start)
        goal = teacher.targets(images)
        landed, logits = student.match(images)
        ours, theirs = logits.argmax(1), goal.logits.argmax(1)
        counts = [ours == labels, theirs == labels, ours == theirs, goal.settled]
        sums = [
            _Layer.sums(goal.states[n][goal.settled], got[goal.settled])
            for n, got in enumerate(student.states(landed), start=depth - matched)
        ]
        confidence, answer = logits.double().softmax(1).max(1)
        right = (answer == labels).tolist()
        return [int(flags.sum()) for flags in counts], sums, confidence.tolist(), right

    found = team.share_out(range(0, len(split), batch_size), look)
    student.train(training)
    right, theirs_right, same, settled = (sum(part[0][i] for part in found) for i in range(4))
    layers = [_Layer() for _ in range(depth)]
    for part in found:
        for n, sums in enumerate(part[1], start=depth - matched):
            layers[n].add(*sums)
    confidence = torch.tensor([one for part in found for one in part[2]], dtype=torch.float64)
    justified = torch.tensor([one for part in found for one in part[3]])
    count = len(split)
    return Fidelity(
        count,
        right / count,
        theirs_right / count,
        same / count,
        _calibration(confidence, justified),
        settled / count,
        tuple(layer.r2() for layer in layers),
        tuple(layer.mean_cosine() for layer in layers),
    )


def with_noise(std: float, seed: int) -> Change:
    """Gaussian noise of one standard deviation, clipped to [0,1]; images keep theirs per batch."""

    def change(images: Tensor, labels: Tensor, start: int) -> Tensor:
        noise = torch.randn(images.shape, generator=generator_of(seed, 2, start))
        return (images + std * noise.to(images)).clamp(0, 1)

    return change


def with_attack(student: Student, eps: float, seed: int, norm: str = "linf") -> Change:
    """PGD-10 on the student's cross-entropy in the `linf` or `l2` ball."""
    from epdistill.robustness.attacks import PGDSettings, pgd_l2, pgd_linf

    attack = pgd_l2 if norm == "l2" else pgd_linf

    def change(images: Tensor, labels: Tensor, start: int) -> Tensor:
        index = torch.arange(start, start + len(images))
        settings = PGDSettings(steps=ATTACK_STEPS)
        return attack(student, images, labels, eps, seed=seed, settings=settings, index=index)

    return change


def fidelities(
    student: Student,
    teacher: Teacher,
    test: Split,
    recipe: StudentRecipe,
    seed: int,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Fidelity on clean images, on the first 2,000 with noise, on the first 200 under attack.

    Args:
        student: The finished student.
        teacher: Its teacher.
        test: The test split.
        recipe: Says how much noise, and the attack's radius.
        seed: Of the noise and the attack.
        team: Processes that share the work.

    Returns:
        By `clean`, `noise` and `adversarial`: the fields of `Fidelity`, and `std` or `eps`. And
        by `l2` a list of the same at the published radii: what is lost where matching ends, and
        what the teacher itself loses on its student's adversarial images.
        The attack is one of ten steps: its accuracy is no robust accuracy.
    """
    from epdistill.robustness.paper import TABLE_L2

    some, few = (
        Split(test.images[:count], test.labels[:count]) for count in (NOISY_IMAGES, ATTACKED_IMAGES)
    )
    noise = with_noise(recipe.fidelity_noise, seed)
    attack = with_attack(student, recipe.fidelity_eps, seed)
    radii = [
        {
            "eps": eps,
            **vars(
                measure(
                    student, teacher, few, change=with_attack(student, eps, seed, "l2"), team=team
                )
            ),
        }
        for eps in TABLE_L2
    ]
    return {
        "clean": vars(measure(student, teacher, test, team=team)),
        "noise": {
            "std": recipe.fidelity_noise,
            **vars(measure(student, teacher, some, change=noise, team=team)),
        },
        "adversarial": {
            "eps": recipe.fidelity_eps,
            **vars(measure(student, teacher, few, change=attack, team=team)),
        },
        "l2": radii,
    }
