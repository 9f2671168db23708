"""What int8 and float16 files have in common: judged against the float32 file, then written.

Parity in the sense of rounding cannot be asked of them. What is asked: the share of right
answers on validation images falls by no more than a bound, every answer is finite, and an
image's answer does not depend on the batch it comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from epdistill.errors import ExportError, ParityError
from epdistill.export.graph import strip_traces
from epdistill.export.labelling import MEASURED, QUANTISATION_KEY, text, write_labels
from epdistill.export.manifest import (
    TEACHER,
    Manifest,
    manifest_path,
    read_manifest,
    sha256_of,
    verify,
    write_artifact,
)
from epdistill.export.onnx_export import check_proto, serialised
from epdistill.export.predict import softmax
from epdistill.export.runtime import Array, OnnxClassifier

if TYPE_CHECKING:
    from onnx import ModelProto

BATCH_SIZE = 128
# Of the largest range of an image's logits: what a batch may change in an answer.
BATCH_ATOL = 1e-3

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """A reduced file against the float32 one, on the same labelled images.

    Attributes:
        float_accuracy: Share of right answers of the float32 file.
        accuracy: That of the reduced one.
        agreement: Share of equal labels.
        divergence: Mean Kullback-Leibler divergence of its probabilities from the float32
            file's, in nats.
        images: How many.
    """

    float_accuracy: float
    accuracy: float
    agreement: float
    divergence: float
    images: int

    @property
    def drop_points(self) -> float:
        """Points of top-1 accuracy lost; negative where it gained."""
        return 100 * (self.float_accuracy - self.accuracy)


@dataclass(frozen=True)
class Reduced:
    """A reduced file in memory.

    Attributes:
        proto: The model.
        precision: `"int8"` or `"float16"`.
        setting: How it was made.
        judged: What it lost.
        trials: What else was tried, with its figures; the chosen one among them.
    """

    proto: ModelProto
    precision: str
    setting: Mapping[str, Any]
    judged: Judged
    trials: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class ReducedResult:
    """A reduced file that was written.

    Attributes:
        path: The `.onnx` file.
        manifest: What the JSON beside it says.
    """

    path: Path
    manifest: Manifest


def read_source(path: Path) -> tuple[bytes, Manifest]:
    """The bytes and the manifest of an exported float32 file of a feedforward network.

    Raises:
        ExportError: It is something else, damaged, or has no manifest.
    """
    manifest = read_manifest(manifest_path(path))
    data = path.read_bytes()
    verify(data, manifest, str(path))
    if manifest.kind == TEACHER:
        raise ExportError(
            f"{path} is a teacher's relaxation, which rounding would take to other states; "
            "expected a feedforward network: distill a student and export that"
        )
    return data, manifest


def logits_of(classifier: OnnxClassifier, images: Array) -> Array:
    """Logits (N, K) of images (N, C, H, W), in batches."""
    parts = [
        classifier.run(images[start : start + BATCH_SIZE])
        for start in range(0, len(images), BATCH_SIZE)
    ]
    return np.concatenate(parts)


def judge(before: Array, after: Array, labels: Labels) -> Judged:
    """Compare the logits (N, K) of the float32 file and of a reduced one.

    Raises:
        ParityError: The reduced one gives something that is not finite.
    """
    if not np.isfinite(after).all():
        raise ParityError("the reduced file gives non-finite logits; nothing was written")
    true, found = softmax(before), softmax(after)
    tiny = np.finfo(np.float64).tiny
    divergence = (true * (np.log(true + tiny) - np.log(found + tiny))).sum(axis=1).mean()
    first, second = before.argmax(1), after.argmax(1)
    return Judged(
        float_accuracy=float((first == labels).mean()),
        accuracy=float((second == labels).mean()),
        agreement=float((first == second).mean()),
        divergence=float(divergence),
        images=len(labels),
    )


def check_sound(classifier: OnnxClassifier, images: Array, *, seed: int) -> None:
    """Finite answers to noise and extremes too, and the same ones in batches of other sizes.

    Raises:
        ParityError: Not so.
    """
    noise = np.random.default_rng(seed).random((8, *classifier.input_shape), dtype=np.float32)
    extremes = np.stack([np.zeros_like(noise[0]), np.ones_like(noise[0])])
    pool = np.concatenate([noise, extremes, images[:8]])
    whole = classifier.run(pool)
    if not np.isfinite(whole).all():
        raise ParityError("the reduced file gives non-finite logits; nothing was written")
    bound = BATCH_ATOL * float((whole.max(axis=1) - whole.min(axis=1)).max())
    for size in (1, 7):
        found = float(np.abs(classifier.run(pool[:size]) - whole[:size]).max())
        if found > bound:
            raise ParityError(
                f"the reduced file answers differently in a batch of {size} (by {found:.3g}, "
                f"expected at most {bound:.3g}); nothing was written"
            )


def finished(proto: ModelProto, labels: Mapping[str, str]) -> bytes:
    """The bytes of a reduced model: stripped, labelled, checked."""
    strip_traces(proto)
    used = {node.domain for node in proto.graph.node} | {"", "ai.onnx"}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    # onnxruntime's optimiser declares every domain that it knows.
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    write_labels(proto, labels)
    check_proto(proto)
    return serialised(proto)


def ship(
    reduced: Reduced,
    out: Path,
    source: Manifest,
    images: Array,
    *,
    max_drop: float,
    seed: int = 0,
) -> ReducedResult:
    """Write a reduced file beside a manifest that says what it lost.

    Args:
        reduced: The file.
        out: Where to.
        source: The manifest of the float32 file.
        images: Validation images (N, C, H, W) in [0,1].
        max_drop: The most points of top-1 accuracy it may have lost.
        seed: Seeds the noise images of the last check.

    Raises:
        ParityError: It lost more, or misbehaves; nothing is written.
    """
    judged = reduced.judged
    if judged.drop_points > max_drop:
        raise ParityError(
            f"{reduced.precision}: top-1 falls by {judged.drop_points:.2f} points on "
            f"{judged.images} validation images ({100 * judged.float_accuracy:.2f} to "
            f"{100 * judged.accuracy:.2f} %), expected at most {max_drop:g}; nothing was written: "
            "allow more with --max-drop, or ship the float32 file"
        )
    origin = {"precision": reduced.precision, "source_sha256": source.sha256, **reduced.setting}
    kept = {key: value for key, value in source.metadata.items() if key not in MEASURED}
    data = finished(reduced.proto, {**kept, QUANTISATION_KEY: text(origin)})
    classifier = OnnxClassifier(data, source=f"the {reduced.precision} graph for {out}")
    check_sound(classifier, images, seed=seed)
    figures = {
        "quantisation": {
            "source_sha256": source.sha256,
            "images": judged.images,
            "float_accuracy": judged.float_accuracy,
            "accuracy": judged.accuracy,
            "drop_points": judged.drop_points,
            "max_drop_points": max_drop,
            "agreement": judged.agreement,
            "divergence": judged.divergence,
            "size_ratio": source.size_bytes / len(data),
            "setting": dict(reduced.setting),
            "trials": [dict(trial) for trial in reduced.trials],
        },
    }
    manifest = replace(
        source,
        sha256=sha256_of(data),
        size_bytes=len(data),
        parity={},
        metadata=classifier.metadata,
        precision=reduced.precision,
        figures=figures,
    )
    write_artifact(out, data, manifest)
    return ReducedResult(out, manifest)
