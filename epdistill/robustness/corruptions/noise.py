"""Gaussian, shot, impulse and speckle noise: each channel of each pixel on its own."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from epdistill.robustness.corruptions.registry import corruption

# The cells of the table that starts the search for a Poisson quantile.
_CELLS = 4096


@corruption("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10))
def gaussian_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Sensor noise in low light: x + sigma N(0, 1)."""
    return images + sigma * torch.randn(images.shape, generator=generator)


@corruption("shot_noise", (500, 250, 100, 75, 50))
def shot_noise(images: Tensor, rate: int, generator: torch.Generator) -> Tensor:
    """Light comes in quanta: Poisson(rate x) / rate, of variance x / rate.

    Drawn by inverting the distribution function at one uniform number per value
    (rejection samplers draw more for some pixels than for others, so that an image's
    noise would depend on the images before it).
    """
    levels = (images * 255).round().long().numpy()
    uniform = torch.rand(images.shape, generator=generator, dtype=torch.float64).numpy()
    counts = _poisson_quantile(levels.ravel(), uniform.ravel(), rate)
    return torch.from_numpy(counts).to(images.dtype).reshape(images.shape) / rate


@corruption("impulse_noise", (0.01, 0.02, 0.03, 0.05, 0.07))
def impulse_noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper: a share `amount` of the channel values becomes 0 or 1, half each."""
    hit = torch.rand(images.shape, generator=generator) < amount
    salt = torch.rand(images.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(images.dtype), images)


@corruption("speckle_noise", (0.06, 0.10, 0.12, 0.16, 0.20))
def speckle_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Multiplicative noise: x + x sigma N(0, 1)."""
    return images + images * sigma * torch.randn(images.shape, generator=generator)


@lru_cache(maxsize=8)
def _poisson_tables(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribution functions of Poisson(rate v / 255) for v = 0..255, and where to start.

    Returns:
        cdf: (256,K) float64, cdf[v,k] = P(count <= k); the last column is 2, above any
            uniform number.
        lowest: (256,4096) int32, the quantile at the lower end of each cell of [0,1).
    """
    from scipy.special import pdtr

    # Ten standard deviations above the largest mean: past what a double can tell from 1.
    most = int(rate + 10 * rate**0.5 + 10)
    means = rate * np.arange(256) / 255
    cdf = pdtr(np.arange(most + 1)[None, :], means[:, None])
    cdf[:, -1] = 2
    ends = np.arange(_CELLS) / _CELLS
    lowest = np.stack([np.searchsorted(row, ends, side="right") for row in cdf])
    return cdf, lowest.astype(np.int32)


def _poisson_quantile(levels: np.ndarray, uniform: np.ndarray, rate: int) -> np.ndarray:
    """The smallest k with P(Poisson(rate v / 255) <= k) > u, elementwise.

    Args:
        levels: (M,) integers v in 0..255.
        uniform: (M,) float64 u in [0,1).
        rate: > 0.

    Returns:
        (M,) int32.
    """
    cdf, lowest = _poisson_tables(rate)
    counts: np.ndarray = lowest[levels, (uniform * _CELLS).astype(np.int64)]
    behind = np.flatnonzero(cdf[levels, counts] <= uniform)
    # Few steps: a cell holds more than one quantile only in the tails.
    while len(behind):
        counts[behind] += 1
        behind = behind[cdf[levels[behind], counts[behind]] <= uniform[behind]]
    return counts
