"""Who works on what, when several processes share a folder.

A claim is an exclusive `flock` on a file of its own. The kernel drops it with the
process that holds it, however that ends, so a crash or a reboot leaves no stale claim
behind, and there is none to be recognised and taken over (which two processes could do
at once). The pid in the file is for people.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold a file for the duration of a `with`, if nobody else does.

    Args:
        path: The file, made if missing and never deleted: two processes could otherwise
            hold two files of that name.

    Yields:
        Whether it is ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield True
