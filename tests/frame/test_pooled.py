"""Several ablations of one recipe, brought together in the results."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from epdistill.recorded.pooled import pooled_gaps, pooled_rows, row_title
from epdistill.recorded.store import ABLATION, RUN, Record, write_record
from epdistill.robustness.intervals import Z95, wilson
from epdistill.workflows.keeping import keep

LABELS, TAUGHT = "cnn, labels, noise 0.1", "cnn, distilled with labels, half with noise 0.1"
BALLS = (("clean", 0.0), ("linf", 0.1), ("l2", 0.3))


def case(accuracy: float, ball: tuple[str, float], n: int) -> dict[str, Any]:
    return {"norm": ball[0], "eps": ball[1], "accuracy": accuracy, "ci95": [0.1, 0.9], "n": n}


def gap(row: str, by_seed: dict[int, float], half: float) -> list[dict[str, Any]]:
    mean = fmean(by_seed.values())
    return [
        {
            "row": row, "reference": "noise", "norm": norm, "eps": eps, "difference": mean,
            "ci95": [mean - half, mean + half], "seeds": list(by_seed),
            "by_seed": list(by_seed.values()),
        }
        for norm, eps in BALLS
    ]  # fmt: skip


def ablation(
    seed: int, taught: str, rows: dict[str, dict[int, float]], n: int, half: float, weight: float
) -> Record:
    """An ablation whose student with labels is called `taught`."""
    recipe = {
        "name": "cifar10-small",
        "seed": seed,
        "data": {"name": "cifar10"},
        "teacher": {"rule": "ep"},
        "evaluate": {"steps": 20, "queries": 200},
        "ablate": {"vary": "student", "teacher_seed": 0},
        "student": {
            "name": "cnn", "inputs": "mix", "noise_std": 0.1, "loss": "distill",
            "label_weight": weight,
        },
    }  # fmt: skip
    keys: dict[str, dict[str, Any]] = {
        "noise": {"student.loss": "ce", "student.inputs": "noise", "student.label_weight": 0.0},
        taught: {} if weight else {"student.label_weight": 1.0},
    }
    content = {
        "recipe": recipe,
        "split": "validation",
        "suite": "quick",
        "sender": "distilled",
        "rows": [
            {
                "row": name,
                "title": name,
                "kind": "student",
                "keys": keys[name],
                "mean": [case(fmean(seeds.values()), ball, n) for ball in BALLS],
                "corrupted": None,
                "fidelity": None,
                "seeds": [
                    {"seed": one, "run": "cells/x", "worst_case": [case(a, b, n) for b in BALLS]}
                    for one, a in seeds.items()
                ],
            }
            for name, seeds in rows.items()
        ],
        "differences": gap(
            taught, {one: rows[taught][one] - rows["noise"][one] for one in rows[taught]}, half
        ),
    }
    return Record(ABLATION, f"one-from-seed-{seed}", "epdistill ablate", None, content)


@pytest.fixture
def two() -> list[Record]:
    """One seed on 100 images, two on 200 others; the recipe took the labels in meanwhile."""
    first = {"noise": {0: 0.3}, "distilled-labels": {0: 0.4}}
    then = {"noise": {1: 0.2, 2: 0.4}, "distilled": {1: 0.5, 2: 0.6}}
    return [
        ablation(0, "distilled-labels", first, 100, 0.06, 0.0),
        ablation(1, "distilled", then, 200, 0.04, 1.0),
    ]


def test_rows_are_known_by_what_they_are(two: list[Record]) -> None:
    for record in two:
        titles = [row_title(record.content, row) for row in record.content["rows"]]
        assert titles == [LABELS, TAUGHT]
        # The base is left as it was.
        assert record.content["recipe"]["student"]["loss"] == "distill"


def test_another_student_has_not_the_width_of_the_base(two: list[Record]) -> None:
    (row, *_), content = two[0].content["rows"], two[0].content
    content["recipe"]["student"]["width"] = 16
    assert row_title(content, row) == "cnn x16, labels, noise 0.1"
    row["keys"]["student.name"] = "vit_tiny"
    assert row_title(content, row) == "vit_tiny, labels, noise 0.1"
    assert content["recipe"]["student"]["width"] == 16


def test_a_row_is_the_mean_over_all_its_seeds(two: list[Record]) -> None:
    rows = pooled_rows(two)
    assert list(rows) == [LABELS, TAUGHT]
    assert [(one["norm"], one["eps"]) for one in rows[TAUGHT]] == list(BALLS)
    for one in rows[TAUGHT]:
        assert one["accuracy"] == pytest.approx(0.5)
        assert one["std"] == pytest.approx(stdev([0.4, 0.5, 0.6]))
        # An image that two seeds were shown is one image.
        assert (one["n"], one["seeds"]) == (300, [0, 1, 2])
        assert one["ci95"] == list(wilson(150, 300))
    assert pooled_rows(two[:1])[LABELS][0]["std"] is None
    # A seed counts once, with the ablation that is named first.
    assert pooled_rows([two[0], two[0]]) == pooled_rows(two[:1])


def test_one_teacher_is_one_seed_on_more_images(two: list[Record]) -> None:
    for record, share in zip(two, (0.2, 0.4), strict=True):
        (row, *_) = record.content["rows"]
        row.update(kind="teacher", keys={})
        for seed in row["seeds"]:
            seed["worst_case"] = [{**one, "accuracy": share} for one in seed["worst_case"]]
    (clean, *_) = pooled_rows(two)["EP-CNN"]
    assert (clean["seeds"], clean["n"], clean["std"]) == ([0], 300, None)
    assert clean["accuracy"] == pytest.approx(0.3)
    # Where every seed has a teacher of its own, they are several.
    for record in two:
        record.content["recipe"]["ablate"] = {"vary": "all"}
    assert pooled_rows(two)["EP-CNN"][0]["seeds"] == [0, 1, 2]


def test_differences_weigh_every_seed_alike(two: list[Record]) -> None:
    gaps = list(pooled_gaps(two))
    assert [(one["norm"], one["eps"]) for one in gaps] == list(BALLS)
    for one in gaps:
        assert (one["row"], one["reference"], one["seeds"]) == (TAUGHT, LABELS, [0, 1, 2])
        assert one["difference"] == pytest.approx((0.1 + 0.3 + 0.2) / 3)
        # Standard errors of independent images: a third of one, two thirds of the other.
        errors = (0.06 / Z95 / 3, 2 * 0.04 / Z95 / 3)
        half = Z95 * sqrt(sum(error**2 for error in errors))
        low, high = one["ci95"]
        assert (high - low) / 2 == pytest.approx(half)
        assert (high + low) / 2 == pytest.approx(one["difference"])
    assert list(pooled_gaps([two[1], two[1]])) == list(pooled_gaps(two[1:]))


def test_one_ablation_has_no_table_of_all(two: list[Record], tmp_path: Path) -> None:
    records, page = tmp_path / "records", tmp_path / "RESULTS.md"
    recipe = two[1].content["recipe"]
    run = {
        "kind": "student",
        "recipe": {**recipe, "teacher": {"channels": [4], "rule": "ep"}},
        "data": {
            "name": "cifar10", "train_images": 9, "validation_images": 9, "test_images": 9
        },
        "results": {"accuracy": 0.5, "test_images": 9, "seconds": 60.0},
        "files": [],
    }  # fmt: skip
    write_record(Record(RUN, "x", "epdistill distill", None, run), records, "0" * 64)
    write_record(two[0], records, "0" * 64)
    keep([], records, page)
    assert "All ablations together" not in page.read_text()
    write_record(two[1], records, "0" * 64)
    keep([], records, page)
    text = page.read_text()
    assert text.count("### All ablations together, validation images") == 1
    assert f"| {TAUGHT} | 0, 1, 2 | 300 | 50.0 ±10.0 (44-56) |" in text
    assert f"| {TAUGHT} - {LABELS} | 0, 1, 2 | +20.0 (+17 to +23) |" in text
