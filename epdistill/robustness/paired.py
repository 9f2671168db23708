"""Several models on the same images: means over seeds, and differences image by image."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from epdistill.errors import EvaluationError
from epdistill.robustness.intervals import Z95
from epdistill.robustness.results import checked_csv
from epdistill.robustness.shares import accuracy, over

# A norm and a radius; clean images are ("clean", 0).
Case = tuple[str, float]
# By image: whether the model still answers rightly in the worst case.
Answers = Mapping[Hashable, bool]
CLEAN = "clean"
_APART = ("corruption", "published-", "adaptive-")


def worst_cases(folder: Path, model: str) -> dict[Case, dict[int, bool]]:
    """What `results.csv` of an evaluation says of a model, image by image.

    An image counts at a radius if the model answers it rightly clean and no attack breaks
    it at this radius or a smaller one, as in `worst_case` of results.json.

    Returns:
        Clean images first, then every norm and radius that was attacked, increasing; for
        each whether an image of that number is still answered rightly.

    Raises:
        EvaluationError: The file is missing or damaged, or says nothing of the model.
    """
    path = checked_csv(folder)
    right: dict[int, bool] = {}
    broken: dict[Case, set[int]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["model"] != model or row["attack"].startswith(_APART):
                    continue
                number, success = int(row["example"]), row["success"] == "1"
                if row["attack"] == CLEAN:
                    right[number] = not success
                else:
                    hit = broken.setdefault((row["norm"], float(row["eps"])), set())
                    if success:
                        hit.add(number)
    except (OSError, KeyError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}); expected the images of an evaluation: evaluate again"
        ) from error
    if not right:
        raise EvaluationError(f"{path} says nothing of {model}; expected it among the models")
    cases = {(CLEAN, 0.0): right}
    for norm in dict.fromkeys(norm for norm, _ in broken):
        left = right
        for eps in sorted(eps for other, eps in broken if other == norm):
            hit = broken[norm, eps]
            left = {number: good and number not in hit for number, good in left.items()}
            cases[norm, eps] = left
    return cases


def share_of(answers: Answers) -> dict[str, Any]:
    """Accuracy of one model, Wilson's 95 % interval, and n."""
    return accuracy(sum(answers.values()), len(answers))


def over_seeds(seeds: Sequence[Answers]) -> dict[str, Any]:
    """Mean accuracy over seeds, and how far they lie apart.

    Args:
        seeds: One each; images of one name are the same image.

    Returns:
        `accuracy`, the mean; `ci95`, Wilson's interval of that share on the `n` different
        images (an image that several seeds were shown is no more images); `low`, `high` and
        `std`, the spread over `seeds` (`std` is null for a single one).
    """
    found = [sum(answers.values()) / len(answers) for answers in seeds]
    return {
        **over(found, len(set().union(*seeds))),
        "seeds": len(found),
        "low": min(found),
        "high": max(found),
    }


@dataclass(frozen=True)
class Difference:
    """How much more often one model is right than another on the same images.

    Attributes:
        difference: Of the accuracies, the mean over images of the mean over seeds.
        ci95: 95 % interval of it, over images.
        n: Different images.
        wins: Images times seeds that the first alone answers rightly.
        losses: Images times seeds that the second alone answers rightly.
        by_seed: The difference on each seed.
    """

    difference: float
    ci95: tuple[float, float]
    n: int
    wins: int
    losses: int
    by_seed: tuple[float, ...]


def paired_difference(first: Sequence[Answers], second: Sequence[Answers]) -> Difference:
    """Compare two models image by image, seed by seed.

    The interval is that of Agresti and Min (Statistics in Medicine 24, 2005) for
    matched pairs: Wald's after adding 1/2 to each of the four counts of McNemar's table,
    which does not shrink to a point where no image tells the two apart. With several
    seeds an image enters with the mean of its differences, since they hang together.

    Args:
        first: Per seed, image by image.
        second: The same of the other, on the same seeds and images.

    Raises:
        EvaluationError: They are not about the same seeds and images.
    """
    if len(first) != len(second) or any(
        one.keys() != other.keys() for one, other in zip(first, second, strict=True)
    ):
        raise EvaluationError(
            "received answers to different images; expected the same seeds and images of both "
            "models: evaluate them alike"
        )
    gaps: dict[Hashable, list[int]] = {}
    by_seed = []
    for one, other in zip(first, second, strict=True):
        found = {image: int(one[image]) - int(other[image]) for image in one}
        by_seed.append(sum(found.values()) / len(found))
        for image, gap in found.items():
            gaps.setdefault(image, []).append(gap)
    means = [sum(gap) / len(gap) for gap in gaps.values()]
    every = [value for gap in gaps.values() for value in gap]
    n, total = len(means), sum(means)
    wide = n + 2
    half = Z95 * sqrt(sum(m * m for m in means) + 1 - total * total / wide) / wide
    centre = total / wide
    interval = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(total / n, interval, n, every.count(1), every.count(-1), tuple(by_seed))
