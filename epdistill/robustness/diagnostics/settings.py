"""How hard the diagnosis tries: every budget in one place, recorded with the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import check_eps

GREY = 1 / 255


@dataclass(frozen=True)
class DiagnosticSettings:
    """Budgets and thresholds of the 26 checks.

    The defaults are for some 64 images and a small network on one core; they are below
    the budgets of a paper (10,000 noise samples, 5,000 queries), and stand in the result.
    With 64 digits of 8x8 pixels they take seconds for a small feedforward net and some two
    minutes for an EP-CNN that is attacked along four gradients. Of an EP-CNN for 32x32
    pixels one gradient costs 15 to 50 times as much: take fewer images.

    Attributes:
        images: At most so many images are used, drawn by the seed.
        grid: Radii of the Linf budget curve on pixels in [0,1], increasing, above 0.
        eps: The radius at which attacks are compared; None takes the radius of `grid` at which
            the reported attack leaves nearest to half of the clean accuracy.
        steps: Steps of the reported attack, PGD on every view; also the `n` of check 14.
        starts: Random starts of the reported attack at the radius of comparison. The curve and
            the variations of checks 3 and 14 start once.
        unbounded_steps: PGD steps at eps = 1 (check 12).
        restarts: Numbers of further starts tried in check 16.
        step_factors: Factors on the step size tried in check 16.
        objective_steps: PGD steps per objective (checks 15, 17 and 19).
        targets: Runner-up classes attacked one by one in check 19.
        square_queries: Queries of Square per surviving image (check 9).
        decision_images: Surviving images given to the hard-label attack (check 10).
        decision_queries: Hard-label queries per image (check 10).
        noise_samples: Random points of the ball per surviving image (check 11).
        smooth_points: Noisy copies per image in check 18.
        fidelity_images: Images in check 5.
        directions: Random directions per image in check 5.
        horizon_steps: PGD steps per gradient (check 24).
        horizons: Attack horizons in sweeps; T_pred and 2 T_pred are added (check 24).
        longest_unroll: No attack unrolls more sweeps than this.
        softened_sweeps: Sweeps of the unroll with a softened clamp (check 26).
        residual: A state is at equilibrium when its residual is at most this, or at most the
            schedule's own tolerance where that is larger (check 25).
        control_steps: Optimiser steps of the plain positive control (check 23).
        slack: Share of the images up to which a difference is a WARN and not a FAIL; a single
            image is never a FAIL.
        batch_size: Images that go through a model at once.
    """

    images: int = 64
    grid: tuple[float, ...] = (
        GREY,
        2 * GREY,
        4 * GREY,
        8 * GREY,
        16 * GREY,
        32 * GREY,
        64 * GREY,
    )
    eps: float | None = None
    steps: int = 40
    starts: int = 5
    unbounded_steps: int = 100
    restarts: tuple[int, ...] = (5,)
    step_factors: tuple[float, ...] = (0.25, 4.0)
    objective_steps: int = 40
    targets: int = 9
    square_queries: int = 500
    decision_images: int = 16
    decision_queries: int = 1000
    noise_samples: int = 1000
    smooth_points: int = 100
    fidelity_images: int = 64
    directions: int = 16
    horizon_steps: int = 20
    horizons: tuple[int, ...] = (2, 5, 10, 29, 100)
    longest_unroll: int = 200
    softened_sweeps: int = 15
    residual: float = 1e-3
    control_steps: int = 200
    slack: float = 0.05
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Refuse budgets that measure nothing."""
        counts = (
            ("images", self.images),
            ("steps", self.steps),
            ("starts", self.starts),
            ("unbounded_steps", self.unbounded_steps),
            ("objective_steps", self.objective_steps),
            ("targets", self.targets),
            ("square_queries", self.square_queries),
            ("decision_images", self.decision_images),
            ("decision_queries", self.decision_queries),
            ("noise_samples", self.noise_samples),
            ("smooth_points", self.smooth_points),
            ("fidelity_images", self.fidelity_images),
            ("directions", self.directions),
            ("horizon_steps", self.horizon_steps),
            ("longest_unroll", self.longest_unroll),
            ("softened_sweeps", self.softened_sweeps),
            ("control_steps", self.control_steps),
            ("batch_size", self.batch_size),
        )
        for name, count in counts:
            if count < 1:
                raise EvaluationError(f"received {name} = {count}; expected at least 1")
        _check_lists(self.restarts, self.horizons, self.step_factors)
        if not self.grid or any(low >= high for low, high in pairwise((0.0, *self.grid))):
            raise EvaluationError(
                f"received the radii {self.grid}; expected them above 0 and increasing: sort them "
                "and drop doubles"
            )
        for eps in self.grid if self.eps is None else (*self.grid, self.eps):
            check_eps(eps)
        if self.eps == 0:
            raise EvaluationError("received eps = 0; expected a radius above 0, or None")
        if not 0 <= self.slack < 1 or not self.residual > 0:
            raise EvaluationError(
                f"received slack = {self.slack} and residual = {self.residual}; expected a slack "
                "from 0 to below 1 and a residual above 0"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def _check_lists(
    restarts: Sequence[int], horizons: Sequence[int], factors: Sequence[float]
) -> None:
    if not all(n >= 1 for n in (*restarts, *horizons)) or not all(f > 0 for f in factors):
        raise EvaluationError(
            f"received restarts {restarts}, horizons {horizons} and step_factors {factors}; "
            "expected restarts and horizons of at least 1 and factors above 0"
        )
