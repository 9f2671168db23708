"""The uncertainty exponent: how fast doubt about the fixed point vanishes with the perturbation.

Grebogi, McDonald, Ott and Yorke ("Final state sensitivity", Phys. Lett. A 99, 1983):
of the points moved by eps a share f(eps) ~ eps^alpha ends elsewhere, and
alpha = D - d for a boundary of dimension d in D dimensions. A smooth boundary has
alpha = 1; the nearer alpha is to 0, the less does a smaller perturbation help.

Here the image is moved and the relaxation starts as it always does. A fixed point
then also drifts with its image, without becoming another one. So what counts is
a jump: the segment between the two images is halved towards the larger change of
state until that change is within the error of settling (a drift) or is still there
when the segment has shrunk to nothing (another fixed point).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import check_images, derive_seed
from epdistill.robustness.units import split

# Images (n,C,H,W) in [0,1] to labels (n,) and settled states (n,units).
Settle = Callable[[Tensor], tuple[Tensor, Tensor]]
Array = NDArray[np.float64]

# A state whose residual is r lies within r / (1 - q) of its fixed point where the slowest
# mode shrinks by q per sweep: two states that differ by more than this many tolerances are
# two fixed points unless q > 0.98.
TOLERANCES = 100
# Largest change of a pixel at which a change of state is no drift: with the usual
# tolerance of 1e-4, a slope of 10,000 counts as a jump.
POINT = 1e-6
# A share rests on at least so many changes on so many images; above MOST the power law
# has levelled off.
CHANGES, IMAGES, MOST = 10, 5, 0.5
# Radii that a line is drawn through, at least.
POINTS = 3
RESAMPLES = 1000


@dataclass(frozen=True)
class BasinSettings:
    """How finely basins are probed.

    Attributes:
        eps: Sizes of the perturbation, increasing: every pixel moves by this much up or
            down, as far as [0,1] allows.
        samples: Random perturbations per image and size.
        tolerance: The residual at which states count as settled; a jump is a change of
            state by more than 100 tolerances in some unit.
        batch_size: Images settled at once.
    """

    eps: tuple[float, ...] = tuple(2.0**-k for k in range(13, 3, -1))
    samples: int = 16
    tolerance: float = 1e-4
    batch_size: int = 256

    def __post_init__(self) -> None:
        ends = (POINT, *self.eps, 1.0 + POINT)
        if not self.eps or any(low >= high for low, high in pairwise(ends)):
            raise EvaluationError(
                f"received the sizes {self.eps}; expected them increasing, above {POINT} and at "
                "most 1: sort them and drop doubles"
            )
        if self.samples < 1 or self.batch_size < 1 or not self.tolerance > 0:
            raise EvaluationError(
                f"received samples = {self.samples}, batch_size = {self.batch_size} and tolerance "
                f"= {self.tolerance}; expected at least 1, at least 1 and above 0"
            )


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """f(eps) = exp(intercept) * eps^alpha, fitted in logarithms.

    Attributes:
        eps: (E,) sizes of the perturbation.
        changed: (E,N) int64, of each image's perturbations, how many ended elsewhere.
        samples: Perturbations per image and size.
        alpha: The exponent; None where there is too little to fit.
        intercept: Natural logarithm of f at eps = 1; None without alpha.
        ci95: Percentile interval of alpha over images drawn with replacement.
        fitted: The sizes that the line goes through.
        note: Why there is no exponent; empty otherwise.
    """

    eps: Array
    changed: NDArray[np.int64]
    samples: int
    alpha: float | None = None
    intercept: float | None = None
    ci95: tuple[float, float] | None = None
    fitted: tuple[float, ...] = ()
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, and as `pictures.uncertainty_plot` reads a series."""
        n = self.samples * self.changed.shape[1]
        counts = self.changed.sum(axis=1)
        return {
            "eps": self.eps.tolist(),
            "f": (counts / n).tolist(),
            "changed": counts.tolist(),
            "images_changed": (self.changed > 0).sum(axis=1).tolist(),
            "n": n,
            "alpha": self.alpha,
            "intercept": self.intercept,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "fitted": list(self.fitted),
            "note": self.note,
        }


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """How sensitive the final state is to the image.

    Attributes:
        states: Perturbations that end in another fixed point.
        labels: Perturbations that end in another label, by a jump or by a drift.
        images: How many images were perturbed.
        settings: Sizes, samples, tolerance.
        seed: Of the perturbations and of the interval.
    """

    states: PowerLaw
    labels: PowerLaw
    images: int
    settings: BasinSettings = field(repr=False)
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: both power laws and what they rest on."""
        return {
            "states": self.states.as_dict(),
            "labels": self.labels.as_dict(),
            "images": self.images,
            "samples": self.settings.samples,
            "norm": "linf",
            "tolerance": self.settings.tolerance,
            "jump": TOLERANCES * self.settings.tolerance,
            "seed": self.seed,
        }


def uncertainty_exponent(
    settle: Settle,
    images: Tensor,
    *,
    seed: int,
    settings: BasinSettings = BasinSettings(),
) -> Uncertainty:
    """Fit the uncertainty exponent of fixed points and of labels.

    Args:
        settle: Images (n,C,H,W) in [0,1] to labels (n,) int64 and settled states (n,units),
            always from the same start. A state that has not settled may look like a jump.
        images: (N,C,H,W) floating point in [0,1], where `settle` expects them.
        seed: Fixes everything random.
        settings: Sizes, samples, tolerance.

    Raises:
        EvaluationError: No images, or images that cannot be used.
    """
    check_images(images, torch.zeros(len(images), dtype=torch.int64))
    if len(images) == 0:
        raise EvaluationError("received no images; expected at least one to perturb")
    probe = _Probe(settle, settings.batch_size, TOLERANCES * settings.tolerance)
    origin = probe.settled(images)
    shape = (len(settings.eps), len(images))
    jumped, relabelled = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, eps in enumerate(settings.eps):
        generator = torch.Generator().manual_seed(derive_seed(seed, "basins", eps))
        for _ in range(settings.samples):
            uniform = torch.rand(images.shape, generator=generator).to(images)
            moved = (images + eps * torch.where(uniform < 0.5, -1.0, 1.0).to(images)).clamp(0, 1)
            end = probe.settled(moved)
            jumped[row] += probe.jumps(images, moved, origin[1], end[1]).cpu().numpy()
            relabelled[row] += (end[0] != origin[0]).cpu().numpy()
    sizes = np.array(settings.eps)
    laws = [
        fit_power_law(sizes, changed, settings.samples, derive_seed(seed, "basins", what))
        for what, changed in (("states", jumped), ("labels", relabelled))
    ]
    return Uncertainty(laws[0], laws[1], len(images), settings, seed)


@dataclass(frozen=True)
class _Probe:
    """A way to settle images, and what counts as a jump of the state."""

    settle: Settle
    batch_size: int
    jump: float

    def settled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (n,) and states (n,units), in batches."""
        with torch.no_grad():
            labels, states = zip(*map(self.settle, split(images, self.batch_size)), strict=True)
        return torch.cat(labels), torch.cat(states)

    def jumps(self, first: Tensor, last: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Whether the state jumps between two images, (n,) bool.

        Args:
            first: (n,C,H,W), one end of each segment.
            last: (n,C,H,W), the other.
            near: (n,units), the states settled at `first`.
            far: (n,units), at `last`.
        """
        found = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        rows = torch.arange(len(first), device=first.device)
        while True:
            apart = _gap(near, far) > self.jump
            point = (last - first).flatten(1).abs().amax(dim=1) <= POINT
            found[rows[apart & point]] = True
            go = apart & ~point
            if not bool(go.any()):
                return found
            rows, first, last, near, far = (t[go] for t in (rows, first, last, near, far))
            middle = (first + last) / 2
            _, there = self.settled(middle)
            # On into the half with the larger change.
            left = _gap(near, there) >= _gap(there, far)
            pixels, units = left[:, None, None, None], left[:, None]
            first, last = torch.where(pixels, first, middle), torch.where(pixels, middle, last)
            near, far = torch.where(units, near, there), torch.where(units, there, far)


def _gap(some: Tensor, others: Tensor) -> Tensor:
    """The largest change of a unit, (n,): residuals are measured in the same norm."""
    return (some - others).abs().amax(dim=1)


def fit_power_law(eps: Array, changed: NDArray[np.int64], samples: int, seed: int) -> PowerLaw:
    """Fit log f = intercept + alpha log eps by least squares.

    Sizes at which fewer than 10 perturbations or 5 images changed, or more than half of
    all perturbations did, are left out. The interval is a percentile bootstrap over
    images: an image's perturbations are not independent of each other.

    Args:
        eps: (E,), increasing, above 0.
        changed: (E,N), of each image's perturbations, how many ended elsewhere.
        samples: Perturbations per image and size.
        seed: Of the bootstrap.
    """
    images = changed.shape[1]
    n = samples * images
    counts = changed.sum(axis=1)
    enough = (counts >= CHANGES) & ((changed > 0).sum(axis=1) >= IMAGES)
    chosen = enough & (counts <= MOST * n)
    fitted = tuple(eps[chosen].tolist())
    if len(fitted) < POINTS:
        note = (
            f"no exponent: of {len(eps)} sizes only {len(fitted)} have {CHANGES} to "
            f"{int(MOST * n)} changes among {n} perturbations, on {IMAGES} images or more; "
            f"{POINTS} are needed: take more images or samples"
        )
        if counts.max() > MOST * n:
            note += ", or smaller sizes"
        return PowerLaw(eps, changed, samples, fitted=fitted, note=note)
    log_eps = np.log(eps[chosen])
    alpha, intercept = np.polyfit(log_eps, np.log(counts[chosen] / n), 1)

    rng = np.random.default_rng(seed)
    # How often each image is drawn, (RESAMPLES,N).
    draws = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    # Half a change stands for none, which has no logarithm.
    again = np.maximum(changed[chosen] @ draws.T, 0.5)
    slopes = np.polyfit(log_eps, np.log(again / n), 1)[0]
    low, high = np.quantile(slopes, (0.025, 0.975))
    return PowerLaw(
        eps, changed, samples, float(alpha), float(intercept), (float(low), float(high)), fitted
    )
