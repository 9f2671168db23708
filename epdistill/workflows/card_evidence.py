"""The sections of a model card about what was measured after the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epdistill.runs import Run
from epdistill.workflows.card_front import threat
from epdistill.workflows.commands import export_command, training_command
from epdistill.workflows.evidence import Evidence, Exports


def evidence_sections(run: Run, found: Evidence) -> list[str]:
    """Robustness, exported files and timings; one line names what nobody measured."""
    lines: list[str] = []
    missing = []
    if found.robustness is None:
        missing.append(f"robustness (`epdistill evaluate {run.name}`)")
    else:
        lines += _robustness(found.robustness)
    if not found.exports:
        missing.append(f"an export and its parity (`epdistill export {run.name}`)")
    else:
        lines += _exports(found.exports)
        int8 = any(export.manifest.precision == "int8" for export in found.exports)
        if run.kind == "student" and not int8:
            missing.append(f"the loss by int8 (`epdistill export {run.name} --int8`)")
    if found.bench is not None:
        lines += _speed(found.bench)
    elif run.kind == "student":
        missing.append(f"speed (`epdistill bench {run.name}`)")
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return lines


def _robustness(found: Mapping[str, Any]) -> list[str]:
    attacks = ", ".join(found["attacks"])
    verdict = found.get("verdict")
    return [
        "",
        "## Robustness",
        "",
        f"Suite `{found['suite']}`{f' ({attacks})' if attacks else ''}, seed {found['seed']}, on "
        f"{found.get('split', 'test')} images; per image the worst case over all attacks, with "
        "Wilson's 95 % interval.",
        "",
        "| | accuracy | 95 % interval | n |",
        "|---|---|---|---|",
        *(
            f"| {threat(row)} | {row['accuracy']:.4f} | {row['ci95'][0]:.4f}-{row['ci95'][1]:.4f} "
            f"| {row['n']} |"
            for row in found["threats"]
        ),
        *(["", f"Masked gradients, 26 checks: {verdict}."] if verdict else []),
    ]


def _exports(exports: Sequence[Exports]) -> list[str]:
    lines = ["", "## Exported files", ""]
    for export in exports:
        manifest, parity = export.manifest, export.manifest.parity
        words = [f"`{export.name}`, {manifest.precision}, {manifest.size_bytes:,} bytes"]
        if "max_abs_error" in parity:
            words.append(
                f"largest difference of a logit from the model in float64 "
                f"{parity['max_abs_error']:.2g} (allowed {parity['tolerance']:.2g}), same label "
                f"{parity['agreement']:.4f} of {parity['n']} answers"
            )
        lost = manifest.figures.get("quantisation")
        if lost:
            words.append(
                f"{lost['drop_points']:.2f} points of top-1 lost on {lost['images']} validation "
                f"images ({lost['float_accuracy']:.4f} to {lost['accuracy']:.4f})"
            )
        if "test_accuracy" in manifest.figures and lost:
            words.append(
                f"test accuracy {manifest.figures['test_accuracy']:.4f} "
                f"(n = {manifest.figures['test_images']})"
            )
        lines.append(f"* {'; '.join(words)}.")
    return lines


def _speed(bench: Mapping[str, Any]) -> list[str]:
    hardware = bench["hardware"]
    return [
        "",
        "## Speed",
        "",
        f"Medians (quartiles) of interleaved calls on {hardware['cpu']}, "
        f"{hardware['torch_threads']} thread(s) of {hardware['cores']} cores, torch "
        f"{hardware['torch']}, onnxruntime {hardware['onnxruntime']}.",
        "",
        "| | batch | ms per call | images per second |",
        "|---|---|---|---|",
        *map(_timing, bench["rows"]),
    ]


def _timing(row: Mapping[str, Any]) -> str:
    call = {key: 1e3 * row["seconds_per_batch"][key] for key in ("median", "q25", "q75")}
    return (
        f"| {row['name']} | {row['batch_size']} | {call['median']:.3g} ({call['q25']:.3g}-"
        f"{call['q75']:.3g}) | {row['images_per_second']:,.0f} |"
    )


def making(run: Run, found: Evidence) -> list[str]:
    """The commands that make it again, and how to use it."""
    commands = [training_command(run, shared=True)]
    if found.exports:
        reduced = [e.manifest.precision for e in found.exports if e.manifest.precision != "float32"]
        commands.append(export_command(run.name, reduced))
    data = run.config["data"]
    shape = f"(batch, {data['channels']}, {data['image_size']}, {data['image_size']})"
    return [
        "",
        "## Use",
        "",
        "```python",
        "import epdistill",
        "",
        f'model = epdistill.load("{run.name}")  # this folder',
        f"logits = model(images)  # float32 {shape} in [0, 1]",
        "```",
        "",
        f"Classes: {', '.join(data['classes'])}.",
        "",
        "## Make it again",
        "",
        "```",
        *commands,
        "```",
        "",
        "The same machine, versions and number of threads give the same weights, bit for bit; the "
        "whole recipe stands in `config.json`.",
    ]


def limits(run: Run, found: Evidence) -> list[str]:
    """What the numbers do not say."""
    data, recipe = run.config["data"], run.config["recipe"]
    size = data["image_size"]
    lines = [
        "",
        "## Limits",
        "",
        f"* It knows {len(data['classes'])} classes and nothing else: any {size}x{size} image gets "
        "one of them.",
        f"* All figures are of one training (seed {recipe['seed']}) and of the images counted "
        "beside them.",
    ]
    if found.robustness is not None:
        lines.append(
            "* Attacks show weakness, never strength: a stronger one may find more. Outside the "
            "radii above nothing is known."
        )
    else:
        lines.append("* Accuracy says nothing about robustness, which was not measured.")
    if run.kind == "student" and recipe["student"]["inputs"] in ("mix", "noise"):
        lines.append(
            f"* Trained on inputs with Gaussian noise ({recipe['student']['noise_std']:g}): noise "
            "alone buys robustness too, so what is seen here need not come from the teacher."
        )
    return lines
