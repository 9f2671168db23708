"""Corrupted images, generated or published, judged by every subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from epdistill.distributed import ALONE
from epdistill.errors import EvaluationError
from epdistill.robustness.attacking import Ledger
from epdistill.robustness.corruptions import EXTRA, FAMILY, SEVERITIES, corrupt
from epdistill.robustness.outcomes import CorruptionOutcome
from epdistill.robustness.published import run_published_corruption
from epdistill.robustness.units import Task, Units


class Official(Protocol):
    """Published arrays of corrupted images, such as `corruptions.cifar10c.open_cifar10c` gives."""

    family: str
    names: tuple[str, ...]

    def load(self, name: str, severity: int, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Some examples (N,) int64, corrupted: images (N,C,H,W) uint8 and labels (N,) int64."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where they came from, with hashes; JSON-ready."""
        ...


def check_official(official: Official, task: Task) -> None:
    """Refuse arrays of other images before anything else is done.

    Raises:
        EvaluationError: Their shape or labels are not those of the task's images.
    """
    images, labels = official.load(official.names[0], SEVERITIES[0], task.examples)
    if images.shape != task.images.shape or not torch.equal(labels, task.labels):
        raise EvaluationError(
            f"the {official.family} arrays hold images of shape {tuple(images.shape)} with labels "
            f"that are not those of the test images {tuple(task.images.shape)}; expected the same "
            "images, corrupted: evaluate models of CIFAR-10, or leave the arrays out"
        )


def run_corruptions(ledgers: Sequence[Ledger], units: Units, official: Official | None) -> None:
    """Generated corruptions, then official ones; an image is corrupted once for all subjects."""
    task = units.task
    for name in task.suite.corruptions:
        levels = {
            severity: cache(partial(corrupt, task.images, name, severity, seed=task.seed))
            for severity in task.suite.severities
        }
        units.prepare(
            [
                (
                    (ledger.name, FAMILY, name, severity),
                    partial(units.judge, ledger.subject, ledger.predict, made, ALONE),
                )
                for severity, made in levels.items()
                for ledger in ledgers
            ]
        )
        for severity, made in levels.items():
            _judge(ledgers, units, FAMILY, name, severity, made)
    if official is None:
        return
    for name in official.names:
        for severity in task.suite.severities:
            made = cache(partial(_load, official, task, name, severity))
            _judge(ledgers, units, official.family, name, severity, made)


def _load(official: Official, task: Task, name: str, severity: int) -> Tensor:
    return official.load(name, severity, task.examples)[0]


def _judge(
    ledgers: Sequence[Ledger],
    units: Units,
    family: str,
    name: str,
    severity: int,
    made: Callable[[], Tensor],
) -> None:
    task = units.task
    for ledger in ledgers:
        key = (ledger.name, family, name, severity)
        wrong = units.wrong(key, ledger.subject, ledger.predict, made)
        found = CorruptionOutcome(family, name, severity, name in EXTRA, wrong)
        ledger.corruptions.append(found)
        if family == FAMILY and task.suite.published():
            run_published_corruption(ledger, found, made, units)
        units.meter.add(f"{ledger.name}: {name} {severity}", task.n)
