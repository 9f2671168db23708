"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epdistill.cli.flags import (
    RUNS,
    DownloadFlag,
    JsonFlag,
    QuietFlag,
    RootFlag,
    RunsFlag,
    context_of,
)
from epdistill.cli.output import emit_json, show_table

if TYPE_CHECKING:
    from epdistill.export.reduced import ReducedResult
    from epdistill.workflows.deployment import Exported


def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A student's, baseline's or teacher's run; the newest student without it.",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also a quantised file, model-int8.onnx.")
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Also a float16 file, model-float16.onnx.")
    ] = False,
    max_drop: Annotated[
        float,
        typer.Option(
            "--max-drop", min=0, max=100, help="Points of top-1 accuracy that those may lose."
        ),
    ] = 0.5,
    uint8_input: Annotated[
        bool, typer.Option("--uint8-input", help="Take bytes, channels last, instead of floats.")
    ] = False,
    sweeps: Annotated[
        int | None,
        typer.Option("--sweeps", min=1, help="Of a teacher's loop; its schedule's without it."),
    ] = None,
    robustness: Annotated[
        int | None,
        typer.Option(
            "--robustness", min=1, metavar="IMAGES",
            help="Attack the run and its files on so many test images; takes a while.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option("--format", help="onnx; or triton: also a model repository for Triton."),
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", help="The .onnx file; model.onnx in the run without it.")
    ] = None,
    data_root: RootFlag = None,
    download: DownloadFlag = False,
    runs: RunsFlag = RUNS,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:  # fmt: skip
    """Export a run to ONNX; a file that fails its gate is not written."""
    from epdistill.errors import RecipeError
    from epdistill.workflows.deployment import Wanted
    from epdistill.workflows.deployment import export as work

    if format not in ("onnx", "triton"):
        raise RecipeError(f"received --format {format}; expected onnx or triton")
    wanted = Wanted(int8, fp16, uint8_input, max_drop, sweeps, robustness, format == "triton")
    context = context_of(runs, data_root, download, "cpu", quiet)
    done = work(context, run=run, out=out, wanted=wanted)
    if json:
        emit_json(_content(done))
        return
    result, parity = done.result, done.result.parity
    show_table(
        str(result.path),
        ["export", "value"],
        [
            ["size", f"{result.size_bytes / 2**20:.2f} MiB"],
            ["largest difference of a logit", f"{parity.max_abs_error:.1e}"],
            ["allowed", f"{parity.tolerance:.1e}"],
            ["same label", f"{100 * parity.agreement:.2f} %"],
            ["images compared", str(parity.n)],
            ["sha256", f"{result.sha256[:16]}…"],
        ],
        None if done.reduced else f"epdistill predict {result.path} IMAGE",
    )
    if done.reduced:
        show_table(
            f"against float32, on {done.reduced[0].manifest.figures['quantisation']['images']} "
            "validation images",
            ["", "MiB", "top-1 %", "float32 %", "same label %", "test top-1 %", "setting"],
            [_row(found) for found in done.reduced],
            f"epdistill bench {done.run.path}"
            if done.run.kind == "student"
            else f"epdistill predict {result.path} IMAGE",
        )
    if done.triton:
        show_table(
            str(done.triton[0].config.parents[1]),
            ["Triton model", "file", "parsed by Triton's protobuf"],
            [
                [model.name, str(model.onnx), "yes" if model.validated else "not installed"]
                for model in done.triton
            ],
            None,
            words=(0, 1, 2),
        )
    if done.evaluated is not None:
        from epdistill.cli.tables import evaluation_table

        evaluation_table(done.evaluated)


def _row(found: ReducedResult) -> list[str]:
    figures = found.manifest.figures
    lost, setting = figures["quantisation"], figures["quantisation"]["setting"]
    how = ""
    if "calibration" in setting:
        scales = "per channel" if setting["per_channel"] else "per tensor"
        ends = ", ends in float32" if setting["float_ends"] else ""
        how = f"{scales}, {setting['calibration']}{ends}"
    return [
        found.manifest.precision,
        f"{found.manifest.size_bytes / 2**20:.2f}",
        f"{100 * lost['accuracy']:.2f}",
        f"{100 * lost['float_accuracy']:.2f}",
        f"{100 * lost['agreement']:.2f}",
        f"{100 * figures['test_accuracy']:.2f}",
        how,
    ]


def _content(done: Exported) -> dict[str, Any]:
    """What `--json` prints (docs/export.md)."""
    from epdistill.export.manifest import card_path, manifest_path, read_manifest

    result = done.result

    def file(path: Path) -> dict[str, Any]:
        manifest = read_manifest(manifest_path(path))
        return {
            "onnx": str(path),
            "manifest": str(manifest_path(path)),
            "card": str(card_path(path)),
            "sha256": manifest.sha256,
            "size_bytes": manifest.size_bytes,
            "kind": manifest.kind,
            "precision": manifest.precision,
            "parity": dict(manifest.parity) or None,
            "figures": dict(manifest.figures),
        }

    return {
        "run": str(done.run.path),
        **file(result.path),
        "reduced": [file(found.path) for found in done.reduced],
        "triton": [
            {
                "name": model.name,
                "config": str(model.config),
                "onnx": str(model.onnx),
                "sha256": model.sha256,
                "validated": model.validated,
            }
            for model in done.triton
        ],
        "results": None if done.evaluated is None else str(done.evaluated.folder / "results.json"),
    }
