"""The published figures that ours stand beside: accuracies in 0..1, at full size.

S. Mansingh et al., "How Robust Are Energy-Based Models Trained With Equilibrium Propagation?"
(arXiv:2401.11543): tables 1 and 3 to 6, radii as in `epdistill.robustness.paper`. Two rows are
taken from the data files published with it: the AutoAttack row of the EP-CNN on CIFAR-10, which
is printed as a copy of its PGD row, and its PGD at Linf 8/255.
"""

from __future__ import annotations

from collections.abc import Mapping

from epdistill.teachers.figures import PUBLISHED_CLEAN

CIFAR10, CIFAR100 = "cifar10", "cifar100"
EP, BP, ADV_HALF, ADV_ONE, VIT = "ep-cnn", "bp-cnn", "adv-cnn l2 0.5", "adv-cnn l2 1", "vit"
PGD, AUTOATTACK, SQUARE, CARLINI_WAGNER = "pgd", "autoattack", "square", "carlini-wagner"
CLEAN, AVERAGE, PGD_8 = "clean", "average robust accuracy", "pgd linf 8/255"

Four = tuple[float, float, float, float]
_FOUR: Mapping[str, Mapping[str, Mapping[str, Four]]] = {
    CIFAR10: {
        PGD: {
            BP: (0.81, 0.31, 0.15, 0.11),
            ADV_HALF: (0.85, 0.79, 0.71, 0.35),
            ADV_ONE: (0.79, 0.76, 0.72, 0.52),
            VIT: (0.77, 0.48, 0.36, 0.19),
            EP: (0.86, 0.63, 0.44, 0.15),
        },
        AUTOATTACK: {
            BP: (0.56, 0.20, 0.06, 0.05),
            ADV_HALF: (0.83, 0.72, 0.40, 0.21),
            ADV_ONE: (0.78, 0.72, 0.52, 0.36),
            VIT: (0.59, 0.25, 0.07, 0.07),
            EP: (0.77, 0.54, 0.155, 0.085),
        },
        SQUARE: {
            BP: (0.81, 0.62, 0.26, 0.13),
            ADV_HALF: (0.85, 0.82, 0.66, 0.50),
            ADV_ONE: (0.79, 0.77, 0.67, 0.55),
            VIT: (0.73, 0.50, 0.22, 0.15),
            EP: (0.86, 0.81, 0.64, 0.47),
        },
        CARLINI_WAGNER: {
            BP: (0.04, 0.01, 0.01, 0.0),
            ADV_HALF: (0.17, 0.02, 0.06, 0.005),
            ADV_ONE: (0.44, 0.05, 0.07, 0.01),
            VIT: (0.55, 0.45, 0.27, 0.21),
            EP: (0.42, 0.24, 0.10, 0.08),
        },
    },
    CIFAR100: {
        PGD: {
            BP: (0.58, 0.21, 0.13, 0.10),
            ADV_HALF: (0.61, 0.52, 0.43, 0.22),
            ADV_ONE: (0.56, 0.52, 0.47, 0.31),
            VIT: (0.52, 0.23, 0.14, 0.09),
            EP: (0.60, 0.37, 0.24, 0.11),
        },
        AUTOATTACK: {
            BP: (0.38, 0.15, 0.07, 0.07),
            ADV_HALF: (0.60, 0.51, 0.28, 0.17),
            ADV_ONE: (0.567, 0.51, 0.35, 0.26),
            VIT: (0.35, 0.15, 0.08, 0.07),
            EP: (0.51, 0.27, 0.10, 0.06),
        },
        SQUARE: {
            BP: (0.60, 0.42, 0.18, 0.12),
            ADV_HALF: (0.62, 0.58, 0.45, 0.32),
            ADV_ONE: (0.58, 0.55, 0.47, 0.38),
            VIT: (0.46, 0.30, 0.15, 0.11),
            EP: (0.64, 0.55, 0.36, 0.24),
        },
        CARLINI_WAGNER: {
            BP: (0.14, 0.04, 0.02, 0.02),
            ADV_HALF: (0.25, 0.14, 0.06, 0.044),
            ADV_ONE: (0.35, 0.24, 0.06, 0.05),
            VIT: (0.22, 0.20, 0.16, 0.13),
            EP: (0.51, 0.45, 0.35, 0.29),
        },
    },
}
_ONE: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    CIFAR10: {
        CLEAN: {name: found[0] for name, found in PUBLISHED_CLEAN.items()},
        AVERAGE: {BP: 0.43, ADV_HALF: 0.60, ADV_ONE: 0.61, VIT: 0.51, EP: 0.58},
        PGD_8: {BP: 0.072, ADV_HALF: 0.267, ADV_ONE: 0.431, VIT: 0.173, EP: 0.120},
    },
    CIFAR100: {
        CLEAN: {name: found[1] for name, found in PUBLISHED_CLEAN.items()},
        AVERAGE: {BP: 0.33, ADV_HALF: 0.45, ADV_ONE: 0.46, VIT: 0.31, EP: 0.44},
        PGD_8: {EP: 0.101},
    },
}


def four(data: str, attack: str, model: str) -> Four | None:
    """The four figures of an attack; None where none were published.

    Args:
        data: Of the data set, `cifar10` or `cifar100`.
        attack: `pgd` (L2), `autoattack`, `square` (Linf), or `carlini-wagner`.
        model: As in `EP`, `BP`, ...
    """
    return _FOUR.get(data, {}).get(attack, {}).get(model)


def one(data: str, what: str, model: str) -> float | None:
    """A single figure; None where none was published.

    Args:
        data: As in `four`.
        what: `CLEAN`, `AVERAGE` or `PGD_8`.
        model: As in `four`.
    """
    return _ONE.get(data, {}).get(what, {}).get(model)
