"""ablation.json as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epdistill.robustness.guards import L2, LINF, NORMS
from epdistill.robustness.paired import CLEAN
from epdistill.robustness.shares import threat
from epdistill.workflows.ablation_plan import references_among

# The radius of the published tables at which rows are compared in the printed table.
HEADLINE = 0.309
Table = tuple[str, list[str], list[list[str]]]


def _cell(case: Mapping[str, Any]) -> str:
    """Mean, spread over seeds if there are several, and interval, in percent."""
    low, high = case["ci95"]
    spread = "" if case["std"] is None else f"±{100 * case['std']:.1f}"
    return f"{100 * case['accuracy']:.1f}{spread}\n{100 * low:.0f}-{100 * high:.0f}"


def _name(row: Mapping[str, Any]) -> str:
    seeds = len(row["seeds"])
    lines = [row["row"], f"{seeds} seed{'s' * (seeds > 1)}, n = {row['mean'][0]['n']}"]
    if row["keys"].get("student.inputs") == "adversarial":
        lines.append("(not inherited)")
    return "\n".join(lines)


def tables(content: Mapping[str, Any]) -> list[Table]:
    """Titles, heads and rows.

    Args:
        content: That of ablation.json.
    """
    rows = content["rows"]
    if not rows:
        return []
    return [
        *(_accuracy(content, norm) for norm in NORMS), _fidelity(rows), *_differences(content)
    ]  # fmt: skip


def _accuracy(content: Mapping[str, Any], norm: str) -> Table:
    """The radii of a norm; clean images stand beside Linf, corrupted ones beside L2."""
    rows, beside = content["rows"], CLEAN if norm == LINF else ""
    title = (
        f"worst case on {content['split']} images in %: mean ± standard deviation over seeds, "
        "below it the 95 % interval over n images"
    )
    kept = {
        row["row"]: [case for case in row["mean"] if case["norm"] in (beside, norm)] for row in rows
    }
    head = [
        "row",
        *(threat(case).replace(" ", "\n") for case in kept[rows[0]["row"]]),
    ]
    body = [[_name(row), *map(_cell, kept[row["row"]])] for row in rows]
    if norm == L2 and all(row["corrupted"] is not None for row in rows):
        head.append("corrupted")
        for cells, row in zip(body, rows, strict=True):
            cells.append(f"{100 * row['corrupted']:.1f}")
    return title, head, body


def _fidelity(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per student; in a cell the figures of clean, noisy and adversarial images."""

    def three(found: Mapping[str, Any], key: str) -> str:
        values = [found[inputs][key] for inputs in ("clean", "noise", "adversarial")]
        if key == "r2":
            return " ".join("-" if value is None else f"{value:.2f}" for value in values)
        return " ".join(f"{100 * value:.1f}" for value in values)

    body = [
        [row["row"], *(three(row["fidelity"], key) for key in ("agreement", "r2", "ece"))]
        for row in rows
        if row["fidelity"] is not None
    ]
    title = "students beside their own teachers: on clean, noisy, adversarial images"
    return title, ["row", "same label, %", "R²", "calibration error, %"], body


def _differences(content: Mapping[str, Any]) -> list[Table]:
    """Clean, and at the L2 radius nearest to the headline's; all others are in the JSON."""
    radii = {row["eps"] for row in content["differences"] if row["norm"] == L2}
    if not radii:
        return []
    eps = min(radii, key=lambda radius: abs(radius - HEADLINE))
    return [_compared(content, (CLEAN, 0.0)), _compared(content, (L2, eps))]


def _compared(content: Mapping[str, Any], case: tuple[str, float]) -> Table:
    """All rows less the references, at one norm and radius."""
    found = {
        (row["row"], row["reference"]): row
        for row in content["differences"]
        if (row["norm"], row["eps"]) == case
    }
    references = references_among(reference for _, reference in found)
    body = [
        [
            row["row"],
            *(_gap(found[pair]) if (pair := (row["row"], reference)) in found else ""
              for reference in references),
        ]
        for row in content["rows"]
    ]  # fmt: skip
    where = threat({"norm": case[0], "eps": case[1]})
    title = f"{where}: points more than a reference on the same images (95 % interval)"
    return title, ["row", *references], body


def _gap(gap: Mapping[str, Any]) -> str:
    low, high = gap["ci95"]
    return f"{100 * gap['difference']:+.1f}\n{100 * low:+.0f} to {100 * high:+.0f}"
