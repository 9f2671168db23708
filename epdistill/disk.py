"""A disk that is full, read-only or broken: one clear error instead of a traceback.

Also the lock on a folder that one process at a time may write into.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epdistill.errors import DiskError

_ROOM = "make room"
_RIGHTS = "make it writable, or choose another place"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EIO: "look after the disk",
}


def trouble(error: OSError, path: Path | str | None = None) -> DiskError | None:
    """What an error of the system says about a disk; None if it is about something else.

    Args:
        error: As raised.
        path: What was being written; the error's own file without it.
    """
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    if path is not None:
        return DiskError(f"cannot write {path} ({error.strerror}{_room(Path(path))})", remedy)
    name = error.filename
    if not isinstance(name, str | os.PathLike):
        return DiskError(f"cannot read or write ({error.strerror})", remedy)
    return DiskError(f"cannot read or write {name} ({error.strerror}{_room(Path(name))})", remedy)


def _room(path: Path) -> str:
    """How much is left where a path lies."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return f", {shutil.disk_usage(folder).free:,} bytes free"
    return ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full, read-only or broken disk under `path` into a DiskError."""
    try:
        yield
    except OSError as error:
        found = trouble(error, path)
        if found is None:
            raise
        raise found from error


def append(descriptor: int, data: bytes) -> None:
    """Write at the end of a file and onto the disk: all of it or, if that fails, nothing.

    Args:
        descriptor: Opened for writing; its position is the end of the file.
        data: What to write.
    """
    start = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, start)
            os.lseek(descriptor, start, os.SEEK_SET)
        raise


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: a rename may not survive a power cut without it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Hold a folder for the duration of a `with`, if no other process does.

    The lock is on the folder itself and ends with the process, however that ends. Where
    a filesystem has no such locks, everybody is alone.

    Yields:
        Whether it is ours.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
    finally:
        os.close(descriptor)
