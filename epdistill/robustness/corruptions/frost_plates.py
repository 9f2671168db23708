"""Frost grown by rule: ferns of ice on dark glass.

Ice on a window grows as dendrites: stems with side branches at about 60 degrees,
which carry finer branches of the same kind. A plate is a few hundred such ferns
from random nuclei, drawn as light and toned like a photograph.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from epdistill.robustness.guards import derive_seed

PLATES = 5
SMALLEST_PLATE = 256
# Bluish dark glass and white ice, sRGB in [0,1].
GLASS = (0.16, 0.22, 0.31)
ICE = (0.93, 0.98, 1.0)

Array = npt.NDArray[np.float64]


def plate_side(side: int) -> int:
    """The side of the plates for images of this side: at least twice it, and 256 or more."""
    return max(SMALLEST_PLATE, 128 * math.ceil(side / 64))


@lru_cache(maxsize=4)
def frost_plates(side: int) -> Tensor:
    """The five plates, always the same ones, as the five photographs of the script are.

    Args:
        side: S in pixels; a larger plate shows more ferns of the same size.

    Returns:
        (5,S,S,3) float32 in [0,1].
    """
    return torch.stack([_plate(side, number) for number in range(PLATES)])


def _plate(side: int, number: int) -> Tensor:
    """One plate (S,S,3): its own mixture of long ferns, small stars and haze."""
    generator = np.random.default_rng(derive_seed(0, "frost plate", number))
    # Ferns of a size that a piece of 32 pixels shows whole.
    lushness = (1.6, 1.6, 2.0, 1.8, 1.2)[number]
    length = (40.0, 28.0, 50.0, 34.0, 20.0)[number]
    ferns = round(lushness * 2 * (side / length) ** 2)
    light = _draw(_grow(side, ferns, length, generator), side)
    # Ice is thicker in some places than in others; a thin film lies everywhere.
    film = _clouds(side, generator)
    glow = gaussian_filter(light, 1.0, mode="wrap")
    grain = generator.normal(0, 0.05, light.shape)
    depth = 1.6 * gaussian_filter(light, 0.5, mode="wrap") + 0.8 * glow
    tone = 1 - np.exp(-(depth * (0.35 + film) + 0.35 * film**2))
    tone = np.clip(tone + grain, 0, 1)[..., None]
    return torch.from_numpy(np.array(GLASS) * (1 - tone) + np.array(ICE) * tone).float()


def _grow(
    side: int, ferns: int, length: float, generator: np.random.Generator
) -> list[tuple[Array, float]]:
    """Segments of ferns: for each order of branching (M,4) [x, y, angle, length] and its light."""
    stems = np.stack(
        [
            generator.uniform(0, side, ferns),
            generator.uniform(0, side, ferns),
            generator.uniform(0, 2 * np.pi, ferns),
            length * generator.uniform(0.4, 1.3, ferns),
        ],
        axis=1,
    )
    orders = [(stems, 1.0)]
    for light, pairs, share in ((0.8, 8, 0.5), (0.5, 4, 0.4)):
        stems = _branch(stems, pairs, share, generator)
        orders.append((stems, light))
    return orders


def _branch(stems: Array, pairs: int, share: float, generator: np.random.Generator) -> Array:
    """Side branches: pairs along each stem, at 60 degrees, shorter towards the tip."""
    x, y, angle, length = (column[:, None, None] for column in stems.T)
    along = (np.arange(pairs) + generator.uniform(0.2, 0.8, (len(stems), pairs))) / pairs
    along = along[:, :, None]
    shape = (len(stems), pairs, 2)
    turn = np.array([1.0, -1.0]) * np.pi / 3 + generator.normal(0, 0.08, shape)
    reach = share * length * (1.05 - along) * generator.uniform(0.5, 1.2, shape)
    branches = [
        np.broadcast_to(x + along * length * np.cos(angle), shape),
        np.broadcast_to(y + along * length * np.sin(angle), shape),
        np.broadcast_to(angle + turn, shape),
        reach,
    ]
    return np.stack(branches, axis=-1).reshape(-1, 4)


def _draw(orders: list[tuple[Array, float]], side: int) -> Array:
    """Sum the light of all segments on an (S,S) torus, each sampled every half pixel."""
    plate = np.zeros(side * side)
    for segments, light in orders:
        samples = np.maximum(1, np.ceil(2 * segments[:, 3])).astype(int)
        owner = np.repeat(np.arange(len(segments)), samples)
        step = (np.arange(len(owner)) - np.repeat(samples.cumsum() - samples, samples)) / 2
        x = segments[owner, 0] + step * np.cos(segments[owner, 2])
        y = segments[owner, 1] + step * np.sin(segments[owner, 2])
        taper = 1 - 0.6 * step / segments[owner, 3].clip(min=1)
        left, top = np.floor(x), np.floor(y)
        for dx in (0, 1):
            for dy in (0, 1):
                near = (1 - abs(x - left - dx)) * (1 - abs(y - top - dy))
                cell = ((top + dy) % side * side + (left + dx) % side).astype(np.int64)
                plate += np.bincount(cell, 0.5 * light * taper * near, minlength=side * side)
    return plate.reshape(side, side)


def _clouds(side: int, generator: np.random.Generator) -> Array:
    """Slow variation over the plate, (S,S) in [0,1] on a torus."""
    total = sum(
        weight * _standard(gaussian_filter(generator.normal(size=(side, side)), s, mode="wrap"))
        for weight, s in ((0.7, 32.0), (0.5, 12.0), (0.3, 5.0))
    )
    return np.asarray(1 / (1 + np.exp(-1.6 * total)))


def _standard(field: Array) -> Array:
    """The same field with mean 0 and standard deviation 1."""
    return np.asarray((field - field.mean()) / field.std())
