"""Run folders: what a training leaves behind, written so that a crash loses nothing.

    config.json         what was run, with what, and what came out (the newest facts)
    model.safetensors   the weights alone; their SHA-256 stands in config.json
    metrics.jsonl       one JSON object per line, only ever appended to
    README.md           a model card made from the recorded numbers

config.json holds the digests of the others, and its own (see `epdistill.sealed`).
Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from epdistill.disk import append, sync_folder, writing
from epdistill.errors import RunError
from epdistill.sealed import read_sealed, seal

FORMAT_VERSION = 1
SHIPPED = "shipped"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
METRICS = "metrics.jsonl"
CARD = "README.md"
# Where config.json keeps the digests of metrics and card.
FILES = "files_sha256"


@dataclass(frozen=True)
class Run:
    """A run folder and its parsed `config.json`."""

    path: Path
    config: dict[str, Any]

    @property
    def kind(self) -> str:
        """`"teacher"` or `"student"`."""
        return str(self.config["kind"])

    @property
    def name(self) -> str:
        """The folder's name, which is the run's name."""
        return self.path.name


def atomic_write(path: Path, content: bytes | str, *, keep: Path | None = None) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part.

    The steps are the usual ones: a sibling temporary file, flush, fsync,
    rename, fsync of the folder (without which the rename may not survive a
    power cut).

    Args:
        path: The file.
        content: All of it.
        keep: What the old file is called from then on; it is replaced without it.

    Raises:
        DiskError: The disk is full, read-only or broken; the old file is as it was.
    """
    temporary = _stage(path, content)
    with writing(path):
        try:
            if keep is not None and path.exists():
                path.replace(keep)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: none is replaced before all are on the disk.

    Args:
        files: Contents by path, in the order in which they appear.

    Raises:
        DiskError: As for `atomic_write`; all old files are as they were.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            staged[path] = _stage(path, content)
        for path, temporary in staged.items():
            with writing(path):
                temporary.replace(path)
    except BaseException:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        with writing(folder):
            sync_folder(folder)


def _stage(path: Path, content: bytes | str) -> Path:
    """A temporary file beside `path` with all of the content, on the disk."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):  # where no file can be made, there is none to delete
                temporary.unlink(missing_ok=True)
            raise
    return temporary


def sweep(folder: Path) -> None:
    """Delete the temporary files of writers that were killed; nobody may be writing."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, readable by people, sealed and atomically."""
    atomic_write(path, seal(content))


def append_metrics(folder: Path, row: Mapping[str, Any]) -> None:
    """Append one row to `metrics.jsonl`, onto the disk.

    Raises:
        DiskError: The disk is full, read-only or broken; the rows before are as they were.
    """
    path = folder / METRICS
    with writing(path), path.open("ab", buffering=0) as file:
        append(file.fileno(), json.dumps(dict(row)).encode() + b"\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete rows of `metrics.jsonl` (a last line cut by a crash is left out).

    Raises:
        RunError: A row before the last is damaged, or of a finished run any byte.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    told = _told(folder, METRICS)
    if told is not None and digest_of(path) != told:
        raise RunError(
            f"{path} is damaged or was edited (its SHA-256 is not that in {CONFIG}); restore the "
            "file, or delete it to do without"
        )
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(
                f"line {number} of {path} is damaged ({error}); expected a JSON object: restore "
                "the file, or delete it to do without"
            ) from error
        rows.append(row)
    return rows


def _told(folder: Path, name: str) -> str | None:
    """What config.json says of a file's digest, if anything."""
    try:
        return dict(read_sealed(folder / CONFIG).get(FILES, {})).get(name)
    except (OSError, ValueError):
        return None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file that `write_json` wrote.

    Args:
        path: The file.
        remedy: What to do if it cannot be read.

    Raises:
        RunError: It is missing, damaged or was edited.
    """
    try:
        return read_sealed(path)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); expected it as it was written: {remedy}"
        ) from error


def digest_of(path: Path) -> str:
    """The hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(folder: Path, *names: str) -> dict[str, str]:
    """The digests of those of some files that are there, by name."""
    return {name: digest_of(folder / name) for name in names if (folder / name).is_file()}


def new_run_folder(out: Path | None, runs_root: Path, stem: str) -> Path:
    """Create the folder of a new run and return it.

    Without `out` the folder is `runs_root/stem-NNN` with the next free number.
    An `out` that already holds a run is refused: runs are never overwritten.
    """
    if out is not None:
        if (out / CONFIG).exists():
            raise RunError(
                f"--out {out} already holds a run; runs are never overwritten: "
                "name another folder, or move this one away"
            )
        if out.exists() and not out.is_dir():
            raise RunError(f"--out {out} is a file; expected a folder to write the run into")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        return out
    with writing(runs_root):
        runs_root.mkdir(parents=True, exist_ok=True)
    taken = [
        int(match.group(1))
        for entry in runs_root.iterdir()
        if (match := re.fullmatch(re.escape(stem) + r"-(\d{3,})", entry.name))
    ]
    number = max(taken, default=0) + 1
    while True:
        folder = runs_root / f"{stem}-{number:03d}"
        try:
            with writing(folder):
                folder.mkdir()
            return folder
        except FileExistsError:  # another process took this number meanwhile
            number += 1


def save_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> str:
    """Write `model.safetensors` and return its SHA-256, to be kept in `config.json`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = save_safetensors(tensors)
    atomic_write(folder / WEIGHTS, data)
    return hashlib.sha256(data).hexdigest()


def load_weights(run: Run) -> dict[str, torch.Tensor]:
    """Read the weights of a run after checking their SHA-256 against `config.json`."""
    path = run.path / WEIGHTS
    if not path.is_file():
        raise RunError(f"{run.path} has no {WEIGHTS}; expected a finished run: train it again")
    data = path.read_bytes()
    expected = run.config.get("weights_sha256")
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise RunError(
            f"{path} is damaged or was replaced: its SHA-256 is {found[:12]}..., config.json "
            f"says {str(expected)[:12]}...; restore the file or train again"
        )
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise RunError(f"{path} is not a readable safetensors file ({error})") from error


def or_shipped(typed: Path, shipped: Path) -> Path:
    """What a user means by a path: `shipped` is what comes with the package.

    Args:
        typed: As typed; something of that name in the current folder comes first.
        shipped: What the name stands for here.
    """
    return shipped if typed == Path(SHIPPED) and not typed.exists() else typed


def open_run(path: Path, kind: str | None = None) -> Run:
    """Open a run folder.

    Args:
        path: The folder (or a file inside it).
        kind: `"teacher"` or `"student"` when only that kind will do.

    Raises:
        RunError: The folder holds no finished run, a damaged one, or one of another kind.
    """
    folder = path.parent if path.is_file() else path
    config_path = folder / CONFIG
    wanted = f"a {kind} run" if kind else "a run"
    if not config_path.is_file():
        state = "does not exist" if not folder.exists() else f"has no {CONFIG}"
        raise RunError(f"{folder} {state}; expected the folder of {wanted}")
    try:
        config = read_sealed(config_path)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{config_path} is damaged ({error}); expected it as it was written: restore it, or "
            "train again"
        ) from error
    if "kind" not in config or "format_version" not in config:
        raise RunError(f"{config_path} is not a run's configuration; expected {wanted}")
    if config["format_version"] != FORMAT_VERSION:
        raise RunError(
            f"{config_path} has format version {config['format_version']}; this epdistill reads "
            f"version {FORMAT_VERSION}: use the epdistill that wrote it"
        )
    if kind is not None and config["kind"] != kind:
        raise RunError(f"{folder} is a {config['kind']} run; expected a {kind} run")
    return Run(folder, config)


def machine_of(environment: Mapping[str, Any], unknown: str = "-") -> str:
    """What a run was made on, from its `environment`: the GPU, or the processor without one."""
    return str(environment.get("gpu") or environment.get("cpu", unknown))


def finished_runs(runs_root: Path, kind: str | None = None) -> list[Run]:
    """All readable finished runs under `runs_root`, newest first."""
    found = []
    if runs_root.is_dir():
        for entry in sorted(runs_root.iterdir()):
            if (entry / CONFIG).is_file():
                try:
                    run = open_run(entry)
                except RunError:
                    continue
                if run.config.get("finished") and (kind is None or run.kind == kind):
                    found.append(run)
    # The number in the name breaks ties of the clock.
    return sorted(found, key=lambda run: (run.config["finished"], run.name), reverse=True)


def newest_run(runs_root: Path, kind: str | None = None) -> Run:
    """The newest finished run of a kind under `runs_root`."""
    runs = finished_runs(runs_root, kind)
    if not runs:
        command = "distill" if kind == "student" else "teach"
        raise RunError(
            f"no finished {kind + ' ' if kind else ''}run under {runs_root}; "
            f"expected one: type `epdistill {command}` first, or name a run's folder"
        )
    return runs[0]
