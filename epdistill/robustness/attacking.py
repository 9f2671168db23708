"""Attacks on one subject, and what it makes of images crafted on others.

For each norm and radius the first view of a subject is attacked with every
image. Further views, and then black box attacks, are run only on the images
that the subject's own attacks have not broken at this radius or a smaller one
(unless the suite is exhaustive, or the attack stands alone): the worst case is
the same, the time is not. What is crafted on one subject's views is at once tried
on all other subjects ("transfer"), and never decides which of their own attacks
run, so a subject's own rows do not depend on the company it is evaluated in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epdistill.robustness.attacks import counted, expectation
from epdistill.robustness.crafted import Made
from epdistill.robustness.guards import TOLERANCE, check_adversarial, derive_seed
from epdistill.robustness.journal import pack_bits, pack_floats, unpack_bits, unpack_floats
from epdistill.robustness.outcomes import (
    TRANSFER,
    AttackOutcome,
    CorruptionOutcome,
    PublishedOutcome,
    SubjectOutcome,
    TemporalOutcome,
)
from epdistill.robustness.subjects import MeanAnswer, Predict, Subject
from epdistill.robustness.suites import Attack
from epdistill.robustness.units import Task, Unit, Units, errs, named, part_key


@dataclass
class Ledger:
    """What is known about one subject so far.

    `predict` and `views` are the subject's own, or its expectations if it is stochastic.
    """

    subject: Subject
    predict: Predict
    views: Mapping[str, nn.Module]
    clean_wrong: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    own: list[AttackOutcome] = field(default_factory=list)
    transfers: dict[tuple[str, float, str], AttackOutcome] = field(default_factory=dict)
    corruptions: list[CorruptionOutcome] = field(default_factory=list)
    temporal: list[TemporalOutcome] = field(default_factory=list)
    published: list[PublishedOutcome] = field(default_factory=list)
    diagnosis: Mapping[str, Any] | None = None
    basins: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.subject.name

    def scope(self, attack: Attack, task: Task) -> Tensor:
        """The images that an attack is run on, (N,) bool."""
        relaxes = self.subject.horizons is not None
        return task.first(attack.relaxed_images if relaxes else None) & task.first(attack.images)

    def open_row(
        self, attack: str, view: str, norm: str, eps: float, scope: Tensor | None = None
    ) -> AttackOutcome:
        """A row in which only what is wrong when clean is broken."""
        n = len(self.clean_wrong)
        return AttackOutcome(
            attack,
            view,
            norm,
            eps,
            attacked=torch.zeros_like(self.clean_wrong),
            success=self.clean_wrong.clone(),
            perturbation=torch.zeros(n, dtype=torch.float64),
            scope=torch.ones_like(self.clean_wrong) if scope is None else scope,
            queries=torch.zeros(n, dtype=torch.float64),
        )

    def outcome(self) -> SubjectOutcome:
        """Everything, frozen."""
        return SubjectOutcome(
            self.subject.name,
            self.subject.kind,
            self.clean_wrong,
            (*self.own, *self.transfers.values()),
            tuple(self.corruptions),
            tuple(self.temporal),
            tuple(self.published),
            self.diagnosis,
            self.basins,
            tuple(self.notes),
        )


def open_ledger(subject: Subject, samples: int) -> Ledger:
    """A ledger with nothing in it; a stochastic subject is attacked and judged in the mean."""
    if not subject.stochastic:
        return Ledger(subject, subject.predict, subject.views)
    views = {name: expectation(view, samples) for name, view in subject.views.items()}
    note = f"stochastic: attacked in expectation, judged by the mean probability of {samples} draws"
    return Ledger(subject, MeanAnswer(subject.predict, samples), views, notes=[note])


def attack_views(
    attack: Attack, eps: float, ledger: Ledger, ledgers: Sequence[Ledger], units: Units
) -> None:
    """Run a white box attack on each view of a subject, and try the images on all others."""
    others = [other for other in ledgers if other is not ledger and attack.sends]
    scope = ledger.scope(attack, units.task)
    for number, (view, module) in enumerate(attack.of(ledger.views).items()):
        row = ledger.open_row(attack.name, view, attack.norm, eps, scope)
        first = not any((done.norm, done.eps) == (attack.norm, eps) for done in ledger.own)
        if not first and not attack.alone and not units.task.suite.exhaustive:
            carry(row, ledger.own)
        wanted = ~row.success & scope
        # An image that this subject gets wrong anyway may still fool another one.
        crafted = scope if number == 0 and first and others else wanted
        what = f"{ledger.name}: {attack.name} {attack.norm} {eps:.4g} on {view}"
        unit = partial(_unit, attack, eps, module, view, ledger, others, wanted, units)
        for part, found in units.batches(crafted, attack.cost, what, unit):
            reach = unpack_floats(found["reach"])
            mine = wanted[part]
            own = unpack_bits(found["wrong"], int(mine.sum()))
            enter(row, part[mine], own, reach[mine], found["queries"])
            for other in others:
                target = _transfer_row(other, ledger, attack.norm, eps)
                right = ~other.clean_wrong[part]
                wrong = unpack_bits(found["sent"][other.name], int(right.sum()))
                enter(target, part[right], wrong, reach[right], 1.0)
        ledger.own.append(row)


def attack_answers(attack: Attack, eps: float, ledger: Ledger, units: Units) -> None:
    """Run a black box attack on what the subject's own attacks have left."""
    scope = ledger.scope(attack, units.task)
    row = ledger.open_row(attack.name, "", attack.norm, eps, scope)
    if not attack.alone and not units.task.suite.exhaustive:
        carry(row, ledger.own)
    wanted = ~row.success & scope
    what = f"{ledger.name}: {attack.name} {attack.norm} {eps:.4g}"
    unit = partial(_unit, attack, eps, ledger.predict, "", ledger, (), wanted, units)
    for part, found in units.batches(wanted, attack.cost, what, unit):
        wrong = unpack_bits(found["wrong"], len(part))
        enter(row, part, wrong, unpack_floats(found["reach"]), found["queries"])
    ledger.own.append(row)


def attack_nearest(attack: Attack, ledger: Ledger, units: Units) -> None:
    """Run an attack that looks for the nearest adversarial image; it counts at every radius.

    It is run on the images that are unbroken at the smallest radius.
    """
    scope = ledger.scope(attack, units.task)
    views: Mapping[str, Predict] = attack.of(ledger.views)
    for view, module in (views if attack.white_box else {"": ledger.predict}).items():
        radii = units.task.suite.radii(attack)
        rows = [ledger.open_row(attack.name, view, attack.norm, eps, scope) for eps in radii]
        if not attack.alone and not units.task.suite.exhaustive:
            for row in rows:
                carry(row, ledger.own)
        wanted = ~rows[0].success & scope if rows else torch.zeros_like(scope)
        what = f"{ledger.name}: {attack.name} {attack.norm}" + (f" on {view}" if view else "")
        unit = partial(_unit, attack, None, module, view, ledger, (), wanted, units)
        for part, found in units.batches(wanted, attack.cost, what, unit):
            wrong = unpack_bits(found["wrong"], len(part))
            reach = unpack_floats(found["reach"])
            for row in rows:
                within = wrong & (reach <= row.eps + TOLERANCE)
                enter(row, part, within, reach, found["queries"])
        ledger.own.extend(rows)


def enter(row: AttackOutcome, part: Tensor, wrong: Tensor, reach: Tensor, queries: float) -> None:
    """Enter into `row` what became of some images.

    Several images may be tried on one original (transfer): the closest that breaks it is
    remembered, or the farthest that does not.

    Args:
        row: Changed in place.
        part: (n,) int64, rows of the task.
        wrong: (n,) bool, the subject errs on the adversarial image.
        reach: (n,) float64, its distance.
        queries: Images shown to the model for each.
    """
    was, tried, before = row.success[part], row.attacked[part], row.perturbation[part]
    closest = torch.where(was & tried, torch.minimum(before, reach), reach)
    farthest = torch.maximum(before, reach)
    row.perturbation[part] = torch.where(wrong, closest, torch.where(was, before, farthest))
    row.success[part] = was | wrong
    row.attacked[part] = True
    row.queries[part] += queries


def carry(row: AttackOutcome, own: Sequence[AttackOutcome]) -> None:
    """Take over what the subject's own attacks have broken within the row's radius."""
    for done in own:
        if done.norm == row.norm and done.eps <= row.eps:
            news = done.success & ~row.success
            row.perturbation[news] = done.perturbation[news]
            row.success[news] = True


def craft(
    attack: Attack,
    eps: float | None,
    model: Predict,
    view: str,
    ledger: Ledger,
    part: Tensor,
    task: Task,
) -> tuple[Tensor, Tensor, float]:
    """Adversarial images for some rows of the task.

    Args:
        attack: What to run.
        eps: The radius; None for an attack that looks for the nearest image.
        model: What is attacked.
        view: Its name, empty for a black box.
        ledger: The subject.
        part: (n,) int64, rows of the task.
        task: What is evaluated.

    Returns:
        (n,C,H,W) on the CPU, their distances (n,) float64, and the images shown to the
        model per image (each draw of a stochastic one).
    """
    subject, radius = ledger.subject, () if eps is None else (eps,)
    images = task.unit_images(part)

    def make() -> Made:
        asked = counted(model)
        found = attack.run(
            asked,
            images.to(subject.device),
            task.labels[part].to(subject.device),
            *radius,
            seed=derive_seed(task.seed, attack.name, attack.norm, view, *radius),
            index=task.examples[part],
        )
        return found.cpu(), asked.queries

    with named(f"{ledger.name}, view {view}" if view else ledger.name):
        if task.crafted is None or subject.stochastic:
            found, queries = make()
        else:
            key = [attack.name, attack.norm, eps, view, task.examples[part].tolist()]
            found, queries = task.crafted.get(subject.identity, key, make)
        # Again here: the suite may hold attacks that do not check themselves.
        reach = check_adversarial(images, found, attack.norm, math.inf if eps is None else eps)
    draws = task.suite.samples if subject.stochastic else 1
    return found, reach, draws * queries / len(part)


def _unit(
    attack: Attack,
    eps: float | None,
    model: Predict,
    view: str,
    ledger: Ledger,
    others: Sequence[Ledger],
    wanted: Tensor,
    units: Units,
    part: Tensor,
) -> Unit:
    key = (ledger.name, attack.name, attack.norm, eps, view, part_key(part))
    return key, partial(_try, attack, eps, model, view, ledger, others, part, wanted, units)


def _try(
    attack: Attack,
    eps: float | None,
    model: Predict,
    view: str,
    ledger: Ledger,
    others: Sequence[Ledger],
    part: Tensor,
    wanted: Tensor,
    units: Units,
) -> dict[str, Any]:
    """Craft images and ask everyone about them: one unit of work, ready for the journal."""
    task = units.task
    found, reach, shown = craft(attack, eps, model, view, ledger, part, task)
    mine = wanted[part]
    sent = {}
    for other in others:
        right = ~other.clean_wrong[part]
        sent[other.name] = pack_bits(_judge(other, found[right], task.labels[part[right]]))
    return {
        "reach": pack_floats(reach),
        "wrong": pack_bits(_judge(ledger, found[mine], task.labels[part[mine]])),
        "sent": sent,
        "queries": shown,
    }


def _judge(ledger: Ledger, images: Tensor, labels: Tensor) -> Tensor:
    if len(images) == 0:
        return torch.zeros(0, dtype=torch.bool)
    return errs(ledger.subject, ledger.predict, images, labels)


def _transfer_row(target: Ledger, source: Ledger, norm: str, eps: float) -> AttackOutcome:
    key = (norm, eps, source.name)
    if key not in target.transfers:
        target.transfers[key] = target.open_row(TRANSFER, source.name, norm, eps)
    return target.transfers[key]
