"""From a torch module to one self-contained ONNX file that passed the parity gate.

The candidate exists only in memory until it has passed: exported, stripped of
the exporter's stack traces, checked, opened by the same `OnnxClassifier` that
will serve it, and compared with the module. Then it is labelled with what it
passed, opened once more, written, and the manifest last. The same module gives
the same bytes (for given versions of torch and onnxscript), so a SHA-256
identifies a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from epdistill.errors import DataError, ExportError, ParityError
from epdistill.export.graph import MAX_TRIPS, local_paths, strip_traces
from epdistill.export.labelling import (
    PARITY_KEY,
    merged,
    own_labels,
    parity_label,
    write_labels,
)
from epdistill.export.manifest import STUDENT, TEACHER, Manifest, sha256_of, write_artifact
from epdistill.export.parity import ParityReport, check_images, check_parity
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.tracing import BATCH, INPUT, OPSET, OUTPUT, example, one_line, trace

if TYPE_CHECKING:
    from onnx import ModelProto

    from epdistill.teachers.model import EPCNN


@dataclass(frozen=True)
class ExportResult:
    """An exported file.

    Attributes:
        path: The `.onnx` file.
        sha256: Hex digest of its bytes.
        size_bytes: Its length.
        parity: The figures of the gate it passed.
        manifest: The JSON file beside it.
    """

    path: Path
    sha256: str
    size_bytes: int
    parity: ParityReport
    manifest: Path


@dataclass(frozen=True)
class _About:
    """What is not computed: `export_onnx`'s arguments of the same names."""

    out: Path
    classes: Sequence[str]
    images: Tensor
    metadata: Mapping[str, str]
    seed: int
    kind: str
    pixels: bool
    figures: Mapping[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def export_onnx(
    model: nn.Module,
    out: Path,
    *,
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
    images: Tensor,
    metadata: Mapping[str, str],
    seed: int = 0,
    kind: str = STUDENT,
    pixels: bool = False,
    figures: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Export a classifier; nothing is written unless it passes the gate.

    The graph takes float32 `images` (batch, C, H, W) in [0,1] and gives float32
    `logits` (batch, K) for any batch size; normalisation belongs inside the
    module. The module is copied and the copy put in eval mode; the caller's is
    not touched.

    Args:
        model: Images in [0,1] to logits.
        out: The file to write, ending in `.onnx`; an existing one is replaced, whole.
        image_shape: (C, H, W).
        classes: K names in the order of the logits.
        images: float32 (N, C, H, W) in [0,1]: real images for the gate, all used.
        metadata: More entries for the file's `metadata_props` (run ids, data set, ...).
        seed: Seeds the gate's noise images.
        kind: `"student"` or `"baseline"`.
        pixels: Give the graph a uint8 (batch, H, W, C) input instead, values 0..255.
        figures: What else was measured, for the manifest.

    Returns:
        Where it is and what it passed.

    Raises:
        DataError: The images are not of that kind.
        ExportError: The module or an argument does not fit, or cannot be exported.
        ParityError: The graph does not compute what the module computes.
    """
    about = _About(out, classes, images, metadata, seed, kind, pixels, figures or {})
    _check_request(about, image_shape)
    module = deepcopy(model).cpu().float().eval()
    _check_answers(module, images, len(classes))
    return _ship(trace(module, images, pixels=pixels), module, about)


def export_teacher(
    teacher: EPCNN,
    out: Path,
    *,
    sweeps: int,
    classes: Sequence[str],
    images: Tensor,
    metadata: Mapping[str, str],
    seed: int = 0,
    pixels: bool = False,
    figures: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Export a teacher's relaxation: a Loop of exactly `sweeps` sweeps for every image.

    Args:
        teacher: The model; it is relaxed by its own schedule, in float32, without looking
            at residuals.
        out: As for `export_onnx`, like all below but `sweeps`, and what is raised.
        sweeps: Sweeps from zero states, at least 1.
        classes: As there.
        images: As there.
        metadata: As there.
        seed: As there.
        pixels: As there.
        figures: As there.
    """
    from epdistill.export.relaxation_graph import relaxation_graph

    about = _About(out, classes, images, metadata, seed, TEACHER, pixels, figures or {})
    _check_request(about, (teacher.in_channels, teacher.image_size, teacher.image_size))
    if not 1 <= sweeps <= MAX_TRIPS:
        raise ExportError(f"received {sweeps} sweeps; expected 1 to {MAX_TRIPS}")
    schedule = teacher.schedule.with_(tolerance=0.0, sweeps=sweeps, precision="full")
    fixed = deepcopy(teacher).cpu().float().eval().with_schedule(schedule)
    _check_answers(fixed, images, len(classes))
    return _ship(relaxation_graph(fixed, pixels=pixels), fixed, about)


def _check_request(about: _About, image_shape: tuple[int, int, int]) -> None:
    if about.out.suffix != ".onnx" or about.out.is_dir():
        raise ExportError(f"received {about.out}; expected a file name ending in .onnx")
    check_images(about.images)
    if about.image_shape != tuple(image_shape):
        raise DataError(
            f"received images of shape {about.image_shape}; expected {tuple(image_shape)}, "
            "the shape the model is exported for"
        )


def _ship(proto: ModelProto, module: nn.Module, about: _About) -> ExportResult:
    """Check, compare, label and write a candidate."""
    loops = about.kind == TEACHER
    strip_traces(proto)
    own = own_labels(about.image_shape, about.classes, pixels=about.pixels, kind=about.kind)
    labels = merged(own, about.metadata)
    write_labels(proto, labels)
    check_proto(proto)
    source = f"the graph for {about.out}"
    candidate = OnnxClassifier(serialised(proto), source=source, loops=loops)
    parity = check_parity(
        module, candidate.run, about.images, seed=about.seed, bytes_only=about.pixels
    )

    write_labels(proto, {**labels, PARITY_KEY: parity_label(parity)})
    data = serialised(proto)
    final = OnnxClassifier(data, source=source, loops=loops)
    some = example(about.images).numpy()
    if not np.array_equal(final.run(some), candidate.run(some)):
        raise ParityError(
            f"{source} answers differently after it was labelled; nothing was written: "
            "expected the same bits"
        )
    manifest = Manifest(
        sha256=sha256_of(data),
        size_bytes=len(data),
        classes=final.classes,
        image_shape=final.input_shape,
        parity=parity.to_json(),
        metadata=final.metadata,
        kind=about.kind,
        figures=about.figures,
    )
    written = write_artifact(about.out, data, manifest)
    return ExportResult(about.out, manifest.sha256, len(data), parity, written)


def serialised(proto: ModelProto) -> bytes:
    """The bytes of a model, always the same ones.

    Raises:
        ExportError: They hold a path of this machine.
    """
    data: bytes = proto.SerializeToString(deterministic=True)
    leaked = local_paths(data)
    if leaked:
        raise ExportError(
            f"the graph or its metadata holds a path of this machine ({leaked[0]}); expected "
            "none in a file that is given away: leave it out of the metadata"
        )
    return data


def _check_answers(module: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse early what would only fail after seconds of exporting."""
    given = example(images)
    try:
        with torch.no_grad():
            answer = module(given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"the model fails on images of shape {tuple(given.shape)} ({one_line(error)}); "
            "expected a module that takes them"
        ) from error
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if shape != (len(given), classes):
        raise ExportError(
            f"the model answers {len(given)} images with {shape}; expected logits of shape "
            f"{(len(given), classes)}, one per class name"
        )


def check_proto(proto: ModelProto) -> None:
    """The exporter's promises, verified on what will be saved: valid, pinned opset, free batch.

    Raises:
        ExportError: One is broken.
    """
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is not valid ONNX ({one_line(error)}); "
            "expected one the checker accepts"
        ) from error
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("") != OPSET:
        raise ExportError(f"the exported graph has opsets {opsets}; expected version {OPSET}")
    for name, values in ((INPUT, proto.graph.input), (OUTPUT, proto.graph.output)):
        found = [
            (value.name, value.type.tensor_type.shape.dim[0].dim_param)
            for value in values
            if value.type.tensor_type.shape.dim
        ]
        if found != [(name, BATCH)]:
            raise ExportError(
                f"the exported graph has {found} for {name}; expected {[(name, BATCH)]}, a free "
                "batch: the model fixes its batch size, for example by reshaping to a constant"
            )
