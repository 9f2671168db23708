"""A teacher's answers to replayed views, kept on disk as a memory map of float16.

A view is an image as it was augmented and placed when it was first seen in that pass.
Pass e trains on view e mod k: the first k passes fill the cache, the others replay it.
Pictures are kept beside the answers, and both sides only ever see them as they were
rounded, so a replayed step equals one with the teacher online.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from epdistill.disk import writing
from epdistill.errors import DiskError, RunError
from epdistill.teachers.targets import Shape, Targets

VIEWS = "views.f16"
_CHUNK = 1 << 24


class ViewCache:
    """`views` views of every training image, and what the teacher says to them.

    Args:
        folder: Where the file lies.
        views: How many views an image has.
        images: How many training images there are.
        image: (channels, height, width) of one.
        states: The same of the states that are kept.
        classes: Length of the logits.
        teacher: Images (N, C, H, W) in [0,1] to what it answers; its last states count.

    Raises:
        DiskError: The disk has no room for it, or is read-only.
    """

    def __init__(
        self,
        folder: Path,
        *,
        views: int,
        images: int,
        image: Shape,
        states: Sequence[Shape],
        classes: int,
        teacher: Callable[[Tensor], Targets],
    ) -> None:
        self.path = folder / VIEWS
        self.views, self.images, self._teacher = views, images, teacher
        # One row: picture, states, logits, and whether the teacher had settled.
        self._shapes: list[tuple[int, ...]] = [image, *states, (classes,), ()]
        row = sum(prod(shape) for shape in self._shapes)
        self.size_bytes = 2 * views * images * row
        self.filled = torch.zeros(views, images, dtype=torch.bool)
        self._sums = torch.zeros(views, images, dtype=torch.int64)
        self.found = self.path.is_file() and self.path.stat().st_size == self.size_bytes
        if not self.found:
            free = shutil.disk_usage(folder).free
            if free < self.size_bytes:
                raise DiskError(
                    f"cannot write {self.path}: {views} cached views need {self.size_bytes:,} "
                    f"bytes, {free:,} are free",
                    "make room, or begin anew with fewer --cached-views",
                )
            _reserve(self.path, self.size_bytes)
        mode: Literal["r+"] = "r+"
        self._rows = np.memmap(self.path, np.float16, mode, shape=(views * images, row))

    def fetch(
        self, view: int, index: Tensor, fresh: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Targets]:
        """A batch of a view, from the file where it is there.

        Args:
            view: Which, from 0.
            index: (N,) int64, the images' numbers in the training split.
            fresh: Places in the batch, (M,) int64, to pictures (M, C, H, W) in [0,1]: asked
                for those that are not there.

        Returns:
            The pictures and the teacher's answer to them, in float32 on the CPU; `sweeps`
            are those of now, 0 for what was there.

        Raises:
            RunError: A row is not what was written: a later pass could not draw it again.
        """
        missing = (~self.filled[view, index]).nonzero().squeeze(1)
        self._verify(view, index[self.filled[view, index]])
        sweeps = torch.zeros(len(index), dtype=torch.int64)
        if len(missing) > 0:
            pictures = fresh(missing).half()
            said = self._teacher(pictures.float())
            states = said.states[len(said.states) - (len(self._shapes) - 3) :]
            parts = [pictures, *states, said.logits, said.settled]
            flat = [part.reshape(len(missing), -1).half().cpu() for part in parts]
            rows = torch.cat(flat, 1).numpy()
            self._rows[self._places(view, index[missing])] = rows
            self._sums[view, index[missing]] = torch.tensor([zlib.crc32(row) for row in rows])
            self.filled[view, index[missing]] = True
            if said.sweeps is not None:
                sweeps[missing] = said.sweeps.cpu()
        found = torch.from_numpy(self._rows[self._places(view, index)]).float()
        pieces = torch.split(found, [prod(shape) for shape in self._shapes], dim=1)
        picture, *kept, logits, settled = (
            piece.reshape(len(index), *shape)
            for piece, shape in zip(pieces, self._shapes, strict=True)
        )
        return picture, Targets(kept, logits, settled > 0, sweeps)

    def _places(self, view: int, index: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        places: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = (
            view * self.images + index
        ).numpy()
        return places

    def _verify(self, view: int, index: Tensor) -> None:
        for number in index.tolist():
            if zlib.crc32(self._rows[view * self.images + number]) != self._sums[view, number]:
                raise RunError(
                    f"{self.path} is damaged (view {view} of image {number}); expected it as it "
                    "was written: restore it, or distill again"
                )

    def state(self) -> Tensor:
        """The CRC-32 of every row, -1 where there is none, after they have been written out.

        Returns:
            (views, images) int64.
        """
        self._rows.flush()
        return torch.where(self.filled, self._sums, -1)

    def restore(self, state: Tensor) -> None:
        """Take back what `state` gave; rows that were written later are asked for again.

        Raises:
            RunError: The file is gone.
        """
        old = state.dtype == torch.bool  # from before there were checksums
        filled = state.clone() if old else state >= 0
        if bool(filled.any()) and not self.found:
            raise RunError(f"{self.path} is gone or of another size; restore it or train again")
        self.filled, self._sums = filled, torch.zeros(filled.shape, dtype=torch.int64)
        if not old:
            self._sums = state.clone()
            return
        for view, number in filled.nonzero().tolist():
            self._sums[view, number] = zlib.crc32(self._rows[view * self.images + number])

    def remove(self) -> None:
        """Delete the file: a finished run has no use for it."""
        del self._rows
        self.path.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Make a file of zeros that has its room on the disk.

    A file with holes in it would be found out only when a page is written through the map, and
    the system kills a process that has no room for a page.

    Raises:
        DiskError: There is no room; nothing is left behind.
    """
    with writing(path):
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    for start in range(0, size, _CHUNK):
                        file.write(bytes(min(_CHUNK, size - start)))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
