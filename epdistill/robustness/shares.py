"""Accuracies with their intervals, and threat models in words, as they stand in the results."""

from __future__ import annotations

from collections.abc import Mapping
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


def threat(case: Mapping[str, Any]) -> str:
    """A row with `norm` and `eps` in words: `clean`, or the ball."""
    return "clean" if case["norm"] == "clean" else ball(case["norm"], case["eps"])


def ball(norm: str, eps: float) -> str:
    """A threat model in words: `Linf 8/255`, `L2 0.5`."""
    return f"Linf {255 * eps:.3g}/255" if norm == LINF else f"L2 {eps:.3g}"
