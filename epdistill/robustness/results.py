"""Writing an evaluation down: results.json and results.csv (docs/results-schema.md)."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from epdistill import __version__
from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions import FAMILY
from epdistill.robustness.intervals import wilson
from epdistill.robustness.outcomes import (
    CorruptionOutcome,
    Evaluation,
    SubjectOutcome,
    TemporalOutcome,
)
from epdistill.robustness.published_table import published_table
from epdistill.robustness.rows import csv_text
from epdistill.robustness.shares import share
from epdistill.robustness.temporal import CLEAN, adaptive
from epdistill.robustness.transfer import transfer_matrix
from epdistill.runs import FILES, atomic_write, digest_of, digests_of, write_json
from epdistill.sealed import read_sealed

SCHEMA_VERSION = 2
JSON_NAME = "results.json"
CSV_NAME = "results.csv"


def write_results(evaluation: Evaluation, folder: Path, *beside: str) -> tuple[Path, Path]:
    """Write `results.csv` and then `results.json` into a folder, each atomically.

    Args:
        evaluation: What `evaluate` returned.
        folder: Made if missing.
        beside: Names of further files in there whose digests results.json holds.

    Returns:
        The paths of the JSON and the CSV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / CSV_NAME, csv_text(evaluation))
    content = {**summary(evaluation), FILES: digests_of(folder, CSV_NAME, *beside)}
    write_json(folder / JSON_NAME, content)
    return folder / JSON_NAME, folder / CSV_NAME


def read_results(folder: Path) -> dict[str, Any]:
    """The content of a folder's `results.json`.

    Raises:
        EvaluationError: It is missing, damaged, or of another schema.
    """
    path = folder / JSON_NAME
    try:
        content = read_sealed(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"{path} cannot be read ({reason}); expected the results of a finished evaluation: "
            "type `epdistill evaluate`"
        ) from error
    found = content.get("schema_version")
    if found != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has schema version {found}; expected {SCHEMA_VERSION}: evaluate again"
        )
    return content


def checked_csv(folder: Path) -> Path:
    """As `checked`, of `results.csv`."""
    return checked(folder, CSV_NAME)


def checked(folder: Path, name: str) -> Path:
    """The path of a file in an evaluation's folder, if it is the one `results.json` tells of.

    Raises:
        EvaluationError: It is another one, or damaged.
    """
    path = folder / name
    if path.is_file() and (folder / JSON_NAME).is_file():
        told = read_results(folder).get(FILES, {}).get(name)
        if told is not None and digest_of(path) != told:
            raise EvaluationError(
                f"{path} is damaged or was edited (its SHA-256 is not that in {JSON_NAME}); "
                "expected it as it was written: restore it, or evaluate again"
            )
    return path


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The content of `results.json`: accuracies in 0..1 with Wilson's 95 % intervals.

    A model has a `worst_case` row only for a norm and radius at which something
    attacked it, and the row names what did: a model that nothing attacked is not
    robust. `corruption_mean` averages over types and severities, extras apart; `error`
    is the mean corruption error, unnormalised; `gap` is the loss from clean accuracy.
    `verdict` is null where masked gradients were not looked for.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": settings_of(evaluation),
        "versions": versions(),
        "n": len(evaluation.examples),
        "skipped": [dict(skip) for skip in evaluation.skipped],
        "sources": dict(evaluation.sources),
        "models": [_model(subject) for subject in evaluation.subjects],
        "transfer": transfer_matrix(evaluation),
    }


def settings_of(evaluation: Evaluation) -> dict[str, Any]:
    """Every hyperparameter, JSON-ready."""
    suite = evaluation.suite
    temporal = suite.temporal()
    return {
        **{key: value for key, value in asdict(suite).items() if key != "horizons"},
        "attacks": [attack.describe() for attack in suite.attacks()],
        "published": [attack.describe() for attack in suite.published()],
        "temporal": None if temporal is None else asdict(temporal),
        "corruption_family": FAMILY,
        "seed": evaluation.seed,
        "batch_size": evaluation.batch_size,
        "limit": evaluation.limit,
        "subset": evaluation.subset,
        "split": evaluation.split,
    }


def threats(model: dict[str, Any]) -> list[dict[str, Any]]:
    """One model of results.json in brief: clean, every radius' worst case, corruptions.

    Returns:
        Rows of `threat` (`"clean"`, `"linf"`, `"l2"`, `"corruptions"`), `eps` (null where
        there is none), `accuracy`, `ci95`, `n`.
    """

    def row(threat: str, eps: float | None, found: dict[str, Any]) -> dict[str, Any]:
        kept = {key: found[key] for key in ("accuracy", "ci95", "n")}
        return {"threat": threat, "eps": eps, **kept}

    rows = [row("clean", None, model["clean"])]
    rows += [row(found["norm"], found["eps"], found) for found in model["worst_case"]]
    rows += [
        row("corruptions" if mean["family"] == FAMILY else mean["family"], None, mean)
        for mean in model["corruption_means"]
        if not mean["extra"]
    ]
    return rows


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "epdistill": __version__,
    }
    for package in ("torchattacks", "numpy", "scipy", "pillow", "onnxruntime"):
        found[package] = metadata.version(package)
    with suppress(metadata.PackageNotFoundError):
        found["pyautoattack"] = metadata.version("pyautoattack")
    return found


def _model(subject: SubjectOutcome) -> dict[str, Any]:
    clean = share(subject.clean_wrong)
    means = _corruption_means(subject.corruptions, clean)
    plain = [mean for mean in means if mean["family"] == FAMILY and not mean["extra"]]
    return {
        "name": subject.name,
        "kind": subject.kind,
        "notes": list(subject.notes),
        "clean": clean,
        "attacks": [
            {
                "attack": row.attack,
                "view": row.view,
                "norm": row.norm,
                "eps": row.eps,
                **share(row.success, row.scope),
                "attacked": int(row.attacked.sum()),
                "queries": float(row.queries[row.attacked].mean()) if row.attacked.any() else 0.0,
            }
            for row in subject.attacks
        ],
        "worst_case": [
            {
                "norm": norm,
                "eps": eps,
                **share(subject.broken(norm, eps)),
                "attacks": _attacks_at(subject, norm, eps),
            }
            for norm, eps in subject.radii()
        ],
        "corruptions": [
            {
                "family": row.family,
                "corruption": row.corruption,
                "severity": row.severity,
                "extra": row.extra,
                **share(row.wrong),
            }
            for row in subject.corruptions
        ],
        "corruption_mean": plain[0] if plain else None,
        "corruption_means": means,
        "temporal": _temporal(subject),
        "published": published_table(subject),
        "diagnosis": None if subject.diagnosis is None else dict(subject.diagnosis),
        "verdict": None if subject.diagnosis is None else subject.diagnosis["verdict"],
        "basins": None if subject.basins is None else dict(subject.basins),
    }


def _corruption_means(
    rows: Sequence[CorruptionOutcome], clean: dict[str, Any]
) -> list[dict[str, Any]]:
    """One mean per family, and one for its extras.

    The interval is Wilson's on the mean's share of the n images: the conditions are seen
    on the same images, so they are not counted as n images more each.
    """
    means = []
    for family, extra in dict.fromkeys((row.family, row.extra) for row in rows):
        same = [row for row in rows if (row.family, row.extra) == (family, extra)]
        found = [share(row.wrong) for row in same]
        accuracy = sum(cell["accuracy"] for cell in found) / len(found)
        n = found[0]["n"]
        means.append(
            {
                "family": family,
                "extra": extra,
                "accuracy": accuracy,
                "ci95": list(wilson(round(accuracy * n), n)),
                "n": n,
                "error": 1 - accuracy,
                "gap": clean["accuracy"] - accuracy,
                "conditions": len(found),
            }
        )
    return means


def _temporal(subject: SubjectOutcome) -> dict[str, Any] | None:
    """The sweep: the headline, the worst case over gradients, and the cells.

    The headline is per radius the worst case over the sweep and all other attacks, when
    settled. `worst` is that over the sweep alone, for each prediction horizon.
    """
    if not subject.temporal:
        return None
    n, scope = len(subject.clean_wrong), subject.temporal[0].scope
    attacked = [row for row in subject.temporal if row.gradient != CLEAN]
    headline, worst = [], []
    for norm, eps in dict.fromkeys((row.norm, row.eps) for row in attacked):
        swept = adaptive(attacked, norm, eps, None, n) | subject.broken(norm, eps)
        headline.append({"norm": norm, "eps": eps, **share(swept, scope)})
        for sweeps in dict.fromkeys(row.prediction_sweeps for row in attacked):
            broken = adaptive(attacked, norm, eps, sweeps, n)
            case = {"norm": norm, "eps": eps, "prediction_sweeps": sweeps}
            worst.append({**case, **share(broken, scope)})
    cells = [_temporal_cell(row) for row in subject.temporal]
    return {"headline": headline, "worst": worst, "cells": cells}


def _temporal_cell(row: TemporalOutcome) -> dict[str, Any]:
    return {
        "norm": row.norm or None,
        "eps": row.eps,
        "gradient": row.gradient,
        "attack_sweeps": row.attack_sweeps,
        "prediction_sweeps": row.prediction_sweeps,
        **share(row.wrong, row.scope),
    }


def _attacks_at(subject: SubjectOutcome, norm: str, eps: float) -> list[str]:
    ours = [row.attack for row in subject.attacks if (row.norm, row.eps) == (norm, eps)]
    theirs = [cell.attack for cell in subject.published if (cell.norm, cell.eps) == (norm, eps)]
    return list(dict.fromkeys((*ours, *theirs)))
