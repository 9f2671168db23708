"""From files to models that may be served: verified, opened, named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epdistill.errors import ExportError
from epdistill.export.manifest import Manifest, manifest_path, read_manifest
from epdistill.export.runtime import DEFAULT_PROVIDER, OnnxClassifier

VERSION = "1"


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that requests give.

    Attributes:
        name: Its place in URLs.
        classifier: The verified file on onnxruntime.
        manifest: What vouches for the file.
    """

    name: str
    classifier: OnnxClassifier
    manifest: Manifest

    @property
    def datatype(self) -> str:
        """The protocol's name for the type of the input."""
        return "UINT8" if self.classifier.signature.pixels else "FP32"

    @property
    def dtype(self) -> npt.DTypeLike:
        """The input's type in numpy, little-endian as on the wire."""
        return np.dtype("u1" if self.classifier.signature.pixels else "<f4")

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """The input's dimensions after the batch: (C, H, W), or (H, W, C) for bytes."""
        channels, height, width = self.classifier.input_shape
        pixels = self.classifier.signature.pixels
        return (height, width, channels) if pixels else (channels, height, width)


def load_models(
    paths: Sequence[Path],
    *,
    threads: int | None = None,
    providers: Sequence[str] = (DEFAULT_PROVIDER,),
) -> Mapping[str, ServedModel]:
    """Open model files, each vouched for by the manifest beside it.

    Args:
        paths: `.onnx` files.
        threads: As for `OnnxClassifier`.
        providers: As for `OnnxClassifier`.

    Returns:
        The models by name, in the order given.

    Raises:
        ExportError: A file or its manifest is missing, damaged or not acceptable, or two
            files would have one name.
    """
    models = {}
    for path, name in zip(paths, names(paths), strict=True):
        classifier = OnnxClassifier.open_checked(
            path, threads=threads, providers=providers, require_manifest=True
        )
        models[name] = ServedModel(name, classifier, read_manifest(manifest_path(path)))
    return models


def names(paths: Sequence[Path]) -> list[str]:
    """What the models of these files are called: the file's stem.

    Where several stems are equal, the folder's name goes before: `digits-resnet18-001-model`.

    Raises:
        ExportError: Two names are equal even so.
    """
    stems = Counter(path.stem for path in paths)
    chosen = [
        path.stem if stems[path.stem] == 1 else f"{path.absolute().parent.name}-{path.stem}"
        for path in paths
    ]
    for name, count in Counter(chosen).items():
        if count > 1:
            raise ExportError(
                f"received {count} models called {name}; expected names that differ: "
                "rename a file (and its manifest)"
            )
    return chosen


def newest_export(runs: Path) -> Path:
    """The exported file under `runs` whose manifest was written last; a `model.onnx` if any.

    Raises:
        ExportError: There is none.
    """
    # `model.onnx` before its reduced copies beside it.
    for pattern in ("*/model.onnx", "*/*.onnx"):
        found = [path for path in runs.glob(pattern) if manifest_path(path).is_file()]
        if found:
            break
    else:
        raise ExportError(
            f"no exported model under {runs}; expected one: type `epdistill export` first, "
            "name an .onnx file, or `shipped` for the one that comes with the package"
        )
    return max(found, key=lambda path: (manifest_path(path).stat().st_mtime_ns, str(path)))
