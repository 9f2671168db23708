"""`corrupt`: block by block, so that memory is bounded and the bytes do not depend on the cut.

Image k of a data set always stands at place k mod B of block k // B, where B
depends on the image size alone. Each block has its own generator, and is always
computed whole (places nobody asked for hold black). So an image's bytes are a
function of seed, corruption, severity, k and its own pixels: not of the images
around it, and not of how a caller cuts the data set. A block of fixed shape also
keeps the arithmetic the same: matrix products and vector loops may round
differently for another number of images, or of threads, so a block is computed by
one. That is also faster: its operations take microseconds, less than threads need
to wait for each other; `workers` of `variants` is the way to more cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions.registry import (
    CORRUPTIONS,
    FAMILY,
    SMALLEST,
    check_corruption,
)
from epdistill.robustness.guards import derive_seed

# 64 images of 32x32: 0.8 MB in float32 and colour, small enough for a core's cache.
LARGEST_BLOCK = 64
BLOCK_PIXELS = 65_536


def block_length(height: int, width: int) -> int:
    """How many images of this size are corrupted together (1..64)."""
    return max(1, min(LARGEST_BLOCK, BLOCK_PIXELS // (height * width)))


def corrupt(images: Tensor, name: str, severity: int, *, seed: int, start: int = 0) -> Tensor:
    """Corrupt 8-bit images.

    Same seed, same bytes, however the data set is cut into calls: give each part its
    `start`. (Same machine and package versions, as everywhere.)

    Args:
        images: (N,C,H,W) uint8, C of 1 or 3, H and W at least 8.
        name: A key of `CORRUPTIONS`.
        severity: 1..5.
        seed: Fixes the noise, for each corruption and severity on its own.
        start: The number that the first image has in its data set, from 0.

    Returns:
        (N,C,H,W) uint8, on the images' device. Memory beyond it is that of a block.

    Raises:
        EvaluationError: An unknown corruption or severity, or images that do not fit.
    """
    check_corruption(name, severity)
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] not in (1, 3):
        raise EvaluationError(
            f"received images of shape {shape} and type {images.dtype}; expected (N,1,H,W) or "
            "(N,3,H,W) uint8"
        )
    if min(shape[2:]) < SMALLEST:
        raise EvaluationError(
            f"received images of {shape[2]}x{shape[3]}; expected at least {SMALLEST}x{SMALLEST}"
        )
    if start < 0:
        raise EvaluationError(f"received start {start}; expected an image's number, 0 or more")
    chosen = CORRUPTIONS[name]
    constant = chosen.constants[severity - 1]
    length, stop = block_length(*shape[2:]), start + len(images)
    result = torch.empty(shape, dtype=torch.uint8)
    with _one_thread():
        for block in range(start // length, -(-stop // length)):
            first = block * length
            low, high = max(first, start), min(first + length, stop)
            frame = torch.zeros((length, *shape[1:]))
            frame[low - first : high - first] = (
                images[low - start : high - start].cpu().float() / 255
            )
            generator = torch.Generator().manual_seed(
                derive_seed(seed, FAMILY, name, severity, block)
            )
            worse = chosen.function(frame, constant, generator)[low - first : high - first]
            result[low - start : high - start] = to_bytes(worse)
    return result.to(images.device)


def to_bytes(images: Tensor) -> Tensor:
    """Floating-point images as uint8: clipped to [0,1] and rounded to the nearest of 256 levels."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, and restore their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
