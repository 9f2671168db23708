"""The pictures of an evaluation, drawn from the content of its results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from epdistill.robustness.guards import NORMS
from epdistill.robustness.pictures import (
    accuracy_curves,
    corruption_heat_map,
    save,
    sweep_curves,
    temporal_heat_map,
    transfer_matrix,
    uncertainty_plot,
)
from epdistill.robustness.shares import ball
from epdistill.robustness.temporal import CLEAN

SETTLED = "settled"
Content = Mapping[str, Any]


def draw(results: Content, folder: Path) -> list[Path]:
    """Write every picture that the results have data for, as PNG and SVG.

    accuracy-NORM      worst-case accuracy over the radius
    transfer-NORM      images of one model tried on another, at the middle radius
    corruptions-FAMILY accuracy by corruption and severity
    temporal-MODEL     attack horizon against prediction horizon
    sweeps-MODEL       the same, worst gradient per image, as curves
    basins-MODEL       the uncertainty exponents of states and labels

    MODEL is the model's place among the models, counted from 1.

    Args:
        results: The content of results.json.
        folder: Made if missing.

    Returns:
        The PNGs.
    """
    figures = {
        **_accuracy(results),
        **_transfer(results),
        **_corruptions(results["models"]),
        **_temporal(results["models"]),
        **_basins(results["models"]),
    }
    return [save(figure, folder / stem)[0] for stem, figure in figures.items()]


def _accuracy(results: Content) -> dict[str, Figure]:
    figures = {}
    for norm in NORMS:
        curves = {}
        for model in results["models"]:
            rows = [row for row in model["worst_case"] if row["norm"] == norm and row["eps"] > 0]
            if rows:
                curves[model["name"]] = [{"eps": 0.0, **model["clean"]}, *rows]
        if curves:
            title = f"Accuracy under the worst attack, n = {results['n']}"
            figures[f"accuracy-{norm}"] = accuracy_curves(curves, norm, title=title)
    return figures


def _transfer(results: Content) -> dict[str, Figure]:
    figures = {}
    for norm in NORMS:
        rows = [row for row in results["transfer"] if row["norm"] == norm]
        radii = sorted({row["eps"] for row in rows})
        if not radii:
            continue
        eps = radii[len(radii) // 2]
        found = {
            (row["source"], row["target"]): row["accuracy"] for row in rows if row["eps"] == eps
        }
        sources, targets = (list(dict.fromkeys(pair[end] for pair in found)) for end in (0, 1))
        values = [[found.get((s, t), math.nan) for t in targets] for s in sources]
        title = f"Transfer of adversarial images, {ball(norm, eps)}, n = {results['n']}"
        figures[f"transfer-{norm}"] = transfer_matrix(values, sources, targets, title=title)
    return figures


def _corruptions(models: Sequence[Content]) -> dict[str, Figure]:
    figures = {}
    clean = {model["name"]: model["clean"]["accuracy"] for model in models}
    for family in dict.fromkeys(row["family"] for row in models[0]["corruptions"]):
        rows = {
            model["name"]: [row for row in model["corruptions"] if row["family"] == family]
            for model in models
        }
        figures[f"corruptions-{family}"] = corruption_heat_map(
            rows, clean=clean, title=f"Accuracy under corruption ({family})"
        )
    return figures


def _temporal(models: Sequence[Content]) -> dict[str, Figure]:
    figures = {}
    for place, model in enumerate(models, start=1):
        sweep = model["temporal"]
        if sweep is None:
            continue
        n = sweep["cells"][0]["n"]
        attacked = [cell for cell in sweep["cells"] if cell["gradient"] != CLEAN]
        readers = list(dict.fromkeys(_reader(cell) for cell in attacked))
        rows = list(dict.fromkeys(_horizon(cell) for cell in attacked))
        panels: dict[str, list[list[float]]] = {}
        curves = {CLEAN: [cell for cell in sweep["cells"] if cell["gradient"] == CLEAN]}
        for norm, eps in dict.fromkeys((cell["norm"], cell["eps"]) for cell in attacked):
            same = [cell for cell in attacked if (cell["norm"], cell["eps"]) == (norm, eps)]
            found = {(_horizon(cell), _reader(cell)): cell["accuracy"] for cell in same}
            panels[ball(norm, eps)] = [[found[row, reader] for reader in readers] for row in rows]
            curves[f"{ball(norm, eps)}, worst gradient per image"] = [
                row for row in sweep["worst"] if (row["norm"], row["eps"]) == (norm, eps)
            ]
        title = f"{model['name']}, n = {n}"
        figures[f"temporal-{place}"] = temporal_heat_map(panels, rows, readers, title=title)
        timed = {
            name: [_timed(c) for c in some if _reader(c) != SETTLED]
            for name, some in curves.items()
        }
        figures[f"sweeps-{place}"] = sweep_curves(timed, title=title)
    return figures


def _timed(cell: Content) -> dict[str, Any]:
    return {"sweeps": cell["prediction_sweeps"], **cell}


def _reader(cell: Content) -> str:
    return SETTLED if cell["prediction_sweeps"] is None else str(cell["prediction_sweeps"])


def _horizon(cell: Content) -> str:
    return str(cell["gradient"] if cell["attack_sweeps"] is None else cell["attack_sweeps"])


def _basins(models: Sequence[Content]) -> dict[str, Figure]:
    figures = {}
    for place, model in enumerate(models, start=1):
        if (basins := model["basins"]) is not None:
            title = f"{model['name']}, {basins['images']} images"
            laws = {"another state": basins["states"], "another label": basins["labels"]}
            figures[f"basins-{place}"] = uncertainty_plot(laws, title=title)
    return figures
