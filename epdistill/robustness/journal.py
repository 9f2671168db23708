"""What a long evaluation has done so far, on disk, so that a kill loses one unit at most.

The journal is a text file with one line per unit of work (and a first line that
says what is evaluated):

    CRC-32 of the rest in hexadecimal, a blank, one JSON object

A unit's random numbers come from the evaluation's seed and the unit's own name,
never from a stream, so it does not matter in which process it is computed. A line
that a crash cut short does not match its checksum: it is dropped, and its unit
is computed again.
"""

from __future__ import annotations

import base64
import fcntl
import json
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epdistill.disk import append, sync_folder, writing
from epdistill.errors import EvaluationError
from epdistill.nested import leaves

NAME = "journal.jsonl"
FORMAT_VERSION = 1


class Journal:
    """Finished units by key; without a file they are only remembered.

    Attributes:
        notes: What was dropped while reading, one line each.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._units: dict[str, Any] = {}
        self._file: FileIO | None = None
        self._path = Path()

    @classmethod
    def of(cls, units: Mapping[str, Any]) -> Journal:
        """A journal without a file that knows some units already."""
        journal = cls()
        journal._units.update(units)
        return journal

    @property
    def units(self) -> Mapping[str, Any]:
        """What is known so far."""
        return self._units

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Begin a journal in a folder that has none.

        Raises:
            EvaluationError: There is one already.
        """
        path = folder / NAME
        if begun(folder):
            raise EvaluationError(
                f"{folder} holds an unfinished evaluation; expected a new folder: continue that "
                f"one with --resume --out {folder}, or name another folder"
            )
        journal = cls()
        journal._open(path, "ab+")
        assert journal._file is not None
        journal._file.truncate(0)
        try:
            journal._append({"journal": FORMAT_VERSION, "header": dict(header)})
            sync_folder(folder)
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Continue the journal of a folder, if it is about the same evaluation.

        Raises:
            EvaluationError: No journal, an unreadable one, one that another process is
                writing, or one about something else.
        """
        path = folder / NAME
        written = read_header(folder)
        changed = _changed(written, json.loads(_json(dict(header))))
        if changed:
            raise EvaluationError(
                f"{folder} was begun with {'; '.join(changed)}; expected the same settings, models "
                "and data: leave these flags out, or start a new evaluation"
            )
        journal = cls()
        journal._open(path, "r+b")
        assert journal._file is not None
        content = journal._file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            journal.notes.append(f"{path}: the last line was cut short; its unit is done again")
        # The next line must begin on a line of its own.
        if end < len(content):
            journal._file.truncate(end)
        journal._file.seek(end)
        for number, line in enumerate(content[:end].splitlines()[1:], start=2):
            entry = _parse(line)
            if entry is None or "unit" not in entry:
                journal.notes.append(f"{path}: line {number} is damaged; its unit is done again")
            else:
                journal._units[entry["unit"]] = entry["found"]
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which also lets other processes resume it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def empty(self) -> bool:
        """Whether no unit is finished."""
        return not self._units

    def get(self, key: str) -> Any:
        """What was found in a unit; None if it is still to be done."""
        return self._units.get(key)

    def put(self, key: str, found: Any) -> None:
        """Remember a unit, on disk before this returns.

        Raises:
            DiskError: The disk is full, read-only or broken; the units before are kept.
        """
        self._units[key] = found
        self._append({"unit": key, "found": found})

    def _open(self, path: Path, mode: str) -> None:
        with writing(path):
            file = FileIO(path, mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise EvaluationError(
                f"another process is writing {path}; expected to be alone: wait for it to end"
            ) from error
        self._file, self._path = file, path

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        text = _json(entry).encode()
        with writing(self._path):
            append(self._file.fileno(), b"%08x %s\n" % (zlib.crc32(text), text))


def begun(folder: Path) -> bool:
    """Whether a folder's journal has a first line; a kill may come before it is written."""
    path = folder / NAME
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


def damaged_lines(path: Path) -> list[int]:
    """The numbers of a journal's lines that are not as they were written."""
    lines = path.read_bytes().split(b"\n")
    # Every line ends with a newline: what comes after the last one was cut short.
    whole, rest = lines[:-1], lines[-1]
    return [number for number, line in enumerate(whole, start=1) if _parse(line) is None] + (
        [len(lines)] if rest else []
    )


def in_use(folder: Path) -> bool:
    """Whether another process is writing a folder's journal."""
    with (folder / NAME).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def read_header(folder: Path) -> dict[str, Any]:
    """What the evaluation in a folder is about.

    Raises:
        EvaluationError: There is no journal, or its first line is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        why = "is complete" if (folder / "results.json").is_file() else f"has no {NAME}"
        raise EvaluationError(
            f"{folder} {why}; expected an unfinished evaluation to resume: start a new one "
            "without --resume"
        )
    if not begun(folder):
        raise EvaluationError(
            f"{path} was stopped before its first line; expected an unfinished evaluation to "
            "resume: start again without --resume"
        )
    with path.open("rb") as file:
        entry = _parse(file.readline().rstrip(b"\n"))
    if entry is None or entry.get("journal") != FORMAT_VERSION:
        raise EvaluationError(
            f"the first line of {path} is damaged or of another version; expected a journal of "
            f"version {FORMAT_VERSION}: start a new evaluation"
        )
    header: dict[str, Any] = entry["header"]
    return header


def remove(folder: Path) -> None:
    """Delete a folder's journal, once its results are written."""
    (folder / NAME).unlink(missing_ok=True)


def pack_bits(flags: Tensor) -> str:
    """A bool tensor (n,) as text."""
    return _text(np.packbits(flags.cpu().numpy()).tobytes())


def unpack_bits(text: str, n: int) -> Tensor:
    """The bool tensor (n,) that `pack_bits` was given."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n)
    return torch.from_numpy(bits.astype(bool))


def pack_floats(values: Tensor) -> str:
    """A float64 tensor (n,) as text, exactly."""
    return _text(zlib.compress(values.cpu().double().numpy().astype("<f8").tobytes()))


def unpack_floats(text: str) -> Tensor:
    """The float64 tensor (n,) that `pack_floats` was given."""
    data = zlib.decompress(base64.b64decode(text))
    return torch.from_numpy(np.frombuffer(data, "<f8").astype(np.float64))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if the line is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    content = json.loads(text)
    return content if isinstance(content, dict) else None


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which settings differ, in words."""
    was, now = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key} = {json.dumps(was.get(key))}, not {json.dumps(now.get(key))}"
        for key in dict.fromkeys((*was, *now))
        if was.get(key) != now.get(key)
    ]
