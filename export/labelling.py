"""What a file says about itself: the model's `metadata_props`, checked and sorted."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from epdistill import __version__
from epdistill.errors import ExportError
from epdistill.export.signature import CLASSES_KEY

if TYPE_CHECKING:
    from onnx import ModelProto

    from epdistill.export.parity import ParityReport

SCHEMA_VERSION = "1"
PARITY_KEY = "epdistill.parity"
QUANTISATION_KEY = "epdistill.quantisation"
ROBUSTNESS_KEY = "epdistill.robustness"
TEST_ACCURACY_KEY = "test_accuracy"
# What was measured on one file is not said of another made from it.
MEASURED = frozenset({PARITY_KEY, ROBUSTNESS_KEY, TEST_ACCURACY_KEY})


def own_labels(
    image_shape: tuple[int, int, int], classes: Sequence[str], *, pixels: bool, kind: str
) -> dict[str, str]:
    """The entries that every file has.

    The `Image.*` keys are those of the ONNX specification (docs/MetadataProps.md).

    Args:
        image_shape: (C, H, W).
        classes: K names in the order of the logits.
        pixels: The input is uint8, channels last.
        kind: `"student"`, `"baseline"` or `"teacher"`.
    """
    own = {
        "epdistill.schema": SCHEMA_VERSION,
        "epdistill.version": __version__,
        "epdistill.kind": kind,
        CLASSES_KEY: json.dumps(list(classes)),
        "epdistill.input_layout": "NHWC" if pixels else "NCHW",
        "epdistill.input_range": "[0, 255]" if pixels else "[0, 1]",
        "Image.NominalPixelRange": "NominalRange_0_255" if pixels else "Normalized_0_1",
    }
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        own[f"epdistill.{package}"] = importlib.metadata.version(package)
    layout = {1: "Gray8", 3: "Rgb8"}.get(image_shape[0])
    if layout is not None:
        own["Image.BitmapPixelFormat"] = layout
    return own


def merged(own: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Both sets of entries.

    Raises:
        ExportError: A key stands in both, or a value is an absolute path.
    """
    taken = sorted(own.keys() & more.keys())
    if taken:
        raise ExportError(
            f"received metadata for {taken[0]!r}, which the export writes itself; "
            "expected other keys: rename it"
        )
    for key, value in more.items():
        if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute():
            raise ExportError(
                f"received metadata {key!r} with the absolute path {value}; expected none in a "
                "file that is given away: leave it out"
            )
    return {**own, **more}


def write_labels(proto: ModelProto, labels: Mapping[str, str]) -> None:
    """Make these the model's `metadata_props`, sorted by key."""
    del proto.metadata_props[:]
    for key, value in sorted(labels.items()):
        proto.metadata_props.add(key=key, value=value)


def parity_label(parity: ParityReport) -> str:
    """The gate's figures as a file states them about itself.

    The error is rounded up to a power of ten: its digits depend on the processor and its
    threads, and the same run is to give the same bytes. The manifest has them all.
    """
    largest = max(row.error for row in parity.rows)
    bound = 10.0 ** math.ceil(math.log10(largest)) if largest > 0 else 0.0
    return text({"agreement": parity.agreement, "images": parity.n, "max_abs_error_at_most": bound})


def text(figures: Mapping[str, Any]) -> str:
    """Figures as one line of JSON, keys sorted."""
    return json.dumps(figures, sort_keys=True, allow_nan=False)
