"""`evaluate`: one suite of attacks and corruptions over any number of subjects.

For each norm and radius the first view of a subject is attacked with every
image. Further views, and then black box attacks, are run only on the images
that the subject's own attacks have not broken at this radius or a smaller one
(unless the suite is exhaustive): the worst case is the same, the time is not.
What is crafted on one subject's views is at once tried on all other subjects
("transfer"), and never decides which of their own attacks run, so a subject's
own rows do not depend on the company it is evaluated in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions import corrupt
from epdistill.robustness.guards import (
    check_adversarial,
    check_logits,
    derive_seed,
    evaluation_mode,
)
from epdistill.robustness.outcomes import (
    TRANSFER,
    AttackOutcome,
    CorruptionOutcome,
    Evaluation,
    SubjectOutcome,
)
from epdistill.robustness.subjects import Predict, Subject
from epdistill.robustness.suites import Attack, QuickSuite, find_suite

Progress = Callable[[str, int, int], None]


def evaluate(
    subjects: Sequence[Subject],
    images: Tensor,  # (N,C,H,W) uint8
    labels: Tensor,  # (N,) int64
    *,
    suite: str | QuickSuite = "quick",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure clean accuracy, robust accuracy and accuracy under corruption.

    Args:
        subjects: The models, with different names.
        images: (N,C,H,W) uint8.
        labels: (N,) int64, the true classes.
        suite: A suite's name, or settings of one's own.
        limit: Evaluate this many images, drawn at random by `seed` (a folder of images is
            often sorted by class); None for all.
        seed: Fixes everything random. The global generators are neither read nor moved.
        batch_size: How many images go through a model at once. Random numbers do not depend
            on it.
        progress: Called with what is being done, the work done and the work in all (in
            forward passes per image, roughly); at the end the two are equal.

    Returns:
        The outcome for each image, subject and attack.

    Raises:
        EvaluationError: Bad arguments, or a model or an attack that breaks the rules.
    """
    chosen = find_suite(suite)
    _check_arguments(subjects, images, labels, limit, batch_size)
    examples = _choose(len(images), limit, seed)
    task = _Task(images[examples].cpu(), labels[examples].cpu(), examples, chosen, seed, batch_size)
    ledgers = [_Ledger(subject) for subject in subjects]
    meter = _Meter(progress, _work(ledgers, task))
    modules = [module for subject in subjects for module in subject.modules]
    with _own_rng(subjects, seed), evaluation_mode(modules):
        for ledger in ledgers:
            ledger.clean_wrong = _wrong(ledger.subject, task.images, task)
            meter.add(f"{ledger.subject.name}: clean", task.n)
        for attack in chosen.attacks():
            for eps in chosen.grid(attack.norm):
                for ledger in ledgers:
                    if attack.white_box:
                        _attack_views(attack, eps, ledger, ledgers, task, meter)
                    else:
                        _attack_answers(attack, eps, ledger, task, meter)
        for name in chosen.corruptions:
            for severity in chosen.severities:
                worse = corrupt(task.images, name, severity, seed=seed)
                for ledger in ledgers:
                    wrong = _wrong(ledger.subject, worse, task)
                    ledger.corruptions.append(CorruptionOutcome(name, severity, wrong))
                    meter.add(f"{ledger.subject.name}: {name} {severity}", task.n)
    return Evaluation(
        chosen,
        seed,
        batch_size,
        limit,
        examples,
        task.labels,
        tuple(ledger.outcome() for ledger in ledgers),
    )


@dataclass(frozen=True)
class _Task:
    """What all subjects face."""

    images: Tensor  # (N,C,H,W) uint8, CPU
    labels: Tensor  # (N,) int64, CPU
    examples: Tensor  # (N,) int64
    suite: QuickSuite
    seed: int
    batch_size: int

    @property
    def n(self) -> int:
        return len(self.images)


@dataclass
class _Ledger:
    """What is known about one subject so far."""

    subject: Subject
    clean_wrong: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    own: list[AttackOutcome] = field(default_factory=list)
    transfers: dict[tuple[str, float, str], AttackOutcome] = field(default_factory=dict)
    corruptions: list[CorruptionOutcome] = field(default_factory=list)

    def open_row(self, attack: str, view: str, norm: str, eps: float) -> AttackOutcome:
        """A row in which only what is wrong when clean is broken."""
        return AttackOutcome(
            attack,
            view,
            norm,
            eps,
            attacked=torch.zeros_like(self.clean_wrong),
            success=self.clean_wrong.clone(),
            perturbation=torch.zeros(len(self.clean_wrong), dtype=torch.float64),
        )

    def outcome(self) -> SubjectOutcome:
        rows = (*self.own, *self.transfers.values())
        name, kind = self.subject.name, self.subject.kind
        return SubjectOutcome(name, kind, self.clean_wrong, rows, tuple(self.corruptions))


class _Meter:
    """Counts work and tells whoever asked."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, what: str, work: int) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def _attack_views(
    attack: Attack,
    eps: float,
    ledger: _Ledger,
    ledgers: Sequence[_Ledger],
    task: _Task,
    meter: _Meter,
) -> None:
    """Run a white box attack on each view of a subject, and try the images on all others."""
    subject = ledger.subject
    others = [other for other in ledgers if other is not ledger]
    for view, module in subject.views.items():
        row = ledger.open_row(attack.name, view, attack.norm, eps)
        first = not any((done.norm, done.eps) == (attack.norm, eps) for done in ledger.own)
        if not first and not task.suite.exhaustive:
            _carry(row, ledger.own)
        wanted = ~row.success
        # An image that this subject gets wrong anyway may still fool another one.
        crafted = torch.ones_like(wanted) if first and others else wanted
        what = f"{subject.name}: {attack.name} {attack.norm} {eps:.4g} on {view}"
        for part in _batches(crafted, task, attack.cost, what, meter):
            found = _craft(attack, eps, module, subject, view, part, task)
            mine = part[wanted[part]]
            _judge(row, subject, mine, found[wanted[part]], task)
            for other in others:
                target = _transfer_row(other, subject, attack.norm, eps)
                right = ~other.clean_wrong[part]
                _judge(target, other.subject, part[right], found[right], task)
        ledger.own.append(row)


def _attack_answers(
    attack: Attack, eps: float, ledger: _Ledger, task: _Task, meter: _Meter
) -> None:
    """Run a black box attack on what the subject's own attacks have left."""
    subject = ledger.subject
    row = ledger.open_row(attack.name, "", attack.norm, eps)
    if not task.suite.exhaustive:
        _carry(row, ledger.own)
    what = f"{subject.name}: {attack.name} {attack.norm} {eps:.4g}"
    for part in _batches(~row.success, task, attack.cost, what, meter):
        found = _craft(attack, eps, subject.predict, subject, "", part, task)
        _judge(row, subject, part, found, task)
    ledger.own.append(row)


def _craft(
    attack: Attack,
    eps: float,
    model: Predict,
    subject: Subject,
    view: str,
    part: Tensor,  # (n,) int64: rows of the task
    task: _Task,
) -> Tensor:
    """Adversarial images (n,C,H,W) on the CPU for some of the task's images."""
    try:
        found = attack.run(
            model,
            _unit_images(task.images[part]).to(subject.device),
            task.labels[part].to(subject.device),
            eps,
            seed=derive_seed(task.seed, attack.name, attack.norm, view, eps),
            index=task.examples[part],
        )
    except EvaluationError as error:
        where = f"{subject.name}, view {view}" if view else subject.name
        raise EvaluationError(f"{where}: {error}") from error
    return found.cpu()


def _judge(row: AttackOutcome, subject: Subject, part: Tensor, found: Tensor, task: _Task) -> None:
    """Enter into `row` what the subject makes of adversarial images.

    Several images may be tried on one original (transfer): the closest that breaks it is
    remembered, or the farthest that does not.
    """
    if len(part) == 0:
        return
    # Again here: the suite may hold attacks that do not check themselves.
    reach = check_adversarial(_unit_images(task.images[part]), found, row.norm, row.eps)
    wrong = _errs(subject, found, task.labels[part])
    was, tried, before = row.success[part], row.attacked[part], row.perturbation[part]
    closest = torch.where(was & tried, torch.minimum(before, reach), reach)
    farthest = torch.maximum(before, reach)
    kept = torch.where(wrong, closest, torch.where(was, before, farthest))
    row.perturbation[part] = kept
    row.success[part] = was | wrong
    row.attacked[part] = True


def _carry(row: AttackOutcome, own: Sequence[AttackOutcome]) -> None:
    """Take over what the subject's own attacks have broken within the row's radius."""
    for done in own:
        if done.norm == row.norm and done.eps <= row.eps:
            news = done.success & ~row.success
            row.perturbation[news] = done.perturbation[news]
            row.success[news] = True


def _transfer_row(target: _Ledger, source: Subject, norm: str, eps: float) -> AttackOutcome:
    key = (norm, eps, source.name)
    if key not in target.transfers:
        target.transfers[key] = target.open_row(TRANSFER, source.name, norm, eps)
    return target.transfers[key]


def _wrong(subject: Subject, images: Tensor, task: _Task) -> Tensor:
    """Which of the task's images, given as (N,C,H,W) uint8, the subject gets wrong: (N,) bool."""
    parts = _split(torch.arange(task.n), task.batch_size)
    found = [_errs(subject, _unit_images(images[part]), task.labels[part]) for part in parts]
    return torch.cat(found)


def _errs(subject: Subject, images: Tensor, labels: Tensor) -> Tensor:
    """Whether `predict` errs on each image: (n,C,H,W) float32 and (n,) int64 to (n,) bool."""
    with torch.no_grad():
        try:
            logits = check_logits(subject.predict(images.to(subject.device)), len(images), labels)
        except EvaluationError as error:
            raise EvaluationError(f"{subject.name}: {error}") from error
        return logits.argmax(dim=1).cpu() != labels


def _unit_images(images: Tensor) -> Tensor:
    return images.float() / 255


def _batches(chosen: Tensor, task: _Task, cost: int, what: str, meter: _Meter) -> Iterator[Tensor]:
    """The numbers of the chosen images in batches; the work is counted as each is done."""
    numbers = chosen.nonzero().flatten()
    meter.add(what, cost * (task.n - len(numbers)))
    for part in _split(numbers, task.batch_size):
        yield part
        meter.add(what, cost * len(part))


def _split(numbers: Tensor, size: int) -> list[Tensor]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _work(ledgers: Sequence[_Ledger], task: _Task) -> int:
    """The work in all, in forward passes per image; what is skipped counts as done."""
    suite = task.suite
    each = len(ledgers) * (1 + len(suite.corruptions) * len(suite.severities))
    for attack in suite.attacks():
        runs = sum(len(each_one.subject.views) if attack.white_box else 1 for each_one in ledgers)
        each += runs * attack.cost * len(suite.grid(attack.norm))
    return each * task.n


def _choose(n: int, limit: int | None, seed: int) -> Tensor:
    """The numbers of the images to evaluate, increasing: (min(n, limit),) int64."""
    if limit is None or limit >= n:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
    return torch.randperm(n, generator=generator)[:limit].sort().values


@contextmanager
def _own_rng(subjects: Sequence[Subject], seed: int) -> Iterator[None]:
    """Lend models that draw random numbers generators of their own, seeded."""
    devices = [torch.device(subject.device) for subject in subjects]
    cuda = sorted(
        {
            torch.cuda.current_device() if device.index is None else device.index
            for device in devices
            if device.type == "cuda"
        }
    )
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(derive_seed(seed, "models"))
        for number in cuda:
            torch.cuda.default_generators[number].manual_seed(derive_seed(seed, "models"))
        yield


def _check_arguments(
    subjects: Sequence[Subject],
    images: Tensor,
    labels: Tensor,
    limit: int | None,
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
    if batch_size < 1:
        raise EvaluationError(f"received batch_size {batch_size}; expected at least 1")
