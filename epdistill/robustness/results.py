"""Writing an evaluation down: results.json, results.csv, and accuracy over the radius."""

from __future__ import annotations

import csv
import io
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchattacks
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from epdistill import __version__
from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions import FAMILY
from epdistill.robustness.guards import LINF, NORMS
from epdistill.robustness.intervals import wilson
from epdistill.robustness.outcomes import TRANSFER, Evaluation, SubjectOutcome
from epdistill.runs import atomic_write, write_json

SCHEMA_VERSION = 1
JSON_NAME = "results.json"
CSV_NAME = "results.csv"
COLUMNS = (
    "example",
    "model",
    "attack",
    "view",
    "norm",
    "eps",
    "success",
    "perturbation_norm",
    "attacked",
)


def write_results(evaluation: Evaluation, folder: Path) -> tuple[Path, Path]:
    """Write `results.json` and `results.csv` into a folder, each atomically.

    The CSV has one row per example, model and attack (with its view, norm and
    radius), beginning with the attack `clean`. `success` is 1 where the model is
    wrong; `attacked` is 0 where the attack was not run because the image was
    wrong already (see `AttackOutcome`).

    Args:
        evaluation: What `evaluate` returned.
        folder: Made if missing.

    Returns:
        The paths of the two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON_NAME, summary(evaluation))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(evaluation))
    atomic_write(folder / CSV_NAME, text.getvalue())
    return folder / JSON_NAME, folder / CSV_NAME


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The content of `results.json`: accuracies in 0..1 with Wilson's 95 % intervals.

    A model has a `worst_case` row only for a norm and radius at which something
    attacked it, and the row names what did: a model that nothing attacked is not
    robust. `corruption_mean` averages over corruptions and severities; `error` is
    the mean corruption error, unnormalised; `gap` is the loss from clean accuracy.
    """
    settings = {
        **asdict(evaluation.suite),
        "corruption_family": FAMILY,
        "seed": evaluation.seed,
        "batch_size": evaluation.batch_size,
        "limit": evaluation.limit,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "versions": _versions(),
        "n": len(evaluation.examples),
        "models": [_model(subject) for subject in evaluation.subjects],
    }


def plot_accuracy_eps(evaluation: Evaluation, path: Path) -> None:
    """Draw worst-case accuracy over the radius, one panel per norm, as a PNG.

    Each model has a line, beginning with its clean accuracy at radius 0, in the
    band of Wilson's 95 % interval.

    Args:
        evaluation: What `evaluate` returned.
        path: The PNG to write, atomically.

    Raises:
        EvaluationError: Nothing was attacked, so there is no curve.
    """
    radii = [radius for subject in evaluation.subjects for radius in subject.radii()]
    norms = [norm for norm in NORMS if any(norm == seen for seen, _ in radii)]
    if not norms:
        raise EvaluationError(
            "no attack ran on any model, so there is no curve to draw; expected at least one "
            "radius in the suite"
        )
    figure = Figure(figsize=(5.6 * len(norms), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(norms), squeeze=False, sharey=True)[0]
    for norm, axes in zip(norms, panels, strict=True):
        _panel(evaluation, norm, axes)
    panels[0].set_ylabel("accuracy under the worst attack (%)", fontsize=12)
    image = io.BytesIO()
    # Without matplotlib's version in it, so that equal results are equal files.
    figure.savefig(image, format="png", metadata={"Software": None})
    atomic_write(path, image.getvalue())


def _panel(evaluation: Evaluation, norm: str, axes: Axes) -> None:
    scale = 255 if norm == LINF else 1
    markers = "osD^vPX*"
    for number, subject in enumerate(evaluation.subjects):
        grid = [eps for seen, eps in subject.radii() if seen == norm]
        if not grid:
            continue
        cells = [_share(subject.clean_wrong)]
        cells += [_share(subject.broken(norm, eps)) for eps in grid]
        x = [scale * eps for eps in (0.0, *grid)]
        # Radius 0 is the clean accuracy, and nothing else.
        if 0.0 in grid:
            cells, x = cells[1:], x[1:]
        white = any(r.attack != TRANSFER and r.view for r in subject.attacks if r.norm == norm)
        label = subject.name if white else f"{subject.name} (no gradients)"
        colour = f"C{number % 10}"
        low = [100 * cell["ci95"][0] for cell in cells]
        high = [100 * cell["ci95"][1] for cell in cells]
        y = [100 * cell["accuracy"] for cell in cells]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        # Hollow and dashed in turn: equal curves (a model and its export) both show.
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=("-", "--", "-.", ":")[number % 4],
            marker=markers[number % len(markers)],
            markersize=8,
            markerfacecolor="none",
            label=label,
        )
    axes.set_title(f"{'Linf' if norm == LINF else 'L2'}, n = {len(evaluation.labels)}", fontsize=13)
    unit = "radius (grey levels of 255)" if norm == LINF else "radius (pixels in [0,1])"
    axes.set_xlabel(unit, fontsize=12)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=11)


def _model(subject: SubjectOutcome) -> dict[str, Any]:
    clean = _share(subject.clean_wrong)
    corruptions = [
        {"corruption": row.corruption, "severity": row.severity, **_share(row.wrong)}
        for row in subject.corruptions
    ]
    mean = None
    if corruptions:
        accuracy = sum(row["accuracy"] for row in corruptions) / len(corruptions)
        mean = {
            "family": FAMILY,
            "accuracy": accuracy,
            "error": 1 - accuracy,
            "gap": clean["accuracy"] - accuracy,
            "conditions": len(corruptions),
        }
    return {
        "name": subject.name,
        "kind": subject.kind,
        "clean": clean,
        "attacks": [
            {
                "attack": row.attack,
                "view": row.view,
                "norm": row.norm,
                "eps": row.eps,
                **_share(row.success),
                "attacked": int(row.attacked.sum()),
            }
            for row in subject.attacks
        ],
        "worst_case": [
            {
                "norm": norm,
                "eps": eps,
                **_share(subject.broken(norm, eps)),
                "attacks": _attacks_at(subject, norm, eps),
            }
            for norm, eps in subject.radii()
        ],
        "corruptions": corruptions,
        "corruption_mean": mean,
    }


def _attacks_at(subject: SubjectOutcome, norm: str, eps: float) -> list[str]:
    rows = (row for row in subject.attacks if (row.norm, row.eps) == (norm, eps))
    return list(dict.fromkeys(row.attack for row in rows))


def _share(wrong: Tensor) -> dict[str, Any]:
    n = len(wrong)
    right = n - int(wrong.sum())
    return {"accuracy": right / n, "ci95": list(wilson(right, n)), "n": n}


def _rows(evaluation: Evaluation) -> Iterator[tuple[Any, ...]]:
    examples = evaluation.examples.tolist()
    for subject in evaluation.subjects:
        for example, wrong in zip(examples, subject.clean_wrong.tolist(), strict=True):
            yield example, subject.name, "clean", "", "", 0.0, int(wrong), 0.0, 1
        for row in subject.attacks:
            cells = zip(
                examples,
                row.success.tolist(),
                row.perturbation.tolist(),
                row.attacked.tolist(),
                strict=True,
            )
            for example, success, reach, attacked in cells:
                yield (
                    example,
                    subject.name,
                    row.attack,
                    row.view,
                    row.norm,
                    row.eps,
                    int(success),
                    reach,
                    int(attacked),
                )


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchattacks": str(torchattacks.__version__),
        "epdistill": __version__,
    }
    # Only if a subject ran on it.
    if "onnxruntime" in sys.modules:
        versions["onnxruntime"] = str(sys.modules["onnxruntime"].__version__)
    return versions
