"""The first section: what the runs are and how they did on clean test images."""

from __future__ import annotations

from collections.abc import Sequence

from epdistill.page.elements import Cell, number, paragraph, percent, section, table
from epdistill.runs import Run


def overview(runs: Sequence[Run]) -> str:
    """One row per run."""
    rows: list[list[Cell | str]] = []
    for run in runs:
        results, config = run.config["results"], run.config
        agreement, sweeps = results.get("agreement"), results.get("sweeps")
        rows.append(
            [
                run.name,
                f"{run.kind}, {config['model'].get('name', '')}".rstrip(", "),
                str(config["data"]["name"]),
                percent(results["accuracy"], 2),
                number(results["test_images"], str(results["test_images"])),
                Cell("-") if agreement is None else percent(agreement, 2),
                Cell("1 pass", 0.0) if sweeps is None else number(sweeps, f"{sweeps:.1f}"),
                number(results["parameters"], f"{results['parameters']:,}"),
                number(results["seconds"], f"{results['seconds']:.0f}"),
                number(config["recipe"]["seed"], str(config["recipe"]["seed"])),
            ]
        )
    head = ["run", "what", "data", "test accuracy", "n", "same label as teacher"]
    head += ["sweeps", "parameters", "seconds", "seed"]
    return section("runs", "Runs", table("Runs", head, rows), *_settling(runs))


def _settling(runs: Sequence[Run]) -> list[str]:
    """How far the teachers' answers have settled."""
    return [
        paragraph(
            f"{run.name}: {100 * run.config['results']['converged']:.2f} % of the test images "
            f"settled to {run.config['model']['schedule']['tolerance']:g}; largest residual "
            f"{run.config['results']['residual']:.2g}.",
            "soft",
        )
        for run in runs
        if "converged" in run.config["results"]
    ]
