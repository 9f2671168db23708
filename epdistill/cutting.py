"""Which images go where: shares of every class, and stratified beginnings."""

from __future__ import annotations

import torch
from torch import Tensor


def take_share(labels: Tensor, ranking: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Of each class take the share that stands first in a ranking.

    Args:
        labels: int64 (N,), at least two of each class that occurs.
        ranking: A permutation of the indices, int64 (N,).
        fraction: Of each class, rounded, but at least one and not all.

    Returns:
        Indices taken and indices left, both in ascending order.
    """
    taken = torch.zeros(len(labels), dtype=torch.bool)
    ranked = labels[ranking]
    for label in sorted(set(labels.tolist())):
        members = ranking[ranked == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken[members[:count]] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()


def first_of(labels: Tensor, limit: int) -> Tensor:
    """Ascending indices of the first `limit` images, in the classes' proportions."""
    # Image r of a class of n comes at "time" r / n: every prefix is stratified.
    times = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        times[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
    return times.argsort(stable=True)[:limit].sort().values
