"""What was measured of a run after its training: attacks, exported files, timings.

Nothing is computed here: it is looked up in results.json, manifests and bench.json.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epdistill.errors import EpdistillError, EvaluationError
from epdistill.runs import Run
from epdistill.sealed import read_sealed
from epdistill.workflows.measured import newest_first, newest_robustness

if TYPE_CHECKING:
    from epdistill.export.manifest import Manifest

BENCH = "bench.json"


@dataclass(frozen=True)
class Exports:
    """One exported file of a run.

    Attributes:
        name: Of the file.
        manifest: What is known about it.
    """

    name: str
    manifest: Manifest


@dataclass(frozen=True)
class Evidence:
    """What is known about a run beside its own record; None and empty where nobody measured.

    Attributes:
        robustness: See `epdistill.workflows.measured.robustness_of`.
        exports: The files in the run's folder that were made from these weights.
        bench: The content of the newest bench.json about this run.
    """

    robustness: dict[str, Any] | None = None
    exports: tuple[Exports, ...] = ()
    bench: dict[str, Any] | None = None


def evidence_of(run: Run, runs: Path, also: Sequence[Path] = ()) -> Evidence:
    """Everything that lies under `runs`, in the run's own folder, and in those named."""
    try:
        robustness = newest_robustness(runs, run, also)
    except EvaluationError:
        robustness = None
    return Evidence(robustness, exports_of(run), newest_bench(runs, run, also))


def exports_of(run: Run) -> tuple[Exports, ...]:
    """The exported files in a run's folder, float32 first; damaged manifests are left out."""
    from epdistill.export.manifest import manifest_path, read_manifest

    found = []
    for path in sorted(run.path.glob("*.onnx"), key=lambda file: (len(file.name), file.name)):
        try:
            manifest = read_manifest(manifest_path(path))
        except EpdistillError:
            continue
        if run.config["weights_sha256"] in manifest.metadata.values():
            found.append(Exports(path.name, manifest))
    return tuple(found)


def newest_bench(runs: Path, run: Run, also: Sequence[Path] = ()) -> dict[str, Any] | None:
    """The newest timings of a student, None where there are none since its training."""
    trained = datetime.datetime.fromisoformat(run.config["finished"]).timestamp()
    for when, path in newest_first(runs, BENCH, also):
        if when < trained:
            break
        try:
            content = read_sealed(path)
        except (OSError, ValueError):  # damaged
            continue
        if content.get("models") == run.name and "rows" in content:
            return content
    return None
