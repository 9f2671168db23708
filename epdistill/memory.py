"""Keeping freed memory for the next sweep."""

from __future__ import annotations

import ctypes
import functools
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed blocks back to the kernel; True if it agreed.

    A relaxation frees and allocates the same few megabytes in every sweep. By
    default glibc returns such blocks and the next sweep pays a page fault for
    every 4 KiB of them: element-wise operations on states of 2 MiB took 5 to 10
    times as long. Other C libraries are left alone. Peak memory is unchanged; it
    is given back when the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGE))
