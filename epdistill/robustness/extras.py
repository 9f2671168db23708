"""Beyond attacks: masked gradients and the shape of basins, looked for on a few images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from epdistill.robustness.attacking import Ledger
from epdistill.robustness.guards import derive_seed
from epdistill.robustness.units import Unit, Units

# A diagnosis shows each image to the model about this often.
COST = 30_000


def diagnosis_work(count: int | None) -> int:
    """The work of one diagnosis on `count` images, in forward passes, for the progress bar."""
    return 0 if count is None else COST * count


def run_diagnosis(ledger: Ledger, rivals: Sequence[Ledger], count: int, units: Units) -> None:
    """Look for masked gradients on the first `count` images; see `diagnostics`."""
    ledger.diagnosis = units.run(*diagnosis_unit(ledger, rivals, count, units))
    units.meter.add(f"{ledger.name}: diagnosed", diagnosis_work(count))


def diagnosis_unit(ledger: Ledger, rivals: Sequence[Ledger], count: int, units: Units) -> Unit:
    """The work of `run_diagnosis`."""
    work = partial(_diagnose, ledger, rivals, count, units)
    return (ledger.name, "diagnosis", count), work


def _diagnose(ledger: Ledger, rivals: Sequence[Ledger], count: int, units: Units) -> dict[str, Any]:
    from epdistill.robustness.diagnostics import DiagnosticSettings, diagnose

    task = units.task
    rows = task.first(count).nonzero().flatten()
    return diagnose(
        ledger.subject,
        task.unit_images(rows),
        task.labels[rows],
        settings=DiagnosticSettings(images=count),
        seed=derive_seed(task.seed, "diagnosis"),
        rivals=[other.subject for other in rivals],
        progress=lambda what, done, total: units.meter.add(what, 0),
    ).as_dict()


def run_basins(ledger: Ledger, count: int, units: Units) -> None:
    """Fit the uncertainty exponent of a model that relaxes on the first `count` images."""
    if ledger.subject.horizons is not None:
        units.meter.add(f"{ledger.name}: basins", 0)
        work = partial(_basins, ledger, count, units)
        ledger.basins = units.run((ledger.name, "basins", count), work)


def _basins(ledger: Ledger, count: int, units: Units) -> dict[str, Any]:
    from epdistill.robustness.basins import BasinSettings, uncertainty_exponent

    task, horizons = units.task, ledger.subject.horizons
    assert horizons is not None
    rows = task.first(count).nonzero().flatten()
    images = task.unit_images(rows).to(ledger.subject.device)
    seed = derive_seed(task.seed, "basins")
    settings = BasinSettings(tolerance=horizons.tolerance)
    return uncertainty_exponent(horizons.settle, images, seed=seed, settings=settings).as_dict()
