"""Attacks as pure functions: model, images and labels in, adversarial images out.

Attacks in a ball take a radius, minimal-norm attacks make the distance as small
as they can. They stand on torchattacks, mended where it is wrong (each module
says where), on the authors' own AutoAttack, and on code of our own where there
was none. No attack touches the global generators, `.grad`, or a module's mode,
and every image that leaves has been checked against the ball and [0,1].
"""

from __future__ import annotations

from epdistill.robustness.attacks.apgd import APGDSettings, apgd_l2, apgd_linf
from epdistill.robustness.attacks.autoattack import (
    AutoAttackSettings,
    autoattack_l2,
    autoattack_linf,
)
from epdistill.robustness.attacks.carlini_wagner import CWSettings, carlini_wagner
from epdistill.robustness.attacks.common import margin_of_cross_entropy
from epdistill.robustness.attacks.counting import Counted, counted
from epdistill.robustness.attacks.deepfool import DeepFoolSettings, deepfool
from epdistill.robustness.attacks.expectation import Expectation, expectation
from epdistill.robustness.attacks.hop_skip_jump import HopSkipJumpSettings, hop_skip_jump
from epdistill.robustness.attacks.noise import NoiseSettings, noise_l2, noise_linf
from epdistill.robustness.attacks.pgd import FGSMSettings, PGDSettings, fgsm, pgd_l2, pgd_linf
from epdistill.robustness.attacks.square import SquareSettings, square_l2, square_linf

__all__ = [
    "APGDSettings",
    "AutoAttackSettings",
    "CWSettings",
    "Counted",
    "DeepFoolSettings",
    "Expectation",
    "FGSMSettings",
    "HopSkipJumpSettings",
    "NoiseSettings",
    "PGDSettings",
    "SquareSettings",
    "apgd_l2",
    "apgd_linf",
    "autoattack_l2",
    "autoattack_linf",
    "carlini_wagner",
    "counted",
    "deepfool",
    "expectation",
    "fgsm",
    "hop_skip_jump",
    "margin_of_cross_entropy",
    "noise_l2",
    "noise_linf",
    "pgd_l2",
    "pgd_linf",
    "square_l2",
    "square_linf",
]
