"""The card of an exported file, made from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epdistill.export.manifest import Manifest

_ABOUT = {
    "student": "A feedforward student of an EP-CNN teacher",
    "baseline": "A feedforward baseline, trained without an EP-CNN",
    "teacher": "An EP-CNN teacher: the relaxation itself, a loop of a fixed number of sweeps",
}


def card(manifest: Manifest, name: str) -> str:
    """Markdown text for `model.md`.

    Args:
        manifest: What is known.
        name: Of the model file.
    """
    meta, parity = manifest.metadata, manifest.parity
    channels, height, width = manifest.image_shape
    bytes_in = meta.get("epdistill.input_layout") == "NHWC"
    sizes = (height, width, channels) if bytes_in else (channels, height, width)
    given = f"(batch, {', '.join(map(str, sizes))})"
    lines = [
        f"# {name}",
        "",
        f"{_ABOUT.get(manifest.kind, 'A classifier')}, as a self-contained ONNX file"
        f" ({manifest.precision}).",
        "",
        "| | |",
        "|---|---|",
        f"| input | `images`, {'uint8' if bytes_in else 'float32'} {given}, values in "
        f"{meta.get('epdistill.input_range', '[0, 1]')}; normalisation is inside |",
        f"| output | `logits`, float32 (batch, {len(manifest.classes)}) |",
        f"| classes | {', '.join(manifest.classes)} |",
        f"| size | {manifest.size_bytes:,} bytes |",
        f"| SHA-256 | `{manifest.sha256}` |",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in _origin(meta)),
    ]
    figures = manifest.figures
    if "test_accuracy" in figures:
        lines.append(
            f"| test accuracy | {figures['test_accuracy']:.4f} (n = {figures['test_images']}) |"
        )
    if "max_abs_error" in parity:
        lines += [
            f"| largest difference of a logit from the model in float64 | "
            f"{parity['max_abs_error']:.2g} (allowed {parity['tolerance']:.2g}) |",
            f"| same label, ties aside | {parity['agreement']:.4f} of {parity['n']} answers |",
        ]
    lines += _quantised(figures.get("quantisation"))
    lines += _robustness(figures.get("robustness"))
    return "\n".join([*lines, ""])


def _origin(meta: Mapping[str, str]) -> list[tuple[str, str]]:
    """Where it comes from: the entries that nothing else here tells of."""
    own = ("epdistill.", "Image.", "test_accuracy")
    return [(key, value) for key, value in sorted(meta.items()) if not key.startswith(own)]


def _quantised(found: Mapping[str, Any] | None) -> list[str]:
    """What was lost by it, and how the best setting was found."""
    if found is None:
        return []
    return [
        "",
        f"## Against the float32 file (`{found['source_sha256'][:12]}`)",
        "",
        "| figure | value |",
        "|---|---|",
        f"| validation accuracy, float32 | {found['float_accuracy']:.4f} (n = {found['images']}) |",
        f"| validation accuracy of this file | {found['accuracy']:.4f} |",
        f"| points of top-1 lost | {found['drop_points']:.2f} (allowed "
        f"{found['max_drop_points']:.2f}) |",
        f"| same label | {found['agreement']:.4f} |",
        f"| size | {found['size_ratio']:.2f} times smaller |",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in found["setting"].items()),
    ]


def _robustness(found: Mapping[str, Any] | None) -> list[str]:
    """Worst cases and corruptions, as measured."""
    if found is None:
        return []
    rows = [
        f"| {row['threat']} | {'' if row['eps'] is None else format(row['eps'], '.4g')} | "
        f"{row['accuracy']:.4f} | {row['ci95'][0]:.4f}-{row['ci95'][1]:.4f} | {row['n']} |"
        for row in found["threats"]
    ]
    attacks = ", ".join(found["attacks"])
    return [
        "",
        "## Robustness",
        "",
        f"Measured on {found['measured_on']}, suite `{found['suite']}`"
        f"{f' ({attacks})' if attacks else ''}; per image the worst case over all attacks.",
        "",
        "| threat | eps | accuracy | 95 % interval | n |",
        "|---|---|---|---|---|",
        *rows,
    ]
