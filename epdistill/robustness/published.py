"""The published protocol: its PGD as it was run, and its cells beside adaptive ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness.attacking import Ledger, craft
from epdistill.robustness.attacks.common import lengths
from epdistill.robustness.guards import L2, check_adversarial, distances
from epdistill.robustness.journal import pack_bits, pack_floats, unpack_bits, unpack_floats
from epdistill.robustness.outcomes import CorruptionOutcome, PublishedOutcome
from epdistill.robustness.subjects import Predict, Published
from epdistill.robustness.suites import Attack, QuickSuite
from epdistill.robustness.units import Unit, Units, errs, named, part_key

# The gradient of a mean over this many images was normalised with a floor of 1e-7.
PUBLISHED_BATCH = 200
FLOOR = 1e-7
# The one corruption without published figures.
UNPUBLISHED = "frost"


@dataclass(frozen=True)
class PublishedPGD:
    """The published PGD: `steps` of `relative_step * eps / steps`."""

    steps: int = 20
    relative_step: float = 2.5

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.relative_step > 0:
            raise EvaluationError(f"received {self}; expected steps >= 1 and relative_step > 0")


def published_pgd(norm: str) -> Callable[..., Tensor]:
    """PGD in a norm as the published code ran it (a patched Adversarial Robustness Toolbox).

    It starts at the image, climbs the cross-entropy of the label that the model
    *predicts*, never clips to [0,1] and returns the last iterate. The function takes the
    arguments of the other attacks; `labels` are those predicted, and there is nothing
    random for `seed` and `index` to fix.
    """
    return partial(_published_pgd, norm)


def _published_pgd(
    norm: str,
    model: Predict,
    images: Tensor,  # (N,C,H,W) in [0,1]
    labels: Tensor,  # (N,) int64, as predicted
    eps: float,
    *,
    settings: PublishedPGD,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    step = settings.relative_step * eps / settings.steps
    delta = torch.zeros_like(images)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(settings.steps):
            moved = (images + delta).detach().requires_grad_(True)
            loss = F.cross_entropy(model(moved), labels, reduction="sum") / PUBLISHED_BATCH
            (gradient,) = torch.autograd.grad(loss, moved)
            if norm == L2:
                direction = gradient / (lengths(gradient) + FLOOR)
                delta = delta + step * direction
                delta = delta * (eps / (lengths(delta) + FLOOR)).clamp(max=1)
            else:
                delta = (delta + step * gradient.sign()).clamp(-eps, eps)
    return (images + delta).detach()


def run_published(ledger: Ledger, attacks: Sequence[Attack], units: Units) -> None:
    """Fill in the cells of the published protocol for one subject; the adaptive attacks are done.

    A radius' adaptive cell is the worst case over all attacks within it, the other cells' own
    images included. At a fixed constant it is the worst case of the same attack over all
    views, because there is no radius. The published attack's own images count in both, clipped
    to [0,1] and judged by the subject itself.
    """
    task, subject, plan = units.task, ledger.subject, _plan(ledger)
    ledger.notes.append(f"published protocol: {plan.note}")
    everything = task.first(None)
    clean_wrong = units.wrong((ledger.name, "published", "clean"), subject, plan.predict)
    nothing = torch.zeros(task.n, dtype=torch.float64)
    ledger.published.append(
        PublishedOutcome(
            "clean", "", None, None, clean_wrong, nothing, ledger.clean_wrong, everything
        )
    )
    for attack in attacks:
        model = plan.view if attack.white_box else plan.predict
        if model is None:
            continue
        scope = task.first(attack.images)
        if attack.nearest:
            constant = float(attack.settings["c"])
            cell = Cell(attack, None, constant, model, plan.predict)
            wrong, own, reach = _cell(ledger, cell, "published", scope, units)
            adaptive = ledger.clean_wrong | own
            for view, module in ledger.views.items():
                cell = Cell(attack, None, constant, module, ledger.predict)
                adaptive = adaptive | _cell(ledger, cell, view, scope, units)[1]
            ledger.published.append(
                PublishedOutcome(
                    attack.name, attack.norm, None, constant, wrong, reach, adaptive, scope
                )
            )
            continue
        for eps in task.suite.radii(attack):
            cell = Cell(attack, eps, None, model, plan.predict)
            wrong, own, reach = _cell(ledger, cell, "published", scope, units)
            row = (eps, None, wrong, reach, own, scope, task.suite.averaged(attack, eps))
            ledger.published.append(PublishedOutcome(attack.name, attack.norm, *row))
    # Only now is it known what all cells break.
    found = ledger.outcome()
    ledger.published[:] = [
        cell if cell.eps is None else replace(cell, adaptive=found.broken(cell.norm, cell.eps))
        for cell in ledger.published
    ]


def run_published_corruption(
    ledger: Ledger, own: CorruptionOutcome, made: Callable[[], Tensor], units: Units
) -> None:
    """Fill in the published cell of one corruption.

    Args:
        ledger: The subject.
        own: The same cell under the subject's own `predict`.
        made: Gives the corrupted images, (N,C,H,W) uint8.
        units: Where the work is remembered.
    """
    task, plan = units.task, _plan(ledger)
    judge, wrong = plan.corrupted or plan.predict, own.wrong
    condition = f"{own.corruption}/{own.severity}"
    if judge is not ledger.predict:
        wrong = units.wrong((ledger.name, "published", condition), ledger.subject, judge, made)
    nothing, everything = torch.zeros(task.n, dtype=torch.float64), task.first(None)
    ledger.published.append(
        PublishedOutcome(
            "corruption", "", None, None, wrong, nothing, own.wrong, everything,
            own.corruption != UNPUBLISHED, condition,
        )
    )  # fmt: skip


def published_work(ledger: Ledger, attacks: Sequence[Attack], suite: QuickSuite) -> int:
    """Forward passes per image, for the progress bar."""
    total = 0
    for attack in attacks:
        if attack.white_box and _plan(ledger).view is None:
            continue
        if attack.nearest:
            total += attack.cost * (1 + len(ledger.views))
        else:
            total += attack.cost * len(suite.radii(attack))
    return total


def _plan(ledger: Ledger) -> Published:
    first = next(iter(ledger.views.values()), None)
    plain = Published(first, ledger.predict, "attacked and judged as it is")
    return ledger.subject.published or plain


@dataclass(frozen=True, eq=False)
class Cell:
    """An attack, its radius or constant, the model attacked, and the one that judges."""

    attack: Attack
    eps: float | None
    constant: float | None
    model: Predict
    judge: Predict


def _cell(
    ledger: Ledger, cell: Cell, view: str, scope: Tensor, units: Units
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the judge and where the subject itself errs, (N,) bool, and distances, (N,) float64.

    The subject is shown the images clipped to [0,1].
    """
    attack, eps, constant = cell.attack, cell.eps, cell.constant
    wrong, own = torch.zeros(2, units.task.n, dtype=torch.bool)
    reach = torch.zeros(units.task.n, dtype=torch.float64)
    at = f"c = {constant:g}" if eps is None else f"{attack.norm} {eps:.4g}"
    what = f"{ledger.name}: {attack.name} {at}, {view}"

    def unit(part: Tensor) -> Unit:
        key = (
            ledger.name, "protocol", attack.name, attack.norm, eps, constant, view, part_key(part)
        )  # fmt: skip
        return key, partial(_try, ledger, cell, view, part, units)

    for part, found in units.batches(scope, attack.cost, what, unit):
        wrong[part] = unpack_bits(found["wrong"], len(part))
        own[part] = unpack_bits(found["own"], len(part))
        reach[part] = unpack_floats(found["reach"])
    return wrong, own, reach


def _try(ledger: Ledger, cell: Cell, view: str, part: Tensor, units: Units) -> Mapping[str, Any]:
    attack, eps, judge = cell.attack, cell.eps, cell.judge
    task, subject = units.task, ledger.subject
    images, labels = task.unit_images(part), task.labels[part]
    if attack.as_published and eps is not None:
        with torch.no_grad(), named(ledger.name):
            guess = judge(images.to(subject.device)).argmax(dim=1)
        found = attack.run(cell.model, images.to(subject.device), guess, eps).cpu()
        if not bool(torch.isfinite(found).all()):
            raise EvaluationError(
                f"{ledger.name}: the published attack left the finite numbers; expected a model "
                "with finite gradients"
            )
        reach = distances(images, found, attack.norm)
    else:
        found, reach, _ = craft(attack, eps, cell.model, view, ledger, part, task)
    clipped = found.clamp(0, 1)
    check_adversarial(images, clipped, attack.norm, math.inf if eps is None else eps)
    return {
        "wrong": pack_bits(errs(subject, judge, found, labels)),
        "own": pack_bits(errs(subject, ledger.predict, clipped, labels)),
        "reach": pack_floats(reach),
    }
