"""Images that stay on disk: decoded when they are asked for, ahead of training by workers.

`Files` stands where a tensor of pixels stands in a split. An index gives the same bits
as the tensor would; nothing decoded is kept. In training, torch's DataLoader decodes the
coming batches in worker processes, in order, at most `AHEAD` batches per worker: memory
holds (1 + AHEAD * workers) batches, whatever the size of the data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from epdistill.errors import DataError
from epdistill.images import read_image

Stream = bool | Literal["auto"]
AHEAD = 2
# Of the machine's memory: what a folder's pixels may take before `auto` streams them. The
# result is the same either way.
SHARE = 0.25
CHUNK = 1024  # images looked at together where a whole split is gone through
Found = tuple[Tensor, Tensor | str]


class Images(Protocol):
    """Pixels of a split: a tensor, or files that give the same when they are indexed."""

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""

    @property
    def dtype(self) -> torch.dtype:
        """`torch.uint8`."""

    @property
    def ndim(self) -> int:
        """4."""

    @property
    def device(self) -> torch.device:
        """Where an index gives tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, as uint8 (N, C, S, S) that is decoded piece by piece.

    Attributes:
        paths: One file per image.
        channels: C, 1 (grey) or 3 (RGB).
        size: S, to which the centre square is resized.
        workers: Processes that decode ahead in `feed`; 0 decodes in this one.
    """

    paths: tuple[Path, ...]
    channels: int
    size: int
    workers: int = 2

    dtype = torch.uint8
    ndim = 4
    device = torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """(N, C, S, S)."""
        return torch.Size((len(self.paths), self.channels, self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Decode some images: uint8 (n, C, S, S).

        Raises:
            DataError: A file is damaged or gone; it is named.
        """
        chosen = torch.arange(len(self.paths))[index].tolist()
        pixels = torch.empty((len(chosen), *self.shape[1:]), dtype=torch.uint8)
        for row, number in enumerate(chosen):
            path = self.paths[number]
            pixels[row] = torch.from_numpy(read_image(path, channels=self.channels, size=self.size))
        return pixels

    def subset(self, index: Tensor) -> Files:
        """Some of the images, (n,) int64, still on disk."""
        chosen = tuple(self.paths[number] for number in index.tolist())
        return Files(chosen, self.channels, self.size, self.workers)

    @contextmanager
    def feed(self, rows: Iterable[Tensor]) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Batch after batch while a `with` lasts; the workers live as long.

        Args:
            rows: The images' numbers in each batch, (n,) int64; read ahead.

        Yields:
            An iterator of those numbers and the images, uint8 (n, C, S, S), in order.
        """
        workers = min(self.workers, os.cpu_count() or 1)
        loader: DataLoader[Found] = DataLoader(
            _Decoder(self),
            batch_sampler=_Rows(rows),
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            # A fork would copy whatever threads hold at that moment.
            multiprocessing_context="spawn" if workers else None,
            # Of its own, so that the global one is not moved.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        try:
            yield _checked(batches)
        finally:
            del batches  # the last reference: the workers end with it


class _Decoder(Dataset[Found]):
    """What workers run: numbers to pixels, or to what is wrong with a file."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __getitems__(self, numbers: Sequence[int]) -> Found:
        index = torch.tensor(numbers)
        try:
            return index, self.files[index]
        except DataError as error:  # raised here, it would come out wrapped in a traceback
            return index, str(error)


class _Rows:
    """Batches of numbers for the loader."""

    def __init__(self, rows: Iterable[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        for pick in self.rows:
            yield pick.tolist()


def _as_it_is(found: Any) -> Any:
    return found


def _checked(batches: Iterator[Found]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        try:
            index, pixels = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # a worker was killed, most likely for want of memory
            reason = str(error).splitlines()[0]
            raise DataError(
                f"a process that decodes images died ({reason}); expected memory for a few "
                "batches: lower data.workers or the batch size, and continue with --resume"
            ) from error
        if isinstance(pixels, str):
            raise DataError(pixels)
        yield index, pixels


def chunks(images: Images) -> Iterator[Tensor]:
    """All images in order, at most `CHUNK` at a time: uint8 (n, C, H, W)."""
    return (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))


def too_large(size_bytes: int) -> bool:
    """Whether `auto` streams so many bytes of pixels."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size_bytes > SHARE * memory
