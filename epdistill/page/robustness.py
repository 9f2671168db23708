"""Worst-case accuracies and corruptions, from results.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epdistill.page.charts import Series, chart
from epdistill.page.elements import Cell, heading, paragraph, percent, section, share, table
from epdistill.robustness.corruptions import FAMILY
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.shares import ball
from epdistill.robustness.tables import published_rows

NOT_MEASURED = "Not measured: type `epdistill evaluate`."


def robustness(results: dict[str, Any] | None) -> str:
    """Tables and curves; one line where nothing was measured.

    Args:
        results: The content of results.json.
    """
    if results is None:
        return section("robustness", "Robustness", paragraph(NOT_MEASURED))
    models = results["models"]
    head = ["threat", *(f"{model['name']} ({model['kind']})" for model in models)]
    charts = "".join(
        chart(
            f"accuracy under the worst attack, %, {title}", _curves(models, norm), x=x, percent=True
        )
        for norm, title, x in ((LINF, "Linf", "radius, 1/255"), (L2, "L2", "radius"))
    )
    parts = [
        paragraph(_how(results)),
        table("Accuracy under every threat", head, _threats(models)),
        f'<div class="charts">{charts}</div>' if charts else "",
    ]
    corrupted = _corrupted(models)
    if corrupted:
        parts += [
            heading("By corruption"),
            paragraph("Accuracy in percent, the mean over the severities.", "soft"),
            table("Accuracy by corruption", ["corruption", *head[1:]], corrupted),
        ]
    published = published_rows(models)
    if published:
        parts += [
            heading("Published protocol / adaptive"),
            table("Published protocol", ["cell", *head[1:]], [
                [row[0], *map(Cell, row[1:])] for row in published
            ]),
        ]  # fmt: skip
    for skip in results["skipped"]:
        parts.append(paragraph(f"Not run: {skip['what']}: {skip['why']}.", "soft"))
    return section("robustness", "Robustness", *parts)


def _how(results: dict[str, Any]) -> str:
    settings = results["settings"]
    pgd, names = settings["pgd"], [attack["name"] for attack in settings["attacks"]]
    budgets = {
        "pgd": f"PGD: {pgd['steps']} steps, {pgd['restarts']} restart(s)",
        "square": f"Square: {settings['square']['queries']} queries",
    }
    found = [text for name, text in budgets.items() if name in names]
    text = (
        f"Accuracy in percent on {results['n']} {settings['split']} images with Wilson's 95 % "
        f"interval, suite {settings['name']}, seed {settings['seed']}. Under attack it is the "
        "worst case per image over all attacks, gradients and transfers. "
        f"Attacks: {', '.join(dict.fromkeys(names))}." + (f" {'; '.join(found)}." if found else "")
    )
    if any(model["kind"] == "onnx" for model in results["models"]):
        text += (
            " An exported file gives no gradients: it is attacked by black boxes and by transfer."
        )
    return text


def _threats(models: Sequence[dict[str, Any]]) -> list[list[Cell | str]]:
    rows: list[list[Cell | str]] = [["clean", *(share(model["clean"]) for model in models)]]
    cases = [{(row["norm"], row["eps"]): row for row in model["worst_case"]} for model in models]
    seen = sorted({key for found in cases for key in found}, key=lambda k: (k[0] != LINF, k[1]))
    for key in seen:
        # A model that nothing attacked is not robust: it has no figure.
        found = [share(case[key]) if key in case else Cell("-") for case in cases]
        rows.append([f"worst, {ball(*key)}", *found])
    for place, mean in enumerate(models[0]["corruption_means"]):
        name = "corrupted" if mean["family"] == FAMILY else f"corrupted, {mean['family']}"
        means = [percent(model["corruption_means"][place]["accuracy"]) for model in models]
        rows.append([f"{name}, {'extras' if mean['extra'] else 'mean'}", *means])
    return rows


def _curves(models: Sequence[dict[str, Any]], norm: str) -> list[Series]:
    scale = 255 if norm == LINF else 1
    series = []
    for model in models:
        rows = [row for row in model["worst_case"] if row["norm"] == norm and row["eps"] > 0]
        if rows:
            rows = [{"eps": 0.0, **model["clean"]}, *sorted(rows, key=lambda row: row["eps"])]
            points = [(scale * row["eps"], row["accuracy"]) for row in rows]
            band = [(row["ci95"][0], row["ci95"][1]) for row in rows]
            series.append(Series(model["name"], points, band))
    return series


def _corrupted(models: Sequence[dict[str, Any]]) -> list[list[Cell | str]]:
    kinds = dict.fromkeys(
        (row["family"], row["corruption"]) for model in models for row in model["corruptions"]
    )
    rows: list[list[Cell | str]] = []
    for family, name in kinds:
        cells: list[Cell | str] = [
            name.replace("_", " ") + ("" if family == FAMILY else f" ({family})")
        ]
        for model in models:
            found = [
                row["accuracy"]
                for row in model["corruptions"]
                if (row["family"], row["corruption"]) == (family, name)
            ]
            cells.append(percent(sum(found) / len(found)) if found else Cell("-"))
        rows.append(cells)
    return rows
