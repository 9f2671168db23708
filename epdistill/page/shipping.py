"""Exported files and their speed, from manifests and bench.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epdistill.page.elements import Cell, number, paragraph, section, table
from epdistill.workflows.evidence import Exports


def files(exports: Sequence[tuple[str, Exports]]) -> str:
    """What was exported and what it passed.

    Args:
        exports: Each with its run's name.
    """
    if not exports:
        return section("files", "Exported files", paragraph("None: type `epdistill export`."))
    rows: list[list[Cell | str]] = []
    for run, export in exports:
        manifest = export.manifest
        parity, lost = manifest.parity, manifest.figures.get("quantisation")
        accuracy = manifest.figures.get("test_accuracy")
        rows.append(
            [
                f"{run}/{export.name}",
                manifest.precision,
                number(manifest.size_bytes, f"{manifest.size_bytes / 1024:,.1f}"),
                _maybe(accuracy, lambda value: f"{100 * value:.2f}"),
                _maybe(parity.get("max_abs_error"), lambda value: f"{value:.1e}"),
                _maybe(parity.get("tolerance"), lambda value: f"{value:.1e}"),
                _maybe(lost and lost["drop_points"], lambda value: f"{value:.2f}"),
                manifest.sha256[:16],
            ]
        )
    head = ["file", "precision", "KiB", "test accuracy, %", "largest error of a logit", "allowed"]
    head += ["points lost by rounding", "SHA-256"]
    return section("files", "Exported files", table("Exported files", head, rows))


def speed(bench: dict[str, Any] | None) -> str:
    """Latency and throughput with the machine.

    Args:
        bench: The content of bench.json.
    """
    if bench is None:
        return section("speed", "Speed", paragraph("Not measured: type `epdistill bench`."))
    ratios = {(row["name"], row["batch_size"]): row for row in bench["ratios"]}
    rows: list[list[Cell | str]] = []
    for row in bench["rows"]:
        call = {key: 1e3 * value for key, value in row["seconds_per_batch"].items()}
        ratio = ratios.get((row["name"], row["batch_size"]))
        rows.append(
            [
                row["name"],
                number(row["batch_size"], str(row["batch_size"])),
                number(
                    call["median"],
                    f"{call['median']:.3g} ({call['q25']:.3g}\N{EN DASH}{call['q75']:.3g})",
                ),
                number(row["images_per_second"], f"{row['images_per_second']:,.0f}"),
                Cell("1", 1.0)
                if ratio is None
                else number(
                    ratio["speedup"],
                    f"{ratio['speedup']:.1f} ({ratio['low']:.1f}\N{EN DASH}{ratio['high']:.1f})",
                ),
            ]
        )
    hardware = bench["hardware"]
    text = (
        f"{bench['models']} on {hardware['cpu']}, {hardware['torch_threads']} thread(s) of "
        f"{hardware['cores']} cores, torch {hardware['torch']}, onnxruntime "
        f"{hardware['onnxruntime']}: medians of interleaved calls, quartiles in brackets."
    )
    head = ["what", "batch", "ms per call", "images per second", "times the published teacher"]
    return section("speed", "Speed", paragraph(text), table("Speed", head, rows))


def _maybe(value: Any, shown: Any) -> Cell:
    return Cell("-") if value is None else Cell(shown(value), float(value))
