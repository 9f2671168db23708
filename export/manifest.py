"""The manifest: a JSON file beside the model that says what was shipped and what it passed.

`model.onnx` has `model.json`, and the card `model.md` that tells people the same. The
model is written first and the manifest last, so a manifest vouches only for a file
that is complete; a reader compares the SHA-256 and refuses a file that was changed,
cut or mixed up. The manifest's own damage shows in its seal, a digest of all its other
entries. The keys are documented in docs/export.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from epdistill.errors import ExportError

FORMAT_VERSION = 1
STUDENT, BASELINE, TEACHER = "student", "baseline", "teacher"
FLOAT32, INT8, FLOAT16 = "float32", "int8", "float16"


@dataclass(frozen=True)
class Manifest:
    """What is known about one exported file.

    Attributes:
        sha256: Hex digest of the file's bytes.
        size_bytes: Its length.
        classes: Names of the classes, in the order of the logits.
        image_shape: (C, H, W) of one image.
        parity: The figures of the gate it passed, see `ParityReport.to_json`.
        metadata: The `metadata_props` inside the file.
        kind: `"student"`, `"baseline"` or `"teacher"`; a teacher's file may hold a loop.
        precision: `"float32"`, `"int8"` or `"float16"`: what most of the file computes in.
        figures: What else was measured: accuracy, robustness, the loss by quantisation.
    """

    sha256: str
    size_bytes: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    parity: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    kind: str = STUDENT
    precision: str = FLOAT32
    figures: Mapping[str, Any] = field(default_factory=dict)


def sha256_of(data: bytes) -> str:
    """The hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def seal_of(content: Mapping[str, Any]) -> str:
    """The hex SHA-256 of a manifest's entries but the seal itself, as sorted compact JSON."""
    entries = {key: value for key, value in content.items() if key != "seal"}
    return sha256_of(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())


def manifest_path(model: Path) -> Path:
    """Where the manifest of a model file stands: `<stem>.json` in the same folder."""
    return model.with_suffix(".json")


def card_path(model: Path) -> Path:
    """Where the card of a model file stands: `<stem>.md` in the same folder."""
    return model.with_suffix(".md")


def write_artifact(path: Path, data: bytes, manifest: Manifest) -> Path:
    """Write a model file, its card and then its manifest, each atomically.

    Args:
        path: The model file; its folder is created where needed.
        data: Exactly the bytes that passed the gate.
        manifest: Speaks of these bytes.

    Returns:
        The manifest's path.

    Raises:
        ExportError: The manifest speaks of other bytes, or the place cannot be written.
    """
    # Brings torch, which readers do not need.
    from epdistill.runs import atomic_write

    if manifest.sha256 != sha256_of(data):
        raise ExportError(f"the manifest for {path} speaks of other bytes; expected their SHA-256")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error
    return write_manifest(path, manifest)


def write_manifest(path: Path, manifest: Manifest) -> Path:
    """Write the card and the manifest of the model file `path`; the manifest's path.

    Raises:
        ExportError: The place cannot be written.
    """
    from epdistill.export.card import card
    from epdistill.runs import atomic_write, write_json

    beside = manifest_path(path)
    try:
        atomic_write(card_path(path), card(manifest, path.name))
        content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
        # As it will be read: JSON knows lists only, and names in text.
        content = json.loads(json.dumps(content))
        write_json(beside, {**content, "seal": seal_of(content)})
    except OSError as error:
        raise _unwritable(path, error) from error
    return beside


def _unwritable(path: Path, error: OSError) -> ExportError:
    return ExportError(
        f"cannot write {path} ({error.strerror or error}); expected a writable folder: "
        "choose another place"
    )


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ExportError: Missing, damaged, edited, of another version, or some other JSON file.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: bad JSON, bad UTF-8
        raise ExportError(
            f"the manifest {path} cannot be read ({error}); export the model again"
        ) from error
    if isinstance(content, dict) and content.get("format_version", FORMAT_VERSION) != (
        FORMAT_VERSION
    ):
        raise ExportError(
            f"the manifest {path} has format version {content['format_version']!r}; this epdistill "
            f"reads version {FORMAT_VERSION}: use the epdistill that wrote it"
        )
    # Files exported before there were seals have none.
    if isinstance(content, dict) and content.get("seal", sealed := seal_of(content)) != sealed:
        raise ExportError(
            f"the manifest {path} is damaged or was edited: its seal does not fit its entries; "
            "restore the file or export again"
        )
    try:
        channels, height, width = (int(size) for size in content["image_shape"])
        return Manifest(
            sha256=str(content["sha256"]),
            size_bytes=int(content["size_bytes"]),
            classes=tuple(str(name) for name in content["classes"]),
            image_shape=(channels, height, width),
            parity=dict(content["parity"]),
            metadata={str(key): str(value) for key, value in content["metadata"].items()},
            kind=str(content.get("kind", STUDENT)),
            precision=str(content.get("precision", FLOAT32)),
            figures=dict(content.get("figures", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"{path} is not the manifest of an exported model (bad or missing entry: {error}); "
            "export the model again, or move that file away"
        ) from error


def verify(data: bytes, manifest: Manifest, source: str) -> None:
    """Refuse bytes that are not the ones the manifest vouches for.

    Raises:
        ExportError: The length or the SHA-256 differs.
    """
    found = sha256_of(data)
    if found != manifest.sha256 or len(data) != manifest.size_bytes:
        raise ExportError(
            f"{source} is damaged or was replaced: {len(data)} bytes with SHA-256 {found[:12]}..., "
            f"its manifest says {manifest.size_bytes} bytes with {manifest.sha256[:12]}...; "
            "restore the file or export again"
        )
