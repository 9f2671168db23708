"""The checks for masked gradients: verdict, values, thresholds, what to do."""

from __future__ import annotations

from typing import Any

from epdistill.page.elements import Cell, heading, paragraph, section, share, table
from epdistill.robustness.shares import ball

# From what is bad to what says nothing.
_ORDER = {"FAIL": 0.0, "WARN": 1.0, "PASS": 2.0}


def masking(results: dict[str, Any] | None) -> str:
    """A table per model that was looked at; one line where nobody looked.

    Args:
        results: The content of results.json.
    """
    models = [] if results is None else [m for m in results["models"] if m["diagnosis"]]
    if not models:
        text = "Nobody looked for masked gradients: type `epdistill evaluate --diagnose`."
        return section("masking", "Can the numbers be trusted?", paragraph(text))
    return section(
        "masking", "Can the numbers be trusted?", *(part for m in models for part in _model(m))
    )


def _model(model: dict[str, Any]) -> list[str]:
    found = model["diagnosis"]
    rows: list[list[Cell | str]] = []
    silent = []
    for check in found["checks"]:
        value, status = check["value"], check["status"]
        if status not in _ORDER:
            silent.append(f"{check['number']} {check['name']}")
            continue
        bad = status in ("WARN", "FAIL")
        shown = f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
        rows.append(
            [
                Cell(f"{check['number']} {check['name']}", float(check["number"])),
                Cell(status, _ORDER[status], f"words {status}"),
                Cell(shown, float(value) if isinstance(value, int | float) else None),
                Cell(check["threshold"], kind="wide"),
                Cell(f"{check['detail']}: {check['todo']}" if bad else "", kind="wide"),
            ]
        )  # fmt: skip
    where = "" if found["eps"] is None else f", {ball(found['norm'], found['eps'])}"
    head = ["check", "status", "value", "fails where", "what to do"]
    parts = [
        heading(f"{model['name']} ({model['kind']}), n = {found['n']}{where}"),
        paragraph(found["text"], "note FAIL" if found["masking_evidence"] else "note PASS"),
        table(f"Checks of {model['name']}", head, rows, stack=True),
    ]
    if silent:
        parts.append(paragraph(f"Not applicable: {', '.join(silent)}.", "soft"))
    horizons = [row for check in found["checks"] for row in check.get("table") or []]
    if horizons:
        parts += [
            paragraph("The same PGD along one gradient at a time:", "soft"),
            table(
                f"Gradients of {model['name']}",
                ["gradient", "accuracy in %"],
                [[row["name"], share(row)] for row in horizons],
            ),
        ]
    return parts
