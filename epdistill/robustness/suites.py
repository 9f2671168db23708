"""Which attacks, at which strengths, and which corruptions make up an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    PGDSettings,
    SquareSettings,
    pgd_l2,
    pgd_linf,
    square_linf,
)
from epdistill.robustness.corruptions import check_corruption
from epdistill.robustness.guards import L2, LINF, NORMS, check_eps

QUICK = "quick"
SUITES = (QUICK, "paper", "full")
FIRST, RANDOM = "first", "random"
SUBSETS = (FIRST, RANDOM)

View = TypeVar("View")


@dataclass(frozen=True)
class Attack:
    """One attack of a suite.

    Attributes:
        name: As it stands in the results, for example `"pgd"`.
        norm: `"linf"` or `"l2"`.
        white_box: Whether it needs the gradients of a view, or only answers.
        run: The attack itself.
        cost: Roughly how many forward passes it takes per image, for the progress bar.
        nearest: It has no radius but looks for the nearest adversarial image; it is run
            once and counts at every radius that this image lies within.
        radii: Its own radii; None for those of its norm.
        images: On how many of the images it is run, None for all.
        relaxed_images: The same for models that relax; None for `images`.
        classes: The fewest classes that its loss can compare; it is skipped below.
        alone: Run also on the images that earlier attacks have broken, so that its own
            strength shows. The worst case is the same.
        all_views: False for the first view only.
        sends: What it crafts is tried on the other subjects.
        as_published: It is handed the predicted labels, and its images may leave [0,1]: only
            for repeating a published figure.
        requires: The package without which it is skipped.
        settings: Its hyperparameters, JSON-ready.
    """

    name: str
    norm: str
    white_box: bool
    run: Callable[..., Tensor]
    cost: int
    nearest: bool = False
    radii: tuple[float, ...] | None = None
    images: int | None = None
    relaxed_images: int | None = None
    classes: int = 2
    alone: bool = False
    all_views: bool = True
    sends: bool = True
    as_published: bool = False
    requires: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, views: Mapping[str, View]) -> Mapping[str, View]:
        """The views that it attacks."""
        return views if self.all_views else dict(list(views.items())[:1])

    def describe(self) -> dict[str, Any]:
        """Every setting, JSON-ready."""
        names = ("name", "norm", "white_box", "nearest", "radii", "images", "relaxed_images")
        shown = {name: getattr(self, name) for name in (*names, "alone", "all_views")}
        return {**shown, "settings": dict(self.settings)}


def attack(
    name: str,
    norm: str,
    function: Callable[..., Tensor],
    settings: Any,
    cost: int,
    *,
    white_box: bool = True,
    **more: Any,
) -> Attack:
    """An `Attack` from a function and its settings dataclass."""
    run = partial(function, settings=settings)
    return Attack(name, norm, white_box, run, cost, settings=asdict(settings), **more)


@dataclass(frozen=True)
class TemporalSettings:
    """The sweep over attack and prediction horizons, for models that relax.

    Attributes:
        attack_sweeps: Lengths of the unroll that PGD goes through.
        prediction_sweeps: Sweeps after which the answer is read; the settled state is
            always read as well.
        pgd: Settings of the PGDs.
        images: On how many of the images.
    """

    attack_sweeps: tuple[int, ...] = (5, 10, 29, 70)
    prediction_sweeps: tuple[int, ...] = (10, 29, 70, 250)
    pgd: PGDSettings = field(default_factory=PGDSettings)
    images: int = 100

    def __post_init__(self) -> None:
        sweeps = (*self.attack_sweeps, *self.prediction_sweeps)
        if self.images < 1 or any(count < 1 for count in sweeps):
            raise EvaluationError(f"received {self}; expected images and sweeps of at least 1")


@dataclass(frozen=True)
class QuickSuite:
    """The attacks and corruptions of `--suite quick`; replace any field to change it.

    Attributes:
        linf: Radii of the Linf ball on pixels in [0,1], increasing.
        l2: Radii of the L2 ball on pixels in [0,1], increasing.
        pgd: Settings of both PGDs.
        square: Settings of Square, which runs on the Linf radii.
        corruptions: Names from `epdistill.robustness.corruptions.CORRUPTIONS`.
        severities: Among 1..5.
        exhaustive: Attack also the images that an earlier attack of the same subject and
            norm has broken at this radius or a smaller one. It takes longer and changes no
            worst case over the subject's own attacks, but lets views and attacks be compared
            one by one.
        samples: Draws of a stochastic model that its gradients and answers are the mean of.
        horizons: The sweep over horizons, for models that relax; None to leave it out.
        only: Names of the attacks that are run; None for all that the suite has.
        name: As it stands in the results.
    """

    linf: tuple[float, ...] = (2 / 255, 4 / 255, 8 / 255, 16 / 255)
    l2: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    pgd: PGDSettings = field(default_factory=PGDSettings)
    square: SquareSettings = field(default_factory=SquareSettings)
    corruptions: tuple[str, ...] = (
        "gaussian_noise",
        "impulse_noise",
        "defocus_blur",
        "brightness",
        "contrast",
    )
    severities: tuple[int, ...] = (1, 3, 5)
    exhaustive: bool = False
    samples: int = 20
    horizons: TemporalSettings | None = None
    only: tuple[str, ...] | None = None
    name: str = QUICK

    def __post_init__(self) -> None:
        for norm in NORMS:
            grid = self.grid(norm)
            for eps in grid:
                check_eps(eps)
            if any(low >= high for low, high in pairwise(grid)):
                raise EvaluationError(
                    f"received the {norm} radii {grid}; expected them increasing: sort them and "
                    "drop doubles"
                )
        for name in self.corruptions:
            for severity in self.severities:
                check_corruption(name, severity)
        if self.samples < 1:
            raise EvaluationError(f"received {self.samples} samples; expected at least 1")
        if self.only is not None:
            self._check_names(self.only)

    def _check_names(self, only: tuple[str, ...]) -> None:
        names = tuple(dict.fromkeys(attack.name for attack in self.offered()))
        unknown = sorted(set(only) - set(names))
        if unknown or not only:
            raise EvaluationError(
                f"received the attacks {', '.join(unknown) or 'none'}; suite {self.name} has "
                f"{', '.join(names)}"
            )

    def grid(self, norm: str) -> tuple[float, ...]:
        """The radii at which the attacks of a norm run."""
        return {LINF: self.linf, L2: self.l2}[norm]

    def radii(self, attack: Attack) -> tuple[float, ...]:
        """The radii of one attack: its own, or those of its norm."""
        return self.grid(attack.norm) if attack.radii is None else attack.radii

    def middle(self, norm: str) -> tuple[float, ...]:
        """The middle radius of a norm's grid; none of an empty grid."""
        grid = self.grid(norm)
        return grid[len(grid) // 2 :][:1]

    def climb(self) -> int:
        """The cost of one PGD: a gradient step is about three forward passes."""
        return 3 * self.pgd.steps * self.pgd.restarts

    def attacks(self) -> tuple[Attack, ...]:
        """The attacks that are run, in their order."""
        return tuple(one for one in self.offered() if self.only is None or one.name in self.only)

    def offered(self) -> tuple[Attack, ...]:
        """All that the suite has: white box first, then black box on what is left."""
        square, cost = self.square, self.square.queries
        return (
            attack("pgd", LINF, pgd_linf, self.pgd, self.climb()),
            attack("pgd", L2, pgd_l2, self.pgd, self.climb()),
            attack("square", LINF, square_linf, square, cost, white_box=False),
        )

    def temporal(self) -> TemporalSettings | None:
        """The sweep over horizons; None to leave it out."""
        return self.horizons

    def published(self) -> tuple[Attack, ...]:
        """The cells of the published protocol; none to leave it out."""
        return ()

    def averaged(self, attack: Attack, eps: float) -> bool:
        """Whether a cell of the published protocol belongs to the published average."""
        return True

    def diagnosed(self) -> int | None:
        """On how many images to look for masked gradients and basins; None to leave it out."""
        return None

    def subset(self) -> str:
        """How a limited number of images is chosen unless said otherwise."""
        return RANDOM


def find_suite(suite: str | QuickSuite) -> QuickSuite:
    """The suite of a name, or the given one.

    Raises:
        EvaluationError: An unknown name.
    """
    if isinstance(suite, QuickSuite):
        return suite
    if suite == QUICK:
        return QuickSuite()
    if suite == "paper":
        from epdistill.robustness.paper import PaperSuite

        return PaperSuite()
    if suite == "full":
        from epdistill.robustness.full import FullSuite

        return FullSuite()
    raise EvaluationError(f"received suite {suite!r}; expected one of {', '.join(SUITES)}")
