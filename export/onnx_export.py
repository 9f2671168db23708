"""From a torch module to one self-contained ONNX file that passed the parity gate.

The candidate exists only in memory until it has passed: exported, stripped of
the exporter's stack traces, checked, opened by the same `OnnxClassifier` that
will serve it, and compared with the module. Then exactly those bytes are
written, and the manifest last. The same module gives the same bytes (for given
versions of torch and onnxscript), so a SHA-256 identifies a model.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from epdistill import __version__
from epdistill.errors import DataError, ExportError
from epdistill.export.graph import local_paths, strip_traces
from epdistill.export.manifest import Manifest, sha256_of, write_artifact
from epdistill.export.parity import ParityReport, check_images, check_parity
from epdistill.export.runtime import CLASSES_KEY, OnnxClassifier

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
SCHEMA_VERSION = "1"
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


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


def export_onnx(
    model: nn.Module,
    out: Path,
    *,
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
    images: Tensor,
    metadata: Mapping[str, str],
    seed: int = 0,
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

    Returns:
        Where it is and what it passed.

    Raises:
        DataError: The images are not of that kind.
        ExportError: The module or an argument does not fit, or cannot be exported.
        ParityError: The graph does not compute what the module computes.
    """
    if out.suffix != ".onnx" or out.is_dir():
        raise ExportError(f"received {out}; expected a file name ending in .onnx")
    check_images(images)
    if tuple(images.shape[1:]) != tuple(image_shape):
        raise DataError(
            f"received images of shape {tuple(images.shape[1:])}; expected {tuple(image_shape)}, "
            "the shape the model is exported for"
        )
    module = deepcopy(model).cpu().float().eval()
    _check_answers(module, images, len(classes))

    proto = _to_proto(module, images)
    strip_traces(proto)
    _write_metadata(proto, image_shape, classes, metadata)
    _check_proto(proto)
    data: bytes = proto.SerializeToString(deterministic=True)
    leaked = local_paths(data)
    if leaked:
        raise ExportError(
            f"the graph or its metadata holds a path of this machine ({leaked[0]}); expected "
            "none in a file that is given away: leave it out of the metadata"
        )

    classifier = OnnxClassifier(data, source=f"the graph for {out}")
    parity = check_parity(module, classifier.run, images, seed=seed)

    manifest = Manifest(
        sha256=sha256_of(data),
        size_bytes=len(data),
        classes=classifier.classes,
        image_shape=classifier.input_shape,
        parity=parity.to_json(),
        metadata=classifier.metadata,
    )
    written = write_artifact(out, data, manifest)
    return ExportResult(out, manifest.sha256, len(data), parity, written)


def _check_answers(module: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse early what would only fail after seconds of exporting."""
    example = _example(images)
    try:
        with torch.no_grad():
            answer = module(example)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"the model fails on images of shape {tuple(example.shape)} ({_one_line(error)}); "
            "expected a module that takes them"
        ) from error
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if shape != (len(example), classes):
        raise ExportError(
            f"the model answers {len(example)} images with {shape}; expected logits of shape "
            f"{(len(example), classes)}, one per class name"
        )


def _example(images: Tensor) -> Tensor:
    """Two images: a batch of one invites the tracer to treat the batch as constant."""
    return images.detach().cpu()[torch.tensor([0, -1])].contiguous()


def _to_proto(module: nn.Module, images: Tensor) -> ModelProto:
    """Run torch's exporter, silently; what it raises becomes one `ExportError`."""
    try:
        with _silence():
            program = torch.onnx.export(
                module,
                (_example(images),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                external_data=False,
                optimize=True,
                verbose=False,
            )
            if program is None:
                raise ExportError("torch.onnx.export returned nothing; expected a program")
            return program.model_proto
    except ExportError:
        raise
    except Exception as error:  # the exporter wraps whatever the module or a pass raised
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f"torch cannot export the model ({type(cause).__name__}: {_one_line(cause)}); "
            "expected a module without data-dependent control flow whose batch size is free"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress, logs and warnings off the terminal; errors still raise."""
    previous = logging.root.manager.disable
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= 200 else text[:197] + "..."


def _write_metadata(
    proto: ModelProto,
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
    metadata: Mapping[str, str],
) -> None:
    """Set the model's `metadata_props`, sorted by key.

    The `Image.*` keys are those of the ONNX specification (docs/MetadataProps.md).
    """
    own = {
        "epdistill.schema": SCHEMA_VERSION,
        "epdistill.version": __version__,
        CLASSES_KEY: json.dumps(list(classes)),
        "epdistill.input_layout": "NCHW",
        "epdistill.input_range": "[0, 1]",
        "Image.NominalPixelRange": "Normalized_0_1",
    }
    pixels = {1: "Gray8", 3: "Rgb8"}.get(image_shape[0])
    if pixels is not None:
        own["Image.BitmapPixelFormat"] = pixels
    taken = sorted(own.keys() & metadata.keys())
    if taken:
        raise ExportError(
            f"received metadata for {taken[0]!r}, which the export writes itself; "
            "expected other keys: rename it"
        )
    for key, value in metadata.items():
        if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute():
            raise ExportError(
                f"received metadata {key!r} with the absolute path {value}; expected none in a "
                "file that is given away: leave it out"
            )
    del proto.metadata_props[:]
    for key, value in sorted({**own, **metadata}.items()):
        proto.metadata_props.add(key=key, value=value)


def _check_proto(proto: ModelProto) -> None:
    """The exporter's promises, verified on what will be saved: valid, pinned opset, free batch."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is not valid ONNX ({_one_line(error)}); "
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
