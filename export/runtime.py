"""An exported file on onnxruntime: checked first, on the CPU, one input, one output.

The bytes are read once. They are compared with the manifest (`open_checked`),
parsed and judged (`epdistill.export.graph`), and the same bytes go to
onnxruntime, so nothing can be swapped in between.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from epdistill.errors import DataError, ExportError
from epdistill.export.graph import MAX_BYTES, parse_checked
from epdistill.export.manifest import TEACHER, manifest_path, read_manifest, verify
from epdistill.export.signature import read_signature

if TYPE_CHECKING:
    from torch import Tensor

# onnxruntime's official builds report to a collector unless this is set before
# the library initialises, which is why it is set here too and not only by the
# package, and why onnxruntime is imported late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

DEFAULT_PROVIDER = "CPUExecutionProvider"

Array = npt.NDArray[np.float32]


def available_cores() -> int:
    """Cores this process may run on (a container's share, where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OnnxClassifier:
    """A classifier in an ONNX file: images in [0,1] to logits, on CPU threads.

    Any self-contained ONNX image classifier will do: one input, float32
    (batch, C, H, W) or uint8 (batch, H, W, C), with a free batch and fixed C, H, W, one
    float32 output (batch, K). Without class names in its metadata the classes are
    "0".."K-1".

    Args:
        data: The bytes of the file; `open` and `open_checked` read them from a path.
        source: How messages call it.
        threads: Threads inside an operator; all available cores when None. Operators
            run one after the other, and waiting threads sleep instead of spinning,
            which on a shared machine takes time from the work itself.
        loops: Allow a relaxation's loop (see `epdistill.export.graph.parse_checked`).
        providers: onnxruntime's execution providers, the preferred one first.

    Attributes:
        signature: What the graph takes and gives.
        classes: Names of the K classes in the order of the logits.
        input_shape: (C, H, W) of one image.
        metadata: The file's `metadata_props`.
        source: As given.
        threads: As used.

    Raises:
        ExportError: The bytes are not such a model, or hold what is refused
            (see `epdistill.export.graph.parse_checked`).
    """

    def __init__(
        self,
        data: bytes,
        *,
        source: str,
        threads: int | None = None,
        loops: bool = False,
        providers: Sequence[str] = (DEFAULT_PROVIDER,),
    ) -> None:
        threads = available_cores() if threads is None else threads
        if threads < 1:
            raise ExportError(f"received {threads} threads; expected at least 1")
        proto = parse_checked(data, source, loops=loops)
        self.source = source
        self.threads = threads
        self.metadata: dict[str, str] = {item.key: item.value for item in proto.metadata_props}
        self.signature = read_signature(proto, source)
        self.input_shape = self.signature.image_shape
        self.classes = self.signature.classes
        self._session = _session(data, source, threads, providers)

    @classmethod
    def open(cls, path: Path, *, threads: int | None = None) -> OnnxClassifier:
        """Open a file without looking at a manifest."""
        return cls(_read(path), source=str(path), threads=threads)

    @classmethod
    def open_checked(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (DEFAULT_PROVIDER,),
        require_manifest: bool = False,
    ) -> OnnxClassifier:
        """Open a file; where a manifest stands beside it, its SHA-256 must match.

        Only a manifest that says so makes a file a teacher's, which may hold a loop.

        Args:
            path: The file.
            threads: As for the class.
            providers: As for the class.
            require_manifest: Refuse a file that has none.

        Raises:
            ExportError: The file or its manifest is missing, damaged or not acceptable.
        """
        data = _read(path)
        beside, loops = manifest_path(path), False
        if require_manifest or beside.exists():
            manifest = read_manifest(beside)
            verify(data, manifest, str(path))
            loops = manifest.kind == TEACHER
        return cls(data, source=str(path), threads=threads, loops=loops, providers=providers)

    def run(self, images: Array) -> Array:
        """Logits of a batch.

        Args:
            images: float32 (N, C, H, W), meant to be in [0,1] (not looked at here:
                a NaN goes in and comes out). A graph that takes bytes is shown the
                nearest ones, and NaN is refused.

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
        return self.run_feed(self.feed(images))

    def run_feed(self, feed: Mapping[str, npt.NDArray[Any]]) -> Array:
        """Logits (N, K) for what `feed` gives, or for tensors made the same way.

        Raises:
            ExportError: onnxruntime failed on this batch.
        """
        try:
            (logits,) = self._session.run([self.signature.output], feed)
        except Exception as error:  # onnxruntime's errors share no other base
            size = len(feed[self.signature.input])
            raise ExportError(
                f"{self.source} failed on a batch of {size} ({_one_line(error)}); "
                "expected a graph that takes any batch size: export it again"
            ) from error
        result: Array = logits
        return result

    def feed(self, images: Array) -> dict[str, npt.NDArray[Any]]:
        """What onnxruntime is given for float32 (N, C, H, W) images, by input name."""
        if not self.signature.pixels:
            return {self.signature.input: np.ascontiguousarray(images)}
        if np.isnan(images).any():
            raise DataError(f"received images with NaN; {self.source} takes bytes: leave them out")
        pixels = np.rint(np.clip(images, 0, 1) * np.float32(255)).astype(np.uint8)
        return {self.signature.input: np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))}

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


def _session(data: bytes, source: str, threads: int, providers: Sequence[str]) -> Any:
    """An onnxruntime session on exactly these bytes."""
    import onnxruntime

    known = onnxruntime.get_available_providers()
    for provider in providers:
        if provider not in known:
            raise ExportError(
                f"received execution provider {provider}; expected one of {', '.join(known)}, "
                "which this build of onnxruntime has: install another build, or choose among them"
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, once, not also printed
    try:
        session = onnxruntime.InferenceSession(data, options, providers=list(providers))
    except Exception as error:  # onnxruntime's errors share no other base
        raise ExportError(
            f"{source} is not a valid ONNX model ({_one_line(error)}); export it again"
        ) from error
    # Where a provider cannot start, onnxruntime goes on without it and says so in a log at most.
    used = session.get_providers()
    if used[: len(providers)] != list(providers):
        raise ExportError(
            f"{source} would run on {', '.join(used)}; expected {', '.join(providers)}: "
            "mend what keeps it from starting, or choose another provider"
        )
    return session


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
