"""The one training loop, for teachers and students alike.

Every random choice of step k of epoch e is drawn from a generator seeded with
(seed, e, k): data order, augmentation and noise need no stored state, and a run
that was killed continues as if nothing had happened. Nothing that steers the
training reads the clock; the clock only decides how often a checkpoint is written.

A batch may be shared out over a team of processes: order, augmentation and noise are
drawn for the whole batch in each of them, and each takes its rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.checkpoints import SECONDS, Checkpoint, pick_up, save_checkpoint, spent
from epdistill.console import SILENT, Reporter
from epdistill.data import Split, to_float
from epdistill.distributed import ALONE, Shard, Team
from epdistill.errors import DivergedError
from epdistill.tracking import Track, tracking

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Batch:
    """What a step of a task sees.

    Attributes:
        images: (N, C, H, W) float32 in [0,1], augmented.
        labels: (N,) int64.
        step: Steps done before this one, over the whole training.
        total: Steps of the whole training.
        epoch: Whole epochs done before this one.
        epochs: Epochs of the whole training.
        generator: A CPU generator of this step alone.
        index: (N,) int64 on the CPU, the images' numbers in the split.
        part: Which rows of the global batch these N are, where it is shared out.
    """

    images: Tensor
    labels: Tensor
    step: int
    total: int
    epoch: int
    epochs: int
    generator: torch.Generator
    index: Tensor
    part: Shard | None = None

    @property
    def shard(self) -> Shard:
        """Which rows of the global batch these are: all of them without `part`."""
        return self.part or Shard(0, len(self.labels), len(self.labels))


class Task(Protocol):
    """Something that learns; `fit` drives it."""

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; return what to average over the epoch: loss, accuracy, ...

        In a team, of the global batch: the same in every process.
        """

    def validate(self) -> dict[str, float]:
        """Measure on the validation split after an epoch; `accuracy` at least."""

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and optimiser state, by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*parts: int) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def cosine(done: float, floor: float = 0.0) -> float:
    """The cosine schedule's factor after a share `done` (0 to 1) of its length."""
    return floor + (1 - floor) * 0.5 * (1 + cos(pi * min(max(done, 0.0), 1.0)))


def share_checkpoint(team: Team, task: Task, found: Checkpoint | None) -> Checkpoint | None:
    """Rank 0's checkpoint in every process; without one, rank 0's fresh task is restored in all.

    The other machines of a job need not see rank 0's disk.
    """
    if team.size == 1:
        return found
    state = task.state() if found is None else found.state
    facts = None if found is None else found.facts
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    packed = save_safetensors(tensors, {"facts": json.dumps(facts)}) if team.first else b""
    data = team.tell(packed)
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["facts"])
    if facts is not None:
        return Checkpoint(load_safetensors(data), facts, () if found is None else found.notes)
    task.restore(load_safetensors(data))
    return None


def fit(
    task: Task,
    split: Split,
    folder: Path,
    *,
    title: str,
    epochs: int,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    device: torch.device,
    reporter: Reporter = SILENT,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    team: Team = ALONE,
    track: Sequence[Track] = (),
) -> dict[str, float]:
    """Train `task`, continuing from the folder's checkpoint if there is one.

    Args:
        task: What learns.
        split: Training images, uint8; a last incomplete batch of an epoch is left out.
        folder: The run's folder, for `metrics.jsonl` and the checkpoint.
        title: What the progress bar says.
        epochs: Passes over the data.
        batch_size: Images per step; at most the whole split.
        augmentation: Applied to the uint8 batch.
        seed: Of order, augmentation and whatever the task draws.
        device: Where steps run.
        reporter: Where progress goes.
        checkpoint_seconds: How long a crash may throw back; never steers the result.
        team: The processes that share out every batch; rank 0 writes, and tells the trackers.
        track: Who else is told the figures (see `epdistill.tracking`).

    Returns:
        The last epoch's row of metrics.

    Raises:
        DivergedError: A loss was not finite.
        RunError: The checkpoint is damaged, and the one before it too.
        DiskError: The disk is full; the last checkpoint is as it was.
        RecipeError: A batch has fewer images than the team processes.
    """
    size = min(batch_size, len(split))
    shard = team.shard(size)
    per_epoch = len(split) // size
    total = per_epoch * epochs
    step, sums, row, before = 0, {}, {}, 0.0
    began = time.monotonic()
    found = share_checkpoint(team, task, pick_up(folder) if team.first else None)
    if found is not None:
        for note in found.notes:
            reporter.line(note)
        task.restore(found.state)
        step, sums, row = (found.facts[key] for key in ("step", "sums", "row"))
        before = spent(found)
        reporter.line(f"continuing at step {step} of {total}")

    def rows(done: int) -> Iterator[Tensor]:
        """The numbers of this process's images, step after step to the end of the training."""
        for epoch in range(done // per_epoch, epochs):
            order = torch.randperm(len(split), generator=generator_of(seed, epoch))
            for k in range(max(done - epoch * per_epoch, 0), per_epoch):
                yield order[k * size : (k + 1) * size][shard.rows]

    def facts() -> dict[str, Any]:
        seconds = before + time.monotonic() - began
        return {"step": step, "sums": sums, "row": row, SECONDS: seconds}

    saved = time.monotonic()
    with (
        split.feed(rows(step)) as feed,
        tracking(track if team.first else (), folder, step, reporter.line) as tell,
        reporter.training(title, total, step, size) as live,
    ):
        for epoch in range(step // per_epoch, epochs):
            for k in range(step % per_epoch, per_epoch):
                pick, pixels = next(feed)
                generator = generator_of(seed, epoch, k)
                images = to_float(augmentation(pixels.to(device), generator, shard))
                labels = split.labels[pick].to(device)
                batch = Batch(images, labels, step, total, epoch, epochs, generator, pick, shard)
                values = task.step(batch)
                if not all(isfinite(value) for value in values.values()):
                    raise DivergedError(
                        f"training diverged at step {step + 1} ({_show(values)}); the last "
                        f"checkpoint is kept in {folder}: lower the learning rates or beta and "
                        "train again"
                    )
                step += 1
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                means = {name: value / (k + 1) for name, value in sums.items()}
                live.step(means)
                due = time.monotonic() - saved >= checkpoint_seconds
                if team.first:
                    tell.moment(step, total, means)
                if team.first and due and k + 1 < per_epoch:
                    save_checkpoint(folder, task.state(), facts())
                    saved = time.monotonic()
            train = {f"train.{name}": value / per_epoch for name, value in sums.items()}
            validation = {f"validation.{n}": value for n, value in task.validate().items()}
            row = {"step": step, "epoch": epoch + 1, **train, **validation}
            sums = {}
            if team.first:
                tell.epoch(row)
                save_checkpoint(folder, task.state(), facts())
            saved = time.monotonic()
            news = {**train, "validation": row["validation.accuracy"]}
            reporter.line(f"[dim]{title}: epoch {epoch + 1}/{epochs}  {_show(news)}")
    return row


def _show(values: Mapping[str, float]) -> str:
    short = {name.removeprefix("train."): value for name, value in values.items()}
    return "  ".join(f"{name} {value:.4g}" for name, value in short.items())


def model_state(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """Weights and buffers of a model and what its optimiser keeps per parameter, by name.

    Args:
        model: What learns.
        optimiser: Over its parameters; all it remembers are tensors, as SGD and Adam do.
        names: Each parameter's name.
    """
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    memory = {
        f"{key}.{names[parameter]}": value
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
        if value is not None
    }
    return {**weights, **memory}


def restore_model(
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    state: Mapping[str, Tensor],
) -> None:
    """Take back what `model_state` gave."""
    parameters = {name: parameter for parameter, name in names.items()}
    weights = {}
    for entry, value in state.items():
        key, _, name = entry.partition(".")
        if key == "model":
            weights[name] = value
        elif name in parameters:
            # Adam counts its steps on the CPU, wherever the parameter lies.
            device = value.device if value.ndim == 0 else parameters[name].device
            optimiser.state[parameters[name]][key] = value.to(device).clone()
    model.load_state_dict(weights)
