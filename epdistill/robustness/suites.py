"""Which attacks, at which strengths, and which corruptions make up an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Protocol

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
from epdistill.robustness.subjects import Predict


class RunAttack(Protocol):
    """The shape of an attack whose settings have been filled in."""

    def __call__(
        self,
        model: Predict,
        images: Tensor,
        labels: Tensor,
        eps: float,
        *,
        seed: int,
        index: Tensor | None = None,
    ) -> Tensor:
        """(N,C,H,W) images in [0,1] in, adversarial ones out."""
        ...


@dataclass(frozen=True)
class Attack:
    """One attack of a suite.

    Attributes:
        name: As it stands in the results, for example `"pgd"`.
        norm: `"linf"` or `"l2"`.
        white_box: Whether it needs the gradients of a view, or only answers.
        run: The attack itself.
        cost: Roughly how many forward passes it takes per image, for the progress bar.
    """

    name: str
    norm: str
    white_box: bool
    run: RunAttack
    cost: int


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
    name: str = "quick"

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

    def grid(self, norm: str) -> tuple[float, ...]:
        """The radii at which the attacks of a norm run."""
        return {LINF: self.linf, L2: self.l2}[norm]

    def attacks(self) -> tuple[Attack, ...]:
        """The attacks in their order: white box first, then black box on what is left."""
        # A gradient step is a forward and a backward pass, about three forwards.
        climb = 3 * self.pgd.steps * self.pgd.restarts
        return (
            Attack("pgd", LINF, True, partial(pgd_linf, settings=self.pgd), climb),
            Attack("pgd", L2, True, partial(pgd_l2, settings=self.pgd), climb),
            Attack(
                "square",
                LINF,
                False,
                partial(square_linf, settings=self.square),
                self.square.queries,
            ),
        )


SUITES: Mapping[str, Callable[[], QuickSuite]] = {"quick": QuickSuite}


def find_suite(suite: str | QuickSuite) -> QuickSuite:
    """The suite of a name, or the given one.

    Raises:
        EvaluationError: An unknown name.
    """
    if isinstance(suite, QuickSuite):
        return suite
    if suite not in SUITES:
        raise EvaluationError(f"received suite {suite!r}; expected one of {', '.join(SUITES)}")
    return SUITES[suite]()
