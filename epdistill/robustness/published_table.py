"""The published protocol as it stands in results.json: its cells, and their average."""

from __future__ import annotations

from typing import Any

from epdistill.robustness.outcomes import PublishedOutcome, SubjectOutcome
from epdistill.robustness.shares import share

# What the published average is taken over, see `average_robust_accuracy`.
FAMILIES = 6


def published_table(subject: SubjectOutcome) -> dict[str, Any] | None:
    """The published protocol's cells with the adaptive one beside each."""
    if not subject.published:
        return None
    cells = [
        {
            "attack": cell.attack,
            "norm": cell.norm or None,
            "eps": cell.eps,
            "constant": cell.constant,
            "condition": cell.condition or None,
            **share(cell.wrong, cell.scope),
            "adaptive": share(cell.adaptive, cell.scope),
        }
        for cell in subject.published
    ]
    return {"cells": cells, "average_robust_accuracy": average_robust_accuracy(subject)}


def average_robust_accuracy(subject: SubjectOutcome) -> dict[str, Any]:
    """The published Table 1's summary: the mean over families of the mean over their cells.

    The families are clean images, PGD in L2, AutoAttack, Square, Carlini and Wagner, and
    corruptions, at the radii of the tables. The paper does not define its average; this
    one gives its CIFAR-10 rows with known corruptions within .015 (EP-CNN .58, Adv .5 .60,
    Adv 1 .61). Families that were not measured are missing from `families`, and then the
    mean is not comparable.
    """
    by_family: dict[str, list[PublishedOutcome]] = {}
    for cell in subject.published:
        if cell.counted:
            name = f"{cell.attack} {cell.norm}".strip()
            by_family.setdefault(name, []).append(cell)
    families = {}
    for name, cells in by_family.items():
        published = [share(cell.wrong, cell.scope)["accuracy"] for cell in cells]
        worst = [share(cell.adaptive, cell.scope)["accuracy"] for cell in cells]
        families[name] = {
            "published": sum(published) / len(published),
            "adaptive": sum(worst) / len(worst),
        }
    return {
        "published": sum(found["published"] for found in families.values()) / len(families),
        "adaptive": sum(found["adaptive"] for found in families.values()) / len(families),
        "families": families,
        "complete": len(families) == FAMILIES,
    }
