"""`epdistill check`: is every file as it was written?

Loading a model verifies what decides its answers: config.json, the weights, an exported
file and its manifest. This verifies the rest too (docs/runs.md has the table).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdistill.checkpoints import PREVIOUS, STATE, read_checkpoint
from epdistill.errors import ExportError, RunError
from epdistill.export.manifest import manifest_path, read_manifest, verify
from epdistill.robustness.journal import NAME as JOURNAL
from epdistill.robustness.journal import damaged_lines
from epdistill.runs import CONFIG, FILES, WEIGHTS, digest_of
from epdistill.sealed import KEY, sealed, unseal

INTACT, UNKNOWN, DAMAGED = "intact", "without a checksum", "damaged"


@dataclass(frozen=True)
class Finding:
    """What is known about one file.

    Attributes:
        path: The file.
        state: `"intact"`, `"without a checksum"` or `"damaged"`.
        why: What is wrong, if anything.
    """

    path: Path
    state: str
    why: str = ""


def check(paths: Sequence[Path]) -> list[Finding]:
    """Everything that can be verified in some folders and what lies below them.

    Args:
        paths: Folders of runs, evaluations, ablations, exports, or of many of them.

    Raises:
        RunError: A folder does not exist.
    """
    found: dict[Path, Finding] = {}
    for top in paths:
        if not top.is_dir():
            raise RunError(f"{top} is no folder; expected the folder of a run, or of many")
        for path in sorted(top.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                for finding in _check(path):
                    # What is wrong with a file outweighs what is right with it.
                    before = found.get(finding.path)
                    if before is None or before.state != DAMAGED:
                        found[finding.path] = finding
    return list(found.values())


def _check(path: Path) -> Iterator[Finding]:
    """What one file says of itself and of others."""
    try:
        if path.suffix == ".json":
            yield from _check_json(path)
        elif path.name in (STATE, PREVIOUS):
            read_checkpoint(path)
            yield Finding(path, INTACT)
        elif path.name == JOURNAL:
            lines = damaged_lines(path)
            why = f"damaged lines: {', '.join(map(str, lines))}" if lines else ""
            yield Finding(path, DAMAGED if lines else INTACT, why)
        elif path.suffix == ".onnx" and manifest_path(path).is_file():
            verify(path.read_bytes(), read_manifest(manifest_path(path)), path.name)
            yield Finding(path, INTACT)
    except (RunError, ExportError, OSError) as error:
        yield Finding(path, DAMAGED, str(error))


def _check_json(path: Path) -> Iterator[Finding]:
    data = path.read_bytes()
    try:
        content = unseal(data)
    except ValueError as error:
        yield Finding(path, DAMAGED, str(error))
        return
    if not sealed(data):
        yield Finding(path, UNKNOWN, f"no {KEY}: from an older epdistill, edited, or not ours")
        if path.name != CONFIG:
            return
    else:
        yield Finding(path, INTACT)
    yield from _check_told(path.parent, content, is_run=path.name == CONFIG)


def _check_told(folder: Path, content: dict[str, Any], *, is_run: bool) -> Iterator[Finding]:
    """The files whose digests a JSON file holds."""
    told = dict(content.get(FILES) or {})
    if is_run and content.get("finished"):
        told[WEIGHTS] = content.get("weights_sha256")
    for name, digest in told.items():
        path = folder / name
        if not path.is_file():
            yield Finding(path, DAMAGED, "it is missing")
        elif digest_of(path) == digest:
            yield Finding(path, INTACT)
        else:
            yield Finding(path, DAMAGED, "its SHA-256 does not fit: damaged, or edited since")
