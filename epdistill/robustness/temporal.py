"""The sweep over horizons: how long an attack looks ahead, and when the answer is read.

A relaxing model has a time inside. An attacker may unroll few sweeps or many, and
a short unroll is often the stronger attack; the answer may be read early or at
the settled point. One number at one horizon says little, so all of them are
measured, together with the gradients that have no horizon (implicit, estimated
by equilibrium propagation); the headline is the worst case over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from epdistill.robustness.attacking import Ledger, craft, enter
from epdistill.robustness.attacks import pgd_l2, pgd_linf
from epdistill.robustness.guards import LINF, NORMS, evaluation_mode
from epdistill.robustness.journal import pack_bits, pack_floats, unpack_bits, unpack_floats
from epdistill.robustness.outcomes import TemporalOutcome
from epdistill.robustness.subjects import Horizons, Predict
from epdistill.robustness.suites import Attack, QuickSuite, TemporalSettings, attack
from epdistill.robustness.units import Unit, Units, errs, part_key

TEMPORAL = "pgd-temporal"
CLEAN = "clean"
UNROLLED = "unrolled"


@dataclass(frozen=True, eq=False)
class _Source:
    """A gradient: its name, its horizon if it has one, and how to get the view."""

    gradient: str
    sweeps: int | None
    view: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        return self.gradient if self.sweeps is None else f"{self.gradient}-{self.sweeps}"


def sweep_radii(suite: QuickSuite) -> tuple[tuple[str, float], ...]:
    """The middle radius of each norm's grid."""
    return tuple((norm, eps) for norm in NORMS for eps in suite.middle(norm))


def temporal_work(ledger: Ledger, suite: QuickSuite, settings: TemporalSettings) -> int:
    """Forward passes per image, for the progress bar."""
    horizons = ledger.subject.horizons
    if horizons is None:
        return 0
    runs = len(_sources(ledger, horizons, settings)) * len(sweep_radii(suite))
    return runs * _cost(settings)


def run_temporal(ledger: Ledger, settings: TemporalSettings, units: Units) -> None:
    """Sweep over gradients, attack horizons and prediction horizons for a model that relaxes.

    What breaks the settled answer also counts in the subject's worst case, as rows of
    the attack `pgd-temporal`. Nothing is done for a subject without horizons.
    """
    horizons = ledger.subject.horizons
    if horizons is None:
        return
    scope = units.task.first(settings.images)
    readers: dict[int | None, Predict] = {
        sweeps: horizons.after(sweeps) for sweeps in settings.prediction_sweeps
    }
    readers[None] = ledger.predict
    clean = {sweeps: _clean(ledger, sweeps, reader, units) for sweeps, reader in readers.items()}
    ledger.temporal += [
        TemporalOutcome("", 0.0, CLEAN, None, sweeps, wrong, scope)
        for sweeps, wrong in clean.items()
    ]
    for norm, eps in sweep_radii(units.task.suite):
        run = pgd_linf if norm == LINF else pgd_l2
        pgd = attack(TEMPORAL, norm, run, settings.pgd, _cost(settings))
        for source in _sources(ledger, horizons, settings):
            _sweep(ledger, pgd, eps, source, readers, clean, scope, units)


def _sweep(
    ledger: Ledger,
    pgd: Attack,
    eps: float,
    source: _Source,
    readers: dict[int | None, Predict],
    clean: dict[int | None, Tensor],
    scope: Tensor,
    units: Units,
) -> None:
    """One gradient at one radius, judged at every prediction horizon."""
    view = source.view()
    row = ledger.open_row(TEMPORAL, source.name, pgd.norm, eps, scope)
    wrong = {sweeps: before.clone() for sweeps, before in clean.items()}
    what = f"{ledger.name}: {TEMPORAL} {pgd.norm} {eps:.4g} on {source.name}"
    with evaluation_mode((view,)):

        def unit(part: Tensor) -> Unit:
            key = (ledger.name, TEMPORAL, pgd.norm, eps, source.name, part_key(part))
            return key, partial(_try, ledger, pgd, eps, view, source.name, readers, part, units)

        for part, found in units.batches(scope, pgd.cost, what, unit):
            for total, text in zip(wrong.values(), found["wrong"], strict=True):
                total[part] |= unpack_bits(text, len(part))
            settled = unpack_bits(found["wrong"][-1], len(part))
            mine = ~row.success[part]
            reach = unpack_floats(found["reach"])
            enter(row, part[mine], settled[mine], reach[mine], found["queries"])
    ledger.temporal += [
        TemporalOutcome(pgd.norm, eps, source.gradient, source.sweeps, sweeps, total, scope)
        for sweeps, total in wrong.items()
    ]
    ledger.own.append(row)


def _try(
    ledger: Ledger,
    pgd: Attack,
    eps: float,
    view: nn.Module,
    name: str,
    readers: dict[int | None, Predict],
    part: Tensor,
    units: Units,
) -> dict[str, object]:
    found, reach, shown = craft(pgd, eps, view, name, ledger, part, units.task)
    labels = units.task.labels[part]
    wrong = [errs(ledger.subject, reader, found, labels) for reader in readers.values()]
    return {
        "reach": pack_floats(reach),
        "wrong": [pack_bits(flags) for flags in wrong],
        "queries": shown,
    }


def _clean(ledger: Ledger, sweeps: int | None, reader: Predict, units: Units) -> Tensor:
    """Where the answer read after `sweeps` sweeps errs on the clean images, (N,) bool."""
    if sweeps is None:
        return ledger.clean_wrong
    return units.wrong((ledger.name, TEMPORAL, CLEAN, sweeps), ledger.subject, reader)


def _sources(ledger: Ledger, horizons: Horizons, settings: TemporalSettings) -> tuple[_Source, ...]:
    """The views without a horizon, then unrolls of every length."""
    timeless = [
        _Source(name, None, partial(_same, view))
        for name, view in ledger.views.items()
        if not name.startswith(UNROLLED)
    ]
    unrolls = [
        _Source(UNROLLED, sweeps, partial(horizons.unrolled, sweeps))
        for sweeps in settings.attack_sweeps
    ]
    return (*timeless, *unrolls)


def _same(view: nn.Module) -> nn.Module:
    return view


def _cost(settings: TemporalSettings) -> int:
    return 3 * settings.pgd.steps * settings.pgd.restarts


def adaptive(
    rows: Iterable[TemporalOutcome], norm: str, eps: float, sweeps: int | None, n: int
) -> Tensor:
    """The images that some gradient breaks for the answer read after `sweeps`: (n,) bool."""
    broken = torch.zeros(n, dtype=torch.bool)
    for row in rows:
        if (row.norm, row.eps, row.prediction_sweeps) == (norm, eps, sweeps):
            broken = broken | row.wrong
    return broken
