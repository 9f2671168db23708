"""The 26 checks: what each is called, what it must not exceed, and what to do when it does.

Sources: Athalye et al., ICML 2018 (obfuscated gradients); Carlini et al., "On
Evaluating Adversarial Robustness", 2019; Croce & Hein, ICML 2020 (AutoAttack's
checks); Tramer et al., NeurIPS 2020 (adaptive attacks); Pintor et al., NeurIPS
2022 (indicators of attack failure). Checks 24 to 26 are for models whose answer
is an equilibrium.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL", "not applicable"]
Needs = Literal["answers", "gradients", "teacher"]

PASS: Status = "PASS"
WARN: Status = "WARN"
FAIL: Status = "FAIL"
SKIP: Status = "not applicable"


@dataclass(frozen=True)
class Check:
    """What is known about a check before it is run.

    Attributes:
        number: 1..26.
        name: A few words, unique.
        threshold: What is flagged, in words.
        remedy: What to do if it is flagged.
        needs: `"answers"` (any subject), `"gradients"` (a subject with views) or `"teacher"`
            (an EP-CNN).
    """

    number: int
    name: str
    threshold: str
    remedy: str
    needs: Needs


CATALOGUE: tuple[Check, ...] = (
    Check(
        1,
        "determinism",
        "5 forwards: unit-length logits differ by > 1e-4 in L2, or another number is right",
        "attack the expectation over at least 20 forwards (EoT), and judge by repeated forwards",
        "answers",
    ),
    Check(
        2,
        "logits",
        "outputs are probabilities or one-hot (FAIL), log-probabilities or bounded (WARN)",
        "attack the numbers before softmax, rounding or clamp",
        "answers",
    ),
    Check(
        3,
        "shift invariance",
        "attacks on f and f - 20 succeed on other images; WARN if all outputs are negative",
        "use attacks whose loss reads differences of logits only",
        "gradients",
    ),
    Check(
        4,
        "gradients",
        "images without a finite, non-zero gradient in every view > 0",
        "find where the gradient dies (rounding, detach, saturation) and attack around it (BPDA)",
        "gradients",
    ),
    Check(
        5,
        "gradient fidelity",
        "median cosine of autograd with finite differences < 0.9 in every view",
        "mend the backward pass or attack by finite differences (SPSA) and black box",
        "gradients",
    ),
    Check(
        6,
        "inference loop",
        "autograd is called during a forward",
        "attack through the loop (unrolled or implicit): ordinary attacks do not see it",
        "answers",
    ),
    Check(
        7,
        "class count",
        "DLR needs > 2 classes, targeted DLR > 3, targets < classes",
        "leave the losses out that need more classes",
        "answers",
    ),
    Check(
        8,
        "iterative beats one-step",
        "images that FGSM breaks and PGD does not, at any radius > 0",
        "give PGD more steps and another step size; look at the gradients",
        "gradients",
    ),
    Check(
        9,
        "white box beats black box",
        "images that only Square breaks > 0",
        "count them as broken, and find out why the gradient attack missed them",
        "gradients",
    ),
    Check(
        10,
        "hard-label attack",
        "images that only a decision-based attack breaks > 0",
        "count them as broken, and find out why the gradient attack missed them",
        "gradients",
    ),
    Check(
        11,
        "random noise",
        "images that only random noise in the ball breaks > 0",
        "count them as broken; noise beating gradients means that the gradients mislead",
        "gradients",
    ),
    Check(
        12,
        "unbounded attack",
        "accuracy at Linf eps = 1 > 0",
        "the attack cannot be right while any image withstands it at eps = 1",
        "gradients",
    ),
    Check(
        13,
        "budget curve",
        "rises with eps, differs from clean at eps 0, or never falls to chance",
        "repair the attack before quoting any point of its curve",
        "gradients",
    ),
    Check(
        14,
        "step convergence",
        "images that 2n or 4n steps break and n steps do not > 0.5 %",
        "report the attack with more steps",
        "gradients",
    ),
    Check(
        15,
        "incomplete optimisation",
        "median gain of the survivors' best loss in the last quarter of the steps > 5 % of its "
        "range (WARN), > 25 % or no movement at all (FAIL)",
        "more steps, a larger step, or another loss",
        "gradients",
    ),
    Check(
        16,
        "restarts and step size",
        "images that other restarts or step sizes break > 0.5 %",
        "report the worst case over restarts and step sizes",
        "gradients",
    ),
    Check(
        17,
        "silent success",
        "images broken along the way but not at the last step",
        "keep the best iterate per image, not the last",
        "gradients",
    ),
    Check(
        18,
        "loss smoothness",
        "reported; WARN if the median relative change of the loss in a cube of +-4/255 is > 1",
        "a rough loss misleads gradients: average them over noise, and use black box attacks",
        "answers",
    ),
    Check(
        19,
        "objective diversity",
        "images that another loss (cross-entropy, margin, DLR, MSE, targeted) breaks > 0.5 %",
        "report the worst case over losses",
        "gradients",
    ),
    Check(
        20,
        "transfer",
        "images that examples made on another model break and its own attack does not > 0",
        "count them as broken; transfer beating the white box is a classic sign of masking",
        "answers",
    ),
    Check(
        21,
        "aggregation",
        "the accuracy quoted is above the mean over images of the worst case over attacks",
        "quote the worst case per image, never the worst mean",
        "answers",
    ),
    Check(
        22,
        "validity",
        "outside the ball or [0,1], NaN, modes changed (FAIL); lost by 8-bit rounding (WARN)",
        "repair the attack; attack on the 8-bit grid",
        "gradients",
    ),
    Check(
        23,
        "positive controls",
        "a plain net keeps accuracy, or a net with killed gradients is not caught",
        "repair the evaluation: an instrument that misses the known case proves nothing",
        "gradients",
    ),
    Check(
        24,
        "attack horizon (EP)",
        "accuracy still falls from T_pred to 2 T_pred, a gradient of another horizon leaves less "
        "than the exact one, or breaks what the reported attack does not",
        "report the worst case over horizons and gradient kinds",
        "teacher",
    ),
    Check(
        25,
        "equilibrium (EP)",
        "adversarial inputs settle less often than clean ones (FAIL); the answer depends on the "
        "prediction horizon or on the start (WARN)",
        "more sweeps in prediction, gradients at intermediate states, cold starts",
        "teacher",
    ),
    Check(
        26,
        "saturation (EP)",
        "images that an attack with a softened clamp (BPDA) breaks and the reported does not > 0",
        "add the softened unroll to the views",
        "teacher",
    ),
)

BY_NUMBER = {check.number: check for check in CATALOGUE}
