"""Units of work: what is computed at once, judged, and remembered if the process dies.

A unit's random numbers come from its name, so a team of processes can share units out:
whoever computes one, its result is the same, and then everybody's.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epdistill.distributed import ALONE, Team
from epdistill.errors import EpdistillError
from epdistill.robustness.crafted import Crafted
from epdistill.robustness.guards import check_logits, derive_seed
from epdistill.robustness.journal import Journal, pack_bits, unpack_bits
from epdistill.robustness.subjects import Predict, Subject
from epdistill.robustness.suites import QuickSuite

Progress = Callable[[str, int, int], None]
Key = Sequence[str | float | None]
Unit = tuple[Key, Callable[[], Any]]


@dataclass(frozen=True, eq=False)
class Task:
    """What all subjects face.

    Attributes:
        images: (N,C,H,W) uint8, CPU.
        labels: (N,) int64, CPU.
        examples: (N,) int64, the images' numbers in their data set.
        suite: The attacks and corruptions.
        seed: Of everything random.
        batch_size: Images per unit.
        crafted: Where adversarial images of one model are kept.
    """

    images: Tensor
    labels: Tensor
    examples: Tensor
    suite: QuickSuite
    seed: int
    batch_size: int
    crafted: Crafted | None = None

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.images)

    def unit_images(self, part: Tensor) -> Tensor:
        """Some images, given by their rows (n,), as float32 (n,C,H,W) in [0,1]."""
        return self.images[part].float() / 255

    def first(self, count: int | None) -> Tensor:
        """(N,) bool: the first `count` images of the task, all without a count."""
        scope = torch.zeros(self.n, dtype=torch.bool)
        scope[: self.n if count is None else count] = True
        return scope


class Meter:
    """Counts work and tells whoever asked."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, what: str, work: int) -> None:
        """`work` is done (0: something has begun), in forward passes per image."""
        self._done += work
        if self._progress is not None:
            self._progress(what, self._done, self._total)


class Units:
    """Runs units of work, each with random numbers of its own, or recalls them.

    Args:
        task: What is evaluated.
        journal: Where finished units are.
        meter: Told about work done.
        devices: Where models may draw random numbers.
        team: The processes that share the units; all call the same methods in the same order.
    """

    def __init__(
        self,
        task: Task,
        journal: Journal,
        meter: Meter,
        devices: Sequence[torch.device | str] = (),
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.task, self.journal, self.meter = task, journal, meter
        self._devices = tuple(devices)

    def run(self, key: Key, work: Callable[[], Any], *, joint: bool = False) -> Any:
        """The JSON-ready result of `work`, from the journal if it is there.

        Args:
            key: Names the unit; also the seed of the random numbers that models draw.
            work: Computes it.
            joint: `work` itself is shared out; otherwise rank 0 does it for all.
        """
        name = json.dumps(list(key))
        if self.journal.get(name) is None:
            text = self._text((key, work)) if joint or self.team.first else ""
            self.journal.put(name, json.loads(text if joint else self.team.tell(text.encode())))
        return self.journal.get(name)

    def _text(self, unit: Unit) -> str:
        """The result of a unit, as it will be read from the journal."""
        key, work = unit
        name = json.dumps(list(key))
        with own_rng(self._devices, derive_seed(self.task.seed, "models", name)):
            return json.dumps(work(), allow_nan=False)

    def prepare(self, units: Sequence[Unit]) -> None:
        """Do independent units that are not in the journal, one per process at a time.

        Alone there is nothing to share: `run` does them when their turn comes.
        """
        if self.team.size == 1:
            return
        names = [json.dumps(list(key)) for key, _ in units]
        left = [number for number, name in enumerate(names) if self.journal.get(name) is None]
        for start in range(0, len(left), self.team.size):
            some = left[start : start + self.team.size]
            texts = self.team.share_out([units[number] for number in some], self._text)
            for number, text in zip(some, texts, strict=True):
                self.journal.put(names[number], json.loads(text))

    def batches(
        self, chosen: Tensor, cost: int, what: str, unit: Callable[[Tensor], Unit]
    ) -> Iterator[tuple[Tensor, Any]]:
        """Run a unit on every batch of the chosen images; work is counted as it is done.

        Args:
            chosen: (N,) bool.
            cost: Forward passes per image.
            what: Said while it is done.
            unit: The unit of a batch, given by its rows (n,); units do not depend on each other.

        Yields:
            The rows of a batch, and its unit's result.
        """
        numbers = chosen.nonzero().flatten()
        self.meter.add(what, cost * (self.task.n - len(numbers)))
        parts = split(numbers, self.task.batch_size)
        for start in range(0, len(parts), self.team.size):
            some = parts[start : start + self.team.size]
            units = [unit(part) for part in some]
            self.prepare(units)
            for part, (key, work) in zip(some, units, strict=True):
                yield part, self.run(key, work)
                self.meter.add(what, cost * len(part))

    def wrong(
        self,
        key: Key,
        subject: Subject,
        predict: Predict,
        made: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Where `predict` errs on all images of the task, (N,) bool: one unit, judged in batches.

        Args:
            key: Names the unit.
            subject: Whose answers they are.
            predict: What is judged.
            made: Gives what is shown instead, (N,C,H,W) uint8, such as corrupted images.
        """
        # A stochastic subject's draws over all batches are one stream.
        team = ALONE if subject.stochastic else self.team
        judge = partial(self.judge, subject, predict, made, team)
        return unpack_bits(self.run(key, judge, joint=team is self.team), self.task.n)

    def judge(
        self, subject: Subject, predict: Predict, made: Callable[[], Tensor] | None, team: Team
    ) -> str:
        """The work of `wrong`, whose batches a team may share out."""
        task = self.task
        images = task.images if made is None else made()

        def look(part: Tensor) -> list[bool]:
            pixels = images[part].float() / 255
            found: list[bool] = errs(subject, predict, pixels, task.labels[part]).tolist()
            return found

        parts = team.share_out(split(torch.arange(task.n), task.batch_size), look)
        return pack_bits(torch.tensor([flag for part in parts for flag in part]))


def part_key(part: Tensor) -> str:
    """Names a batch: its first row, its size, and a checksum of its rows (n,)."""
    rows = part.numpy().astype("<i8").tobytes()
    return f"{int(part[0])}+{len(part)}:{zlib.crc32(rows):08x}"


def split(numbers: Tensor, size: int) -> list[Tensor]:
    """(n,) in pieces of at most `size`."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def errs(subject: Subject, predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
    """Whether `predict` errs on each image: (n,C,H,W) in [0,1] and (n,) int64 to (n,) bool."""
    with torch.no_grad(), named(subject.name):
        logits = check_logits(predict(images.to(subject.device)), len(images), labels)
        return logits.argmax(dim=1).cpu() != labels


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put the model's name before what is said about it."""
    try:
        yield
    except EpdistillError as error:
        raise type(error)(f"{where}: {error}") from error


@contextmanager
def own_rng(devices: Sequence[torch.device | str], seed: int) -> Iterator[None]:
    """Lend models that draw random numbers generators of their own, seeded."""
    placed = [torch.device(device) for device in devices]
    cuda = sorted(
        {
            torch.cuda.current_device() if device.index is None else device.index
            for device in placed
            if device.type == "cuda"
        }
    )
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for number in cuda:
            torch.cuda.default_generators[number].manual_seed(seed)
        yield
