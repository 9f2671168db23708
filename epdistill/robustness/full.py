"""`--suite full`: every attack of the toolkit, all corruptions, the sweep over horizons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import (
    APGDSettings,
    AutoAttackSettings,
    CWSettings,
    DeepFoolSettings,
    FGSMSettings,
    HopSkipJumpSettings,
    NoiseSettings,
    PGDSettings,
    SquareSettings,
    apgd_l2,
    apgd_linf,
    autoattack_l2,
    autoattack_linf,
    carlini_wagner,
    deepfool,
    fgsm,
    hop_skip_jump,
    noise_l2,
    noise_linf,
    pgd_l2,
    pgd_linf,
    square_l2,
    square_linf,
)
from epdistill.robustness.corruptions import EXTRA, MAIN, SEVERITIES
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.suites import Attack, QuickSuite, TemporalSettings, attack

# The package behind AutoAttack; it has no smaller stand-in.
AUTOATTACK = "pyautoattack"
# Forward passes per image that withstands it, roughly.
AUTOATTACK_COST = 20_000
# Fewer images of a model that relaxes would say too little.
FEWEST = 100


@dataclass(frozen=True)
class FullSuite(QuickSuite):
    """The attacks and corruptions of `--suite full`; replace any field to change it.

    Attributes:
        apgd: Settings of both APGDs, on the DLR loss.
        carlini_wagner: Settings of Carlini and Wagner's attack.
        deepfool: Settings of DeepFool.
        noise: Settings of both random noises.
        hop_skip_jump_queries: Queries of HopSkipJump per image.
        hop_skip_jump_images: On how many images it is run.
        autoattack: Settings of AutoAttack.
        autoattack_images: On how many images of a model that relaxes it is run, at least 100
            (fewer only where fewer are evaluated); on all of the others. Both at the middle
            radius of each norm, which is that of the temporal sweep.
        horizons: The temporal sweep.
        diagnosed_images: On how many images masked gradients and basins are looked for.
    """

    pgd: PGDSettings = field(default_factory=lambda: PGDSettings(steps=40, restarts=5))
    square: SquareSettings = field(default_factory=lambda: SquareSettings(queries=1000))
    apgd: APGDSettings = field(default_factory=APGDSettings)
    carlini_wagner: CWSettings = field(default_factory=CWSettings)
    deepfool: DeepFoolSettings = field(default_factory=DeepFoolSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    hop_skip_jump_queries: int = 2000
    hop_skip_jump_images: int = 20
    autoattack: AutoAttackSettings = field(default_factory=AutoAttackSettings)
    autoattack_images: int = 100
    corruptions: tuple[str, ...] = (*MAIN, *EXTRA)
    severities: tuple[int, ...] = SEVERITIES
    horizons: TemporalSettings | None = field(default_factory=TemporalSettings)
    diagnosed_images: int = 64
    name: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.hop_skip_jump_images, self.diagnosed_images)
        if min(counts) < 1 or self.autoattack_images < FEWEST:
            raise EvaluationError(
                "received hop_skip_jump_images, diagnosed_images and autoattack_images of "
                f"{(*counts, self.autoattack_images)}; expected at least 1, 1 and {FEWEST}"
            )

    def offered(self) -> tuple[Attack, ...]:
        """White box first, cheap before costly; what asks for answers only comes last."""
        rows = [
            attack("pgd", LINF, pgd_linf, self.pgd, self.climb()),
            attack("pgd", L2, pgd_l2, self.pgd, self.climb()),
            attack("fgsm", LINF, fgsm, FGSMSettings(), 3, alone=True, sends=False),
        ]
        climb = 3 * self.apgd.steps * self.apgd.restarts
        name, least = f"apgd-{self.apgd.loss}", 3 if self.apgd.loss == "dlr" else 2
        rows += [
            attack(name, LINF, apgd_linf, self.apgd, climb, classes=least),
            attack(name, L2, apgd_l2, self.apgd, climb, classes=least),
        ]
        c_w = self.carlini_wagner
        climb = 3 * c_w.steps * max(1, c_w.binary_search_steps)
        answers = {"white_box": False}
        queries, samples = self.square.queries, self.noise.samples
        rows += [
            attack("deepfool", L2, deepfool, self.deepfool, 3 * self.deepfool.steps, nearest=True),
            attack("carlini-wagner", L2, carlini_wagner, c_w, climb, nearest=True),
            attack("square", LINF, square_linf, self.square, queries, **answers),
            attack("square", L2, square_l2, self.square, queries, **answers),
            attack("noise", LINF, noise_linf, self.noise, samples, alone=True, **answers),
            attack("noise", L2, noise_l2, self.noise, samples, alone=True, **answers),
        ]
        for norm in (LINF, L2):
            hard = HopSkipJumpSettings(queries=self.hop_skip_jump_queries, norm=norm)
            rows.append(
                attack(
                    "hop-skip-jump",
                    norm,
                    hop_skip_jump,
                    hard,
                    hard.queries,
                    nearest=True,
                    images=self.hop_skip_jump_images,
                    **answers,
                )
            )
        return (*rows, self._ensemble(LINF, autoattack_linf), self._ensemble(L2, autoattack_l2))

    def _ensemble(self, norm: str, run: Callable[..., Tensor]) -> Attack:
        """AutoAttack at the middle radius of a norm."""
        return attack(
            "autoattack",
            norm,
            run,
            self.autoattack,
            AUTOATTACK_COST,
            radii=self.middle(norm),
            relaxed_images=self.autoattack_images,
            classes=4,
            alone=True,
            all_views=False,
            sends=False,
            requires=AUTOATTACK,
        )

    def diagnosed(self) -> int | None:
        """On how many images; not where some attacks alone are wanted."""
        return self.diagnosed_images if self.only is None else None
