"""Several ablations of one recipe and split as one: the same students on further seeds.

Rows are brought together by what they are (`models.title_of`), not by their names: a recipe's
`distilled` may have become another student meanwhile. A seed that two ablations have counts
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any, NamedTuple

from epdistill.recipes.ablation import only_teacher
from epdistill.recipes.loading import with_keys
from epdistill.recorded.models import title_of
from epdistill.recorded.store import Record
from epdistill.robustness.intervals import Z95
from epdistill.robustness.shares import over

# A norm and a radius.
Ball = tuple[str, float]


def row_title(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What an ablation's row is.

    Args:
        content: Of the ablation.
        row: One of its `rows`.
    """
    recipe = with_keys(content["recipe"], row["keys"])
    return title_of({"kind": row["kind"], "recipe": recipe})


def pooled_rows(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """By what a row is: per norm and radius the mean over all seeds, as `paired.over_seeds` has it.

    Args:
        records: Ablations of one recipe and split.

    Returns:
        `norm`, `eps`, `accuracy`, `ci95` (Wilson's, of that share on the `n` images of all
        ablations, which are drawn apart), `n`, `seeds` (their numbers) and `std` (null for one).
    """
    found: dict[str, dict[Ball, dict[tuple[int, int | None], _Shown]]] = {}
    for number, record in enumerate(records):
        for row in record.content["rows"]:
            cases = found.setdefault(row_title(record.content, row), {})
            one = only_teacher(record.content["recipe"]) if row["kind"] == "teacher" else None
            for seed in row["seeds"]:
                # One teacher on the images of several ablations is one seed on more images.
                key = (seed["seed"], None) if one is None else (one, number)
                for case in seed["worst_case"]:
                    seeds = cases.setdefault((case["norm"], case["eps"]), {})
                    seeds.setdefault(key, _Shown(case["accuracy"], number, case["n"]))
    return {
        title: [_mean(norm, eps, seeds) for (norm, eps), seeds in cases.items()]
        for title, cases in found.items()
    }


class _Shown(NamedTuple):
    """Accuracy of one seed on the n images of an ablation, the `number`th."""

    accuracy: float
    number: int
    n: int


def _mean(norm: str, eps: float, found: Mapping[tuple[int, int | None], _Shown]) -> dict[str, Any]:
    by_seed: dict[int, list[float]] = {}
    for (seed, _), shown in found.items():
        by_seed.setdefault(seed, []).append(shown.accuracy)
    shares = [fmean(some) for some in by_seed.values()]
    # Seeds of one ablation are shown the same images.
    n = sum({shown.number: shown.n for shown in found.values()}.values())
    return {"norm": norm, "eps": eps, **over(shares, n), "seeds": sorted(by_seed)}


def pooled_gaps(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Differences between rows, over the seeds of all ablations that have both.

    The mean over seeds; its interval takes the ablations' images as independent.

    Args:
        records: Ablations of one recipe and split.

    Yields:
        `row`, `reference` (what they are), `norm`, `eps`, `difference`, `ci95`, `seeds`.
    """
    found: dict[tuple[str, str, str, float], list[Mapping[str, Any]]] = {}
    for record in records:
        titles = {row["row"]: row_title(record.content, row) for row in record.content["rows"]}
        for gap in record.content["differences"]:
            key = (titles[gap["row"]], titles[gap["reference"]], gap["norm"], gap["eps"])
            done = {seed for other in found.get(key, []) for seed in other["seeds"]}
            if not done & set(gap["seeds"]):
                found.setdefault(key, []).append(gap)
    for (row, reference, norm, eps), gaps in found.items():
        count = sum(len(gap["seeds"]) for gap in gaps)
        mean = sum(sum(gap["by_seed"]) for gap in gaps) / count
        errors = [len(gap["seeds"]) * (gap["ci95"][1] - gap["ci95"][0]) / (2 * Z95) for gap in gaps]
        half = Z95 * sqrt(sum(error**2 for error in errors)) / count
        yield {
            "row": row,
            "reference": reference,
            "norm": norm,
            "eps": eps,
            "difference": mean,
            "ci95": [mean - half, mean + half],
            "seeds": sorted(seed for gap in gaps for seed in gap["seeds"]),
        }
