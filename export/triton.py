"""A model repository for Triton, and so for KServe, around an exported file.

    <repository>/<model>/config.pbtxt    what Triton is told
    <repository>/<model>/labels.txt      the classes, one a line
    <repository>/<model>/1/model.onnx    the file that passed the gate, byte for byte
    <repository>/<model>/1/model.json    its manifest, which Triton does not read

The queue is bounded and requests have a deadline, as in `epdistill serve`: Triton's own
defaults have neither. docs/triton.md says how to run it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epdistill.errors import ExportError
from epdistill.export.manifest import (
    INT8,
    TEACHER,
    Manifest,
    manifest_path,
    read_manifest,
    sha256_of,
    verify,
)
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.serving.settings import Limits
from epdistill.export.signature import Signature

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "model.onnx"
# Letters that no file system, URL or text format minds.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TritonModel:
    """One model of a repository.

    Attributes:
        name: Its folder's name, and its name in requests.
        config: The path of `config.pbtxt`.
        onnx: The path of the model file.
        sha256: Hex digest of that, read back.
        validated: Triton's protobuf has parsed the text; False where it is not installed.
    """

    name: str
    config: Path
    onnx: Path
    sha256: str
    validated: bool


def write_models(
    files: Sequence[Path], repository: Path, *, limits: Limits | None = None
) -> tuple[TritonModel, ...]:
    """Write a repository, or add to one: a model per exported file, named as the file.

    Args:
        files: `.onnx` files with their manifests.
        repository: The folder; it need not exist. A model of the same name is replaced.
        limits: `batch`, `delay`, `queue` (here in requests) and `deadline` become Triton's.

    Raises:
        ExportError: A file is not the one that its manifest vouches for, has a name that
            Triton does not take, or the folder cannot be written.
    """
    return tuple(_write(file, repository, limits or Limits()) for file in files)


def _write(file: Path, repository: Path, limits: Limits) -> TritonModel:
    from epdistill.runs import atomic_write

    name = file.stem
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"received the model name {name!r}; expected letters, digits, _ . - for Triton: "
            "choose another file name with --out"
        )
    data, manifest = _verified(file)
    loops = manifest.kind == TEACHER
    classifier = OnnxClassifier(data, source=str(file), threads=1, loops=loops)
    config = config_text(name, classifier.signature, manifest, limits)
    validated = validate(config)
    folder = repository / name
    version = folder / "1"
    try:
        version.mkdir(parents=True, exist_ok=True)
        atomic_write(version / MODEL, data)
        atomic_write(manifest_path(version / MODEL), manifest_path(file).read_bytes())
        atomic_write(folder / LABELS, labels_text(classifier.classes))
        # Last: without it there is no model for Triton.
        atomic_write(folder / CONFIG, config)
        written = sha256_of((version / MODEL).read_bytes())
    except OSError as error:
        raise ExportError(
            f"cannot write {folder} ({error.strerror or error}); expected a writable folder: "
            "choose another place with --out"
        ) from error
    if written != manifest.sha256:
        raise ExportError(
            f"{version / MODEL} reads back with SHA-256 {written[:12]}..., expected "
            f"{manifest.sha256[:12]}...: check the disk and export again"
        )
    return TritonModel(name, folder / CONFIG, version / MODEL, written, validated)


def _verified(file: Path) -> tuple[bytes, Manifest]:
    manifest = read_manifest(manifest_path(file))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ExportError(
            f"cannot read {file} ({error.strerror or error}); expected an exported file"
        ) from error
    verify(data, manifest, str(file))
    return data, manifest


def config_text(name: str, signature: Signature, manifest: Manifest, limits: Limits) -> str:
    """The text of `config.pbtxt`; dimensions go without the batch, which Triton adds.

    Args:
        name: Of the model.
        signature: Of its graph.
        manifest: What is known about it.
        limits: As for `write_models`.
    """
    channels, height, width = signature.image_shape
    if signature.pixels:
        kind, layout, dims = "TYPE_UINT8", "FORMAT_NHWC", (height, width, channels)
    else:
        kind, layout, dims = "TYPE_FP32", "FORMAT_NCHW", (channels, height, width)
    # What int8 gains it gains on processors.
    place = "KIND_CPU" if manifest.precision == INT8 else "KIND_AUTO"
    return f"""\
# {manifest.kind}, {manifest.precision}, SHA-256 {manifest.sha256}
name: "{name}"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
default_model_filename: "{MODEL}"
version_policy {{ specific {{ versions: [ 1 ] }} }}
max_batch_size: {limits.batch}
input [
  {{
    name: "{signature.input}"
    data_type: {kind}
    format: {layout}
    dims: [ {", ".join(map(str, dims))} ]
  }}
]
output [
  {{
    name: "{signature.output}"
    data_type: TYPE_FP32
    dims: [ {len(signature.classes)} ]
    label_filename: "{LABELS}"
  }}
]
instance_group [ {{ kind: {place} count: 1 }} ]
dynamic_batching {{
  max_queue_delay_microseconds: {round(1e6 * limits.delay)}
  default_queue_policy {{
    # What waits longer, or finds so many requests waiting, is refused.
    timeout_action: REJECT
    default_timeout_microseconds: {round(1e6 * limits.deadline)}
    max_queue_size: {limits.queue}
  }}
}}
"""


def labels_text(classes: Sequence[str]) -> str:
    """The classes, one a line; what would break a line becomes a space."""
    return "".join(" ".join(name.split()) + "\n" for name in classes)


def validate(config: str) -> bool:
    """Have Triton's protobuf parse a configuration.

    Returns:
        Whether it did: False where `tritonclient` or `grpcio` is not installed.

    Raises:
        ExportError: It is not a model configuration.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, TypeError):  # TypeError: made for another protobuf
        return False
    try:
        text_format.Parse(config, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(
            f"the Triton configuration is not one ({error}); nothing was written"
        ) from error
    return True
