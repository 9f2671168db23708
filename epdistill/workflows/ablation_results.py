"""What an ablation found, put together from the evaluations that are there (docs/ablation.md)."""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from epdistill.robustness.guards import NORMS
from epdistill.robustness.paired import (
    CLEAN,
    Case,
    over_seeds,
    paired_difference,
    share_of,
    worst_cases,
)
from epdistill.robustness.pictures import accuracy_curves, save
from epdistill.robustness.results import read_results
from epdistill.runs import atomic_write, open_run, read_json, write_json
from epdistill.workflows.ablation_plan import Entry, references_among
from epdistill.workflows.ablation_work import FIDELITY, Workplace
from epdistill.workflows.evaluation import TEST

SCHEMA_VERSION = 1
JSON_NAME, CSV_NAME = "ablation.json", "ablation.csv"
_INPUTS = ("clean", "noise", "adversarial")
_COLUMNS = ("row", "seed", "norm", "eps", "accuracy", "low", "high", "n")


@dataclass(frozen=True)
class Found:
    """A row on one seed, judged.

    Attributes:
        entry: Which.
        cases: By norm and radius, image by image, whether it is still answered rightly.
        facts: JSON-ready: everything else.
    """

    entry: Entry
    cases: dict[Case, dict[Hashable, bool]]
    facts: dict[str, Any]


def found_so_far(place: Workplace) -> list[Found]:
    """The rows and seeds whose evaluations are finished, in the order of the table."""
    entries = [entry for entry in place.plan.entries() if place.judged(entry.cell)]
    order = list(place.plan.seeds)
    entries.sort(key=lambda entry: (order.index(entry.row.name), entry.seed))
    return [_found(place, entry) for entry in entries]


def _found(place: Workplace, entry: Entry) -> Found:
    path, folder = place.path(entry.cell), place.evaluation(entry.cell)
    config = open_run(path).config
    (model,) = (m for m in read_results(folder)["models"] if m["name"] == path.name)
    # A teacher's seed draws its validation images; test images are the same for all.
    taught = (entry.cell.teacher or entry.cell).recipe.seed
    mark = None if place.split == TEST else taught
    cases: dict[Case, dict[Hashable, bool]] = {
        case: {(mark, number): right for number, right in answers.items()}
        for case, answers in worst_cases(folder, path.name).items()
    }
    fidelity = None
    if entry.cell.teacher is not None:
        fidelity = read_json(folder / FIDELITY, "delete it, and go on with --resume")
    mean = model["corruption_mean"]
    facts = {
        "seed": entry.seed,
        "run": str(path.relative_to(place.folder) if path.is_relative_to(place.folder) else path),
        "evaluation": str(folder.relative_to(place.folder)),
        "worst_case": [_case(case, share_of(answers)) for case, answers in cases.items()],
        "corrupted": None if mean is None else mean["accuracy"],
        "fidelity": fidelity,
        # A teacher from elsewhere may be older than these.
        "parameters": config["results"].get("parameters"),
        "flops": config["results"].get("flops"),
        "seconds": config["results"]["seconds"],
    }
    return Found(entry, cases, facts)


def _case(case: Case, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"norm": case[0], "eps": case[1], **figures}


def content_of(place: Workplace, found: list[Found], failed: Mapping[str, str]) -> dict[str, Any]:
    """The content of ablation.json.

    Args:
        place: The ablation.
        found: What is finished.
        failed: Parts of the work that could not be done, and why.
    """
    rows = []
    by_row: dict[str, list[Found]] = {}
    for one in found:
        by_row.setdefault(one.entry.row.name, []).append(one)
    for name, some in by_row.items():
        row = some[0].entry.row
        corrupted = [one.facts["corrupted"] for one in some if one.facts["corrupted"] is not None]
        rows.append(
            {
                "row": name,
                "title": row.title,
                "kind": row.kind,
                "keys": dict(some[0].entry.cell.keys),
                "mean": [
                    _case(case, over_seeds([one.cases[case] for one in some]))
                    for case in some[0].cases
                ],
                "corrupted": fmean(corrupted) if corrupted else None,
                "fidelity": _fidelity([one.facts["fidelity"] for one in some]),
                "seeds": [one.facts for one in some],
            }
        )
    total = len(place.plan.entries())
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": place.plan.recipe.model_dump(mode="json"),
        "split": place.split,
        "suite": place.plan.recipe.ablate.suite,
        "sender": place.plan.entries()[0].sender.label,
        "complete": len(found) == total,
        "planned": dict(place.plan.seeds),
        "failed": dict(failed),
        "rows": rows,
        "differences": _differences(by_row),
    }


def _fidelity(seeds: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Means over seeds, and of R² and cosine over layers too."""
    some = [one for one in seeds if one is not None]
    if not some:
        return None

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    def means(found: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **{key: fmean(one[key] for one in found)
               for key in ("accuracy", "teacher_accuracy", "agreement", "ece")},
            **{key: mean([value for one in found for value in one[key]])
               for key in ("r2", "cosine")},
        }  # fmt: skip

    # Students that were trained before it was measured have none.
    radii = [one.get("l2", []) for one in some]
    return {
        **{inputs: means([one[inputs] for one in some]) for inputs in _INPUTS},
        "l2": [
            {"eps": found[0]["eps"], **means(list(found))} for found in zip(*radii, strict=False)
        ],
    }


def _differences(by_row: Mapping[str, list[Found]]) -> list[dict[str, Any]]:
    """Every row against every reference, on the seeds that both have."""
    rows = []
    for reference in references_among(by_row):
        theirs = {one.entry.seed: one.cases for one in by_row[reference]}
        for name, some in by_row.items():
            mine = {one.entry.seed: one.cases for one in some if one.entry.seed in theirs}
            if name == reference or not mine:
                continue
            first = next(iter(mine))
            for case in [case for case in mine[first] if case in theirs[first]]:
                seeds = [(mine[seed][case], theirs[seed][case]) for seed in mine]
                gap = paired_difference(*zip(*seeds, strict=True))
                rows.append(
                    {
                        "row": name,
                        "reference": reference,
                        **_case(case, {}),
                        "difference": gap.difference,
                        "ci95": list(gap.ci95),
                        "n": gap.n,
                        "seeds": list(mine),
                        "by_seed": list(gap.by_seed),
                        "wins": gap.wins,
                        "losses": gap.losses,
                    }
                )
    return rows


def csv_text(content: Mapping[str, Any]) -> str:
    """ablation.csv: one line per row, seed, norm and radius; the mean over seeds as seed `mean`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in content["rows"]:
        tables = [(seed["seed"], seed["worst_case"]) for seed in row["seeds"]]
        for seed, cases in [*tables, ("mean", row["mean"])]:
            for case in cases:
                figures = (case["accuracy"], *case["ci95"], case["n"])
                writer.writerow((row["row"], seed, case["norm"], case["eps"], *figures))
    return text.getvalue()


def write(place: Workplace, content: Mapping[str, Any], *, pictures: bool) -> None:
    """Write ablation.csv, the pictures if asked for, and ablation.json as the last."""
    place.output.mkdir(parents=True, exist_ok=True)
    atomic_write(place.output / CSV_NAME, csv_text(content))
    if pictures and content["rows"]:
        _draw(place, content)
    write_json(place.output / JSON_NAME, content)


def _draw(place: Workplace, content: Mapping[str, Any]) -> None:
    """accuracy-NORM: worst-case accuracy over the radius, one curve per row."""
    for norm in NORMS:
        curves = {
            row["title"]: [case for case in row["mean"] if case["norm"] in (CLEAN, norm)]
            for row in content["rows"]
        }
        counts = sorted({case["n"] for rows in curves.values() for case in rows})
        n = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        title = f"Accuracy under the worst attack, {place.split} images, n = {n}"
        save(accuracy_curves(curves, norm, title=title), place.output / f"accuracy-{norm}")
