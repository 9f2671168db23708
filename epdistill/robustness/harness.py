"""`evaluate`: one suite of attacks, corruptions and sweeps over any number of subjects.

The order is: clean images, attacks (white box before black box), the sweep over
horizons, the published protocol, corruptions, diagnosis. Everything is done in
units that a journal can remember (see `units` and `journal`), so a killed
evaluation goes on where it stopped and ends with the same numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from epdistill.data import Images
from epdistill.distributed import ALONE, Team
from epdistill.errors import EvaluationError
from epdistill.robustness.attacking import (
    Ledger,
    attack_answers,
    attack_nearest,
    attack_views,
    open_ledger,
)
from epdistill.robustness.corrupting import Official, check_official, run_corruptions
from epdistill.robustness.crafted import Crafted
from epdistill.robustness.extras import diagnosis_unit, diagnosis_work, run_basins, run_diagnosis
from epdistill.robustness.guards import check_logits, derive_seed, evaluation_mode
from epdistill.robustness.journal import Journal
from epdistill.robustness.outcomes import Evaluation
from epdistill.robustness.published import published_work, run_published
from epdistill.robustness.subjects import Subject
from epdistill.robustness.suites import FIRST, SUBSETS, Attack, QuickSuite, find_suite
from epdistill.robustness.temporal import run_temporal, temporal_work
from epdistill.robustness.units import Meter, Progress, Task, Units, named, own_rng

# On how many images a diagnosis asked for by hand is made.
DIAGNOSED = 64


def evaluate(
    subjects: Sequence[Subject],
    images: Images,  # (N,C,H,W) uint8
    labels: Tensor,  # (N,) int64
    *,
    suite: str | QuickSuite = "quick",
    limit: int | None = None,
    subset: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
    journal: Journal | None = None,
    diagnose: bool = False,
    official: Official | None = None,
    team: Team = ALONE,
    crafted: Crafted | None = None,
) -> Evaluation:
    """Measure clean accuracy, robust accuracy and accuracy under corruption.

    Args:
        subjects: The models, with different names.
        images: (N,C,H,W) uint8.
        labels: (N,) int64, the true classes.
        suite: A suite's name, or settings of one's own.
        limit: Evaluate this many images; None for all.
        subset: `"random"`: drawn by `seed` (a folder of images is often sorted by class);
            `"first"`: the first ones, for comparison with published figures. None leaves it
            to the suite.
        seed: Fixes everything random. The global generators are neither read nor moved.
        batch_size: How many images go through a model at once. Random numbers of attacks do
            not depend on it.
        progress: Called with what is being done, the work done and the work in all (in
            forward passes per image, roughly); at the end the two are equal.
        journal: Remembers finished units. One from an interrupted call with the same
            arguments makes this one go on where that one stopped, with the same result.
        diagnose: Look for masked gradients and fit the uncertainty exponent also where the
            suite does not.
        official: Published arrays of these images, corrupted, to evaluate beside the
            generated ones.
        team: Processes that share out the units of work. The result is that of a single
            one; rank 0's journal alone has a file, and all begin with the same units in it.
        crafted: Where adversarial images of one model are kept for the next evaluation, or
            lie already.

    Returns:
        The outcome for each image, subject and attack.

    Raises:
        EvaluationError: Bad arguments, or a model or an attack that breaks the rules.
    """
    chosen = find_suite(suite)
    how = subset or chosen.subset()
    _check_arguments(subjects, images, labels, limit, how, batch_size)
    examples = choose(len(images), limit, seed, how)
    pixels, truth = images[examples].cpu(), labels[examples].cpu()
    task = Task(pixels, truth, examples, chosen, seed, batch_size, crafted)
    if official is not None:
        check_official(official, task)
    ledgers = [open_ledger(subject, chosen.samples) for subject in subjects]
    modules = [module for subject in subjects for module in subject.modules]
    with evaluation_mode(modules):
        classes = min(_classes(ledger, task) for ledger in ledgers)
        attacks, skipped = _available(chosen.attacks(), classes)
        published, also_skipped = _available(chosen.published(), classes)
        count = chosen.diagnosed() or (DIAGNOSED if diagnose else None)
        meter = Meter(progress, _work(ledgers, task, attacks, published, official, count))
        devices = [subject.device for subject in subjects]
        units = Units(task, journal or Journal(), meter, devices, team)
        for ledger in ledgers:
            key = (ledger.name, "clean")
            ledger.clean_wrong = units.wrong(key, ledger.subject, ledger.predict)
            meter.add(f"{ledger.name}: clean", task.n)
        for attack in attacks:
            _run_attack(attack, ledgers, units)
        temporal = chosen.temporal()
        for ledger in ledgers:
            if temporal is not None:
                run_temporal(ledger, temporal, units)
            if published:
                run_published(ledger, published, units)
        run_corruptions(ledgers, units, official)
        rivals = {id(one): [other for other in ledgers if other is not one] for one in ledgers}
        if count is not None:
            units.prepare([diagnosis_unit(one, rivals[id(one)], count, units) for one in ledgers])
            for ledger in ledgers:
                run_diagnosis(ledger, rivals[id(ledger)], count, units)
                run_basins(ledger, count, units)
    return Evaluation(
        chosen,
        seed,
        batch_size,
        limit,
        examples,
        task.labels,
        tuple(ledger.outcome() for ledger in ledgers),
        how,
        (*skipped, *also_skipped),
        {} if official is None else {official.family: official.describe()},
    )


def choose(n: int, limit: int | None, seed: int, subset: str) -> Tensor:
    """The numbers of the images to evaluate, increasing: (min(n, limit),) int64."""
    if limit is None or limit >= n:
        return torch.arange(n)
    if subset == FIRST:
        return torch.arange(limit)
    generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
    return torch.randperm(n, generator=generator)[:limit].sort().values


def _run_attack(attack: Attack, ledgers: Sequence[Ledger], units: Units) -> None:
    """One attack on all subjects, radius by radius."""
    if attack.nearest:
        for ledger in ledgers:
            attack_nearest(attack, ledger, units)
        return
    for eps in units.task.suite.radii(attack):
        for ledger in ledgers:
            if attack.white_box:
                attack_views(attack, eps, ledger, ledgers, units)
            else:
                attack_answers(attack, eps, ledger, units)


def _classes(ledger: Ledger, task: Task) -> int:
    """How many classes a subject knows; the first image is enough to tell."""
    device = ledger.subject.device
    image = task.unit_images(torch.arange(1)).to(device)
    with torch.no_grad(), named(ledger.name), own_rng([device], task.seed):
        return check_logits(ledger.subject.predict(image), 1, task.labels).shape[1]


def _available(
    attacks: Sequence[Attack], classes: int
) -> tuple[list[Attack], list[dict[str, str]]]:
    """The attacks that can be run, and a word on each of the others."""
    found, missing = [], []
    for attack in attacks:
        why = ""
        if attack.requires is not None and importlib.util.find_spec(attack.requires) is None:
            why = f"{attack.requires} is not installed: pip install 'epdistill[{attack.name}]'"
        elif classes < attack.classes:
            why = f"its loss compares {attack.classes} classes, and there are {classes}"
        if why:
            missing.append({"what": f"{attack.name} {attack.norm}", "why": why})
        else:
            found.append(attack)
    return found, missing


def _work(
    ledgers: Sequence[Ledger],
    task: Task,
    attacks: Sequence[Attack],
    published: Sequence[Attack],
    official: Official | None,
    diagnosed: int | None,
) -> int:
    """The work in all, in forward passes per image; what is skipped counts as done."""
    suite = task.suite
    names = len(suite.corruptions) + (0 if official is None else len(official.names))
    each = len(ledgers) * (1 + names * len(suite.severities))
    once = len(ledgers) * diagnosis_work(diagnosed)
    temporal = suite.temporal()
    for ledger in ledgers:
        for attack in attacks:
            runs = len(attack.of(ledger.views)) if attack.white_box else 1
            rounds = 1 if attack.nearest else len(suite.radii(attack))
            each += runs * rounds * attack.cost
        each += published_work(ledger, published, suite)
        if temporal is not None:
            each += temporal_work(ledger, suite, temporal)
    return each * task.n + once


def _check_arguments(
    subjects: Sequence[Subject],
    images: Images,
    labels: Tensor,
    limit: int | None,
    subset: str,
    batch_size: int,
) -> None:
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(
            f"received subjects named {names}; expected at least one, with different names"
        )
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise EvaluationError(
            f"received images of shape {tuple(images.shape)} and type {images.dtype}; expected "
            "(N,C,H,W) uint8 with N >= 1"
        )
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise EvaluationError(
            f"received labels of shape {tuple(labels.shape)} and type {labels.dtype}; expected "
            f"({len(images)},) int64"
        )
    if limit is not None and limit < 1:
        raise EvaluationError(f"received limit {limit}; expected at least 1 image, or none at all")
    if subset not in SUBSETS:
        raise EvaluationError(f"received subset {subset!r}; expected one of {', '.join(SUBSETS)}")
    if batch_size < 1:
        raise EvaluationError(f"received batch_size {batch_size}; expected at least 1")
