"""Accuracies with their intervals, and threat models in words, as they stand in the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from epdistill.robustness.guards import LINF
from epdistill.robustness.intervals import wilson


def accuracy(right: int, n: int) -> dict[str, Any]:
    """Accuracy, its Wilson 95 % interval, and n: `right` of `n` images, JSON-ready."""
    return {"accuracy": right / n, "ci95": list(wilson(right, n)), "n": n}


def share(wrong: Tensor, scope: Tensor | None = None) -> dict[str, Any]:
    """Accuracy, its Wilson 95 % interval, and n.

    Args:
        wrong: (N,) bool.
        scope: (N,) bool, the images to count; all without it.
    """
    counted = wrong if scope is None else wrong[scope]
    n = len(counted)
    return accuracy(n - int(counted.sum()), n)


def over(shares: Sequence[float], n: int) -> dict[str, Any]:
    """Mean accuracy over seeds, JSON-ready.

    Args:
        shares: One each.
        n: Different images that they are shares of.

    Returns:
        `accuracy`, the mean; `ci95`, Wilson's interval of that share on `n` images; `n`; and
        `std` over seeds, null for a single one.
    """
    mean = fmean(shares)
    return {
        **accuracy(round(mean * n), n),
        "accuracy": mean,
        "std": stdev(shares) if len(shares) > 1 else None,
    }


def threat(case: Mapping[str, Any]) -> str:
    """A row with `norm` and `eps` in words: `clean`, or the ball."""
    return "clean" if case["norm"] == "clean" else ball(case["norm"], case["eps"])


def ball(norm: str, eps: float) -> str:
    """A threat model in words: `Linf 8/255`, `L2 0.5`."""
    return f"Linf {255 * eps:.3g}/255" if norm == LINF else f"L2 {eps:.3g}"
