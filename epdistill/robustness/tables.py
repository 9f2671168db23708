"""results.json as rows of text, for terminals and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epdistill.robustness.corruptions import FAMILY
from epdistill.robustness.guards import LINF
from epdistill.robustness.shares import ball


def _share(row: Mapping[str, Any]) -> str:
    """Accuracy and interval in percent."""
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def diagnosis_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The 26 checks as text: what, status, value, threshold, and for a bad one what to do.

    Args:
        found: `diagnosis` of a model of results.json.
    """
    rows = []
    for check in found["checks"]:
        value = check["value"]
        shown = f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
        bad = check["status"] in ("WARN", "FAIL")
        advice = f"{check['detail']}: {check['todo']}" if bad else ""
        name = f"{check['number']} {check['name']}"
        rows.append([name, check["status"], shown, check["threshold"], advice])
    return rows


def horizon_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy along each gradient of a model that relaxes, the worst case last; or nothing.

    Args:
        found: `diagnosis` of a model of results.json.
    """
    tables = [check["table"] for check in found["checks"] if check.get("table")]
    return [[row["name"], _share(row)] for table in tables for row in table]


def threat_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """results.json as text: clean, worst case per norm and radius, corruptions; in percent.

    Args:
        models: The models of results.json; one column each after the threat's name.
    """

    rows = [["clean", *(_share(model["clean"]) for model in models)]]
    cases = [{(row["norm"], row["eps"]): row for row in model["worst_case"]} for model in models]
    seen = {case for found in cases for case in found}
    for norm, eps in sorted(seen, key=lambda case: (case[0] != LINF, case[1])):
        # A model that nothing attacked is not robust: it has no figure.
        cells = [_share(found[norm, eps]) if (norm, eps) in found else "-" for found in cases]
        rows.append([f"worst, {ball(norm, eps)}", *cells])
    for number, mean in enumerate(models[0]["corruption_means"]):
        name = "corrupted" if mean["family"] == FAMILY else f"corrupted, {mean['family']}"
        what = f"{name}, {'extras' if mean['extra'] else 'mean'}"
        found = [model["corruption_means"][number] for model in models]
        rows.append([what, *(f"{100 * cell['accuracy']:.1f}" for cell in found)])
    if any(model["verdict"] for model in models):
        rows.append(["gradients", *(model["verdict"] or "-" for model in models)])
    return rows


def published_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The published protocol's cells as text, the adaptive figure after each; in percent.

    Corruptions stand in the average only. No rows without the protocol.

    Args:
        models: The models of results.json; one column each after the cell's name.
    """

    def name(cell: dict[str, Any]) -> str:
        attack = str(cell["attack"])
        if cell["constant"] is not None:
            return f"{attack}, c = {cell['constant']:g}"
        return f"{attack}, {ball(cell['norm'], cell['eps'])}" if cell["norm"] else attack

    def pair(published: float, adaptive: float) -> str:
        return f"{100 * published:.1f} / {100 * adaptive:.1f}"

    columns = []
    for model in models:
        if (found := model["published"]) is None:
            return []
        average = found["average_robust_accuracy"]
        shown = {
            name(cell): pair(cell["accuracy"], cell["adaptive"]["accuracy"])
            for cell in found["cells"]
            if cell["condition"] is None
        }
        what = "average of the families" + ("" if average["complete"] else ", incomplete")
        columns.append({**shown, what: pair(average["published"], average["adaptive"])})
    # A file without gradients lacks some cells.
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "-") for column in columns)] for name in names]
