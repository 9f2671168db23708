"""All corruptions of a data set, one after the other, on as many cores as asked for."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product

import numpy as np
import torch
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions.blocks import corrupt
from epdistill.robustness.corruptions.registry import EXTRA, MAIN, SEVERITIES

# What each worker process corrupts; set once, when it starts.
_images = torch.empty(0)


def variants(
    images: Tensor, *, seed: int, names: Sequence[str] = (*MAIN, *EXTRA), workers: int = 1
) -> Iterator[tuple[str, int, Tensor]]:
    """Corrupt all images by each type at each severity; the bytes are those of `corrupt`.

    Args:
        images: (N,C,H,W) uint8, C of 1 or 3, H and W at least 8.
        seed: Fixes the noise.
        names: The types.
        workers: Processes. With more than one, a script that calls this needs the guard
            `if __name__ == "__main__"`, as always with new processes, and `names` only
            what importing this package registers.

    Yields:
        Name, severity and (N,C,H,W) uint8, severities innermost. No more than
        `workers` results exist that have not been fetched.

    Raises:
        EvaluationError: Fewer than one worker, an unknown corruption, or images that do
            not fit.
    """
    if workers < 1:
        raise EvaluationError(f"received {workers} workers; expected at least 1")
    wanted = product(names, SEVERITIES)
    if workers == 1:
        for name, severity in wanted:
            yield name, severity, corrupt(images, name, severity, seed=seed)
        return
    # Forking a process that runs threads, as torch's does, can hang.
    context = multiprocessing.get_context("spawn")
    pixels = images.cpu().numpy()
    with ProcessPoolExecutor(workers, context, _receive, (pixels,)) as pool:
        started = (
            (name, severity, pool.submit(_corrupt, name, severity, seed))
            for name, severity in wanted
        )
        ahead = deque(islice(started, workers))
        while ahead:
            name, severity, future = ahead.popleft()
            corrupted = torch.from_numpy(future.result()).to(images.device)
            ahead.extend(islice(started, 1))
            yield name, severity, corrupted


def _receive(pixels: np.ndarray) -> None:
    global _images
    _images = torch.from_numpy(pixels)


def _corrupt(name: str, severity: int, seed: int) -> np.ndarray:
    return corrupt(_images, name, severity, seed=seed).numpy()
