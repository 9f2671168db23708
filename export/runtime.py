"""An exported file on onnxruntime: checked first, on the CPU, one input, one output.

The bytes are read once. They are compared with the manifest (`open_checked`),
parsed and judged (`epdistill.export.graph`), and the same bytes go to
onnxruntime, so nothing can be swapped in between.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from epdistill.errors import DataError, ExportError
from epdistill.export.graph import MAX_BYTES, parse_checked
from epdistill.export.manifest import manifest_path, read_manifest, verify

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto
    from torch import Tensor

# onnxruntime's official builds report to a collector unless this is set before
# the library initialises, which is why it is set here too and not only by the
# package, and why onnxruntime is imported late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

CLASSES_KEY = "epdistill.classes"

Array = npt.NDArray[np.float32]


def available_cores() -> int:
    """Cores this process may run on (a container's share, where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OnnxClassifier:
    """A classifier in an ONNX file: images in [0,1] to logits, on CPU threads.

    Any self-contained ONNX image classifier will do: one float32 input
    (batch, C, H, W) with a free batch and fixed C, H, W, one float32 output
    (batch, K). Without class names in its metadata the classes are "0".."K-1".

    Args:
        data: The bytes of the file; `open` and `open_checked` read them from a path.
        source: How messages call it.
        threads: Threads inside an operator; all available cores when None. Operators
            run one after the other, and waiting threads sleep instead of spinning,
            which on a shared machine takes time from the work itself.

    Attributes:
        classes: Names of the K classes in the order of the logits.
        input_shape: (C, H, W) of one image.
        metadata: The file's `metadata_props`.
        source: As given.
        threads: As used.

    Raises:
        ExportError: The bytes are not such a model, or hold what is refused
            (see `epdistill.export.graph.parse_checked`).
    """

    def __init__(self, data: bytes, *, source: str, threads: int | None = None) -> None:
        threads = available_cores() if threads is None else threads
        if threads < 1:
            raise ExportError(f"received {threads} threads; expected at least 1")
        proto = parse_checked(data, source)
        self.source = source
        self.threads = threads
        self.metadata: dict[str, str] = {item.key: item.value for item in proto.metadata_props}
        self._input, self.input_shape = _image_input(proto, source)
        self._output, outputs = _logits_output(proto, source)
        self.classes: tuple[str, ...] = _classes(self.metadata, outputs, source)
        self._session = _session(data, source, threads)

    @classmethod
    def open(cls, path: Path, *, threads: int | None = None) -> OnnxClassifier:
        """Open a file without looking at a manifest."""
        return cls(_read(path), source=str(path), threads=threads)

    @classmethod
    def open_checked(cls, path: Path, *, threads: int | None = None) -> OnnxClassifier:
        """Open a file; where a manifest stands beside it, its SHA-256 must match.

        Raises:
            ExportError: The file or its manifest is missing, damaged or not acceptable.
        """
        data = _read(path)
        beside = manifest_path(path)
        if beside.exists():
            verify(data, read_manifest(beside), str(path))
        return cls(data, source=str(path), threads=threads)

    def run(self, images: Array) -> Array:
        """Logits of a batch.

        Args:
            images: float32 (N, C, H, W), meant to be in [0,1] (not looked at here:
                a NaN goes in and comes out).

        Returns:
            float32 (N, K).

        Raises:
            DataError: Another dtype or shape than the model takes.
            ExportError: onnxruntime failed on this batch.
        """
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != self.input_shape:
            expected = ", ".join(str(size) for size in self.input_shape)
            raise DataError(
                f"received {images.dtype} images of shape {tuple(images.shape)}; {self.source} "
                f"expects float32 of shape (N, {expected}), values in [0, 1]: convert or resize"
            )
        try:
            (logits,) = self._session.run(
                [self._output], {self._input: np.ascontiguousarray(images)}
            )
        except Exception as error:  # onnxruntime's errors share no other base
            raise ExportError(
                f"{self.source} failed on a batch of {len(images)} ({_one_line(error)}); "
                "expected a graph that takes any batch size: export it again"
            ) from error
        result: Array = logits
        return result

    @overload
    def __call__(self, images: Array) -> Array: ...
    @overload
    def __call__(self, images: Tensor) -> Tensor: ...
    def __call__(self, images: Array | Tensor) -> Array | Tensor:
        """`run` for numpy arrays and torch tensors; a tensor's answer is on its device.

        The answer carries no gradient: onnxruntime has none.
        """
        if isinstance(images, np.ndarray):
            return self.run(images)
        import torch

        logits = self.run(images.detach().cpu().numpy())
        return torch.from_numpy(logits).to(images.device)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:  # before it fills the memory
            raise ExportError(
                f"{path} has {size} bytes; expected at most {MAX_BYTES}: export a smaller model"
            )
        return path.read_bytes()
    except OSError as error:
        raise ExportError(
            f"cannot read {path} ({error.strerror or error}); expected an .onnx file: "
            "type `epdistill export` first, or name another file"
        ) from error


def _session(data: bytes, source: str, threads: int) -> Any:
    """An onnxruntime session on exactly these bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, once, not also printed
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no other base
        raise ExportError(
            f"{source} is not a valid ONNX model ({_one_line(error)}); export it again"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _sizes(value: ValueInfoProto) -> tuple[int | None, ...]:
    """The declared dimensions; None for one that is free."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _is_float32(value: ValueInfoProto) -> bool:
    from onnx import TensorProto

    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _only(values: Sequence[ValueInfoProto], what: str, source: str) -> ValueInfoProto:
    if len(values) != 1:
        names = ", ".join(value.name for value in values)
        raise ExportError(
            f"{source} has {len(values)} {what}s ({names}); expected one: export a classifier"
        )
    return values[0]


def _image_input(proto: ModelProto, source: str) -> tuple[str, tuple[int, int, int]]:
    """Name and (C, H, W) of the only input."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    real = [value for value in proto.graph.input if value.name not in weights]
    value = _only(real, "input", source)
    match _sizes(value):
        case (None, int(channels), int(height), int(width)) if _is_float32(value):
            return value.name, (channels, height, width)
        case (int(batch), _, _, _):
            raise ExportError(
                f"{source} takes batches of exactly {batch}; expected a free batch dimension: "
                "export it again with a dynamic batch"
            )
        case sizes:
            raise ExportError(
                f"{source} has the input {value.name} with dimensions {_shown(sizes)}; expected "
                "float32 (batch, C, H, W) with fixed C, H, W: export an image classifier"
            )


def _logits_output(proto: ModelProto, source: str) -> tuple[str, int]:
    """Name and number of classes of the only output."""
    value = _only(proto.graph.output, "output", source)
    match _sizes(value):
        case (None, int(classes)) if _is_float32(value):
            return value.name, classes
        case (int(batch), _):
            raise ExportError(
                f"{source} answers batches of exactly {batch}; expected a free batch dimension: "
                "export it again with a dynamic batch"
            )
        case sizes:
            raise ExportError(
                f"{source} has the output {value.name} with dimensions {_shown(sizes)}; expected "
                "float32 (batch, K) logits: export a classifier"
            )


def _shown(sizes: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in sizes) + ")"


def _classes(metadata: dict[str, str], outputs: int, source: str) -> tuple[str, ...]:
    if CLASSES_KEY not in metadata:
        return tuple(str(number) for number in range(outputs))
    try:
        names = json.loads(metadata[CLASSES_KEY])
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError(
            f"{source} has unreadable metadata {CLASSES_KEY}; expected a JSON list of names: "
            "export it again"
        )
    if len(names) != outputs:
        raise ExportError(
            f"{source} names {len(names)} classes for {outputs} logits; expected one name per logit"
        )
    return tuple(names)
