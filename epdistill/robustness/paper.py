"""`--suite paper`: the published protocol cell by cell, and beside it what adaptive attacks leave.

The protocol is that of S. Mansingh et al., "How Robust Are Energy-Based Models
Trained With Equilibrium Propagation?" (arXiv:2401.11543), and of its code where the
two differ: PGD with 20 steps of 2.5 eps / 20, no random start, climbing the loss of
the *predicted* label, no clipping to [0,1], the last iterate; Square with 1000
queries and AutoAttack on the first 200 images; Carlini and Wagner at four fixed
constants. Teachers are attacked through 70 unrolled synchronous sweeps and judged
after 250, on corrupted images after 29.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from epdistill.robustness.attacks import (
    AutoAttackSettings,
    CWSettings,
    PGDSettings,
    SquareSettings,
    autoattack_linf,
    carlini_wagner,
    pgd_l2,
    pgd_linf,
    square_linf,
)
from epdistill.robustness.corruptions import EXTRA, MAIN, SEVERITIES
from epdistill.robustness.full import AUTOATTACK, AUTOATTACK_COST
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.published import PublishedPGD, published_pgd
from epdistill.robustness.suites import FIRST, Attack, QuickSuite, attack

# What the inherited field is annotated with: the reference resolves it here.
from epdistill.robustness.suites import TemporalSettings as TemporalSettings

ATTACK_SWEEPS = 70
PREDICTION_SWEEPS = 250
# The default of the published code, which its corruption figures left as it was.
CORRUPTED_SWEEPS = 29
# Square and AutoAttack were run on this many.
FIRST_IMAGES = 200
CONSTANTS = (0.005, 0.01, 0.1, 1.0)


def _grid(low: float, high: float, more: float) -> tuple[float, ...]:
    grid = np.logspace(np.log10(low), np.log10(high), 10)
    return tuple(sorted({*(float(f"{eps:.6g}") for eps in grid), more}))


LINF_GRID = _grid(1e-4, 0.1, 8 / 255)
L2_GRID = _grid(0.05, 3.0, 1.0)
# The columns of the published tables; 8/255 stands for .0314.
TABLE_LINF = (LINF_GRID[5], LINF_GRID[6], LINF_GRID[7], 8 / 255)
TABLE_L2 = (L2_GRID[1], L2_GRID[4], L2_GRID[5], 1.0)


@dataclass(frozen=True)
class PaperSuite(QuickSuite):
    """The published protocol and the adaptive attacks beside it.

    Attributes:
        pgd: Settings of the adaptive PGDs, which run on all views.
        square: Settings of Square in both.
        autoattack: Settings of AutoAttack.
        constants: Carlini and Wagner's c.
        cw_steps: Their steps; neither the paper nor its code says how many.
        cw_lr: Their step size, in the same way.
        table_linf: The radii of Square and AutoAttack.
        table_l2: With these, the radii that the average robust accuracy is taken over.
    """

    linf: tuple[float, ...] = LINF_GRID
    l2: tuple[float, ...] = L2_GRID
    pgd: PGDSettings = field(default_factory=lambda: PGDSettings(steps=20, restarts=5))
    square: SquareSettings = field(default_factory=lambda: SquareSettings(queries=1000))
    autoattack: AutoAttackSettings = field(default_factory=AutoAttackSettings)
    constants: tuple[float, ...] = CONSTANTS
    cw_steps: int = 50
    cw_lr: float = 0.01
    table_linf: tuple[float, ...] = TABLE_LINF
    table_l2: tuple[float, ...] = TABLE_L2
    corruptions: tuple[str, ...] = (*MAIN, *EXTRA)
    severities: tuple[int, ...] = SEVERITIES
    name: str = "paper"

    def offered(self) -> tuple[Attack, ...]:
        """The adaptive attacks: the true labels, random starts, every view, transfer."""
        square, cost = self.square, self.square.queries
        return (
            attack("pgd", LINF, pgd_linf, self.pgd, self.climb()),
            attack("pgd", L2, pgd_l2, self.pgd, self.climb()),
            attack(
                "square", LINF, square_linf, square, cost, white_box=False, radii=self.table_linf
            ),
        )

    def published(self) -> tuple[Attack, ...]:
        """The cells of the published tables; one attack for each constant of C&W."""
        steps = PublishedPGD()
        rows = [
            attack("pgd", norm, published_pgd(norm), steps, 3 * steps.steps, as_published=True)
            for norm in (L2, LINF)
        ]
        queries = self.square.queries
        rows.append(
            attack(
                "square",
                LINF,
                square_linf,
                self.square,
                queries,
                white_box=False,
                radii=self.table_linf,
                images=FIRST_IMAGES,
            )
        )
        rows.append(
            attack(
                "autoattack",
                LINF,
                autoattack_linf,
                self.autoattack,
                AUTOATTACK_COST,
                radii=self.table_linf,
                images=FIRST_IMAGES,
                classes=4,
                requires=AUTOATTACK,
            )
        )
        for constant in self.constants:
            fixed = CWSettings(
                c=constant, steps=self.cw_steps, lr=self.cw_lr, binary_search_steps=0
            )
            rows.append(
                attack("carlini-wagner", L2, carlini_wagner, fixed, 3 * fixed.steps, nearest=True)
            )
        return tuple(rows)

    def averaged(self, attack: Attack, eps: float) -> bool:
        """The tables hold PGD in L2 only, at four of its radii."""
        if attack.name != "pgd":
            return True
        return attack.norm == L2 and eps in self.table_l2

    def subset(self) -> str:
        """The published figures are on the first images."""
        return FIRST
