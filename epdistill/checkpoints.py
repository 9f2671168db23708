"""Checkpoints: the newest one, and the one before it for when the newest is damaged.

    state.safetensors            the newest
    state.previous.safetensors   the one before

Each is the SHA-256 of the rest in front (32 bytes), then a safetensors file. A new one
is complete on the disk before the two are renamed, so there is always a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from epdistill.errors import RunError
from epdistill.runs import METRICS, atomic_write, read_metrics
from epdistill.sealed import with_digest, without_digest

STATE = "state.safetensors"
PREVIOUS = "state.previous.safetensors"
SECONDS = "seconds"  # in the loop, over all processes that worked on it


@dataclass(frozen=True)
class Checkpoint:
    """What a training goes on from.

    Attributes:
        state: What the task gave.
        facts: The loop's own: step, sums and last row.
        notes: What was wrong on the way to it, one line each.
    """

    state: dict[str, Tensor]
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def spent(found: Checkpoint) -> float:
    """Seconds in the loop up to a checkpoint, over all processes; older ones do not tell: 0."""
    return float(found.facts.get(SECONDS, 0.0))


def save_checkpoint(folder: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write what resuming needs; the checkpoint before stays until this one is complete.

    Args:
        folder: The run's.
        state: Tensors by name.
        facts: JSON values.

    Raises:
        DiskError: No room; both older checkpoints are as they were.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    path = folder / METRICS
    # The rows so far: what happens to the file meanwhile can be mended.
    metrics = path.read_text() if path.is_file() else ""
    told = json.dumps({"metrics": metrics, **facts})
    data = save_safetensors(tensors, metadata={"facts": told})
    # The digest goes in front: a torn or altered checkpoint must not be continued from.
    atomic_write(folder / STATE, with_digest(data), keep=folder / PREVIOUS)


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint file.

    Raises:
        RunError: It is damaged.
    """
    data = without_digest(path.read_bytes())
    if data is None:
        raise RunError(f"{path} is damaged (its checksum does not fit)")
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return Checkpoint(load_safetensors(data), json.loads(header["__metadata__"]["facts"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of an unfinished run; None if it has none.

    Raises:
        RunError: Everything that is there is damaged.
    """
    notes = []
    for path in (folder / STATE, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            found = read_checkpoint(path)
        except RunError as error:
            notes.append(str(error))
            continue
        if notes:
            notes.append(f"going on from {path.name}, step {found.facts['step']}")
        return Checkpoint(found.state, found.facts, tuple(notes))
    if notes:
        raise RunError(
            f"{'; '.join(notes)}; expected a whole checkpoint: restore it, or delete it to start "
            "again from the beginning"
        )
    return None


def pick_up(folder: Path) -> Checkpoint | None:
    """As `load_checkpoint`, and put the folder back to where it was then.

    A damaged newest checkpoint is deleted, so that the next one does not push out the
    whole one; metrics written after the checkpoint will be written again.

    Raises:
        RunError: As `load_checkpoint` says.
    """
    found = load_checkpoint(folder)
    path = folder / METRICS
    if found is None:
        path.unlink(missing_ok=True)
        return None
    if found.notes:
        (folder / STATE).unlink(missing_ok=True)
    now = path.read_bytes() if path.is_file() else b""
    kept = found.facts.get("metrics")
    if kept is None:  # from before checkpoints kept the rows
        rows = [row for row in read_metrics(folder) if row["step"] <= found.facts["step"]]
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        return found
    if now != kept.encode():
        atomic_write(path, kept)
    if not now.startswith(kept.encode()):
        note = f"{path} was damaged; its rows are back, from the checkpoint"
        return Checkpoint(found.state, found.facts, (*found.notes, note))
    return found


def forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run that is finished."""
    for name in (STATE, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def last_step(folder: Path) -> int | None:
    """At which step a run can be picked up; None if only from the beginning."""
    try:
        found = load_checkpoint(folder)
    except (RunError, OSError):
        return None
    return None if found is None else int(found.facts["step"])
