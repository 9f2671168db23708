"""How sure an accuracy measured on n images is."""

from __future__ import annotations

import math

from epdistill.errors import EvaluationError

# Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share.

    Unlike the textbook interval p +- z sqrt(p(1-p)/n) it stays inside [0, 1]
    and does not shrink to a point at 0 or n successes, where robust accuracies
    often lie (E. B. Wilson, JASA 22, 1927).

    Args:
        successes: How many of the `n` images counted, 0..n.
        n: How many images were looked at, at least 1.

    Returns:
        The interval's ends, `0 <= low <= successes / n <= high <= 1`.

    Raises:
        EvaluationError: `n` is below 1, or `successes` is outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise EvaluationError(
            f"received {successes} successes of n = {n}; expected 0 <= successes <= n and n >= 1: "
            "evaluate at least one image"
        )
    share = successes / n
    scale = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / scale
    # At the ends the formula is exact on paper but not in floating point.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high
