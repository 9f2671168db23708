"""The one training loop, for teachers and students alike.

Every random choice of step k of epoch e is drawn from a generator seeded with
(seed, e, k): data order, augmentation and noise need no stored state, and a run
that was killed continues as if nothing had happened. Nothing that steers the
training reads the clock; the clock only decides how often a checkpoint is written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.console import SILENT, Reporter
from epdistill.data import Split, to_float
from epdistill.errors import DivergedError, RunError
from epdistill.runs import METRICS, atomic_write, read_metrics
from epdistill.tracking import Track, tracking

STATE = "state.safetensors"
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
    """

    images: Tensor
    labels: Tensor
    step: int
    total: int
    epoch: int
    epochs: int
    generator: torch.Generator
    index: Tensor


class Task(Protocol):
    """Something that learns; `fit` drives it."""

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; return what to average over the epoch: loss, accuracy, ..."""

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


def save_checkpoint(folder: Path, task: Task, facts: Mapping[str, Any]) -> None:
    """Write what resuming needs, atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in task.state().items()}
    data = save_safetensors(tensors, metadata={"facts": json.dumps(dict(facts))})
    # The digest goes in front: a torn or altered checkpoint must not be continued from.
    atomic_write(folder / STATE, hashlib.sha256(data).digest() + data)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the checkpoint of an unfinished run; None if there is none.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    raw = path.read_bytes()
    data = raw[32:]
    if hashlib.sha256(data).digest() != raw[:32]:
        raise RunError(f"{path} is damaged (its checksum does not fit); delete it to start again")
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return load_safetensors(data), json.loads(header["__metadata__"]["facts"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it to start again") from error


def _trim_metrics(folder: Path, step: int) -> None:
    """Drop rows written after the checkpoint: they will be written again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    atomic_write(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


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
        track: Who else is told the figures (see `epdistill.tracking`).

    Returns:
        The last epoch's row of metrics.

    Raises:
        DivergedError: A loss was not finite.
        RunError: The checkpoint is damaged.
    """
    size = min(batch_size, len(split))
    per_epoch = len(split) // size
    total = per_epoch * epochs
    step, sums, row = 0, {}, {}
    found = load_checkpoint(folder)
    if found is not None:
        state, facts = found
        task.restore(state)
        step, sums, row = facts["step"], facts["sums"], facts["row"]
        _trim_metrics(folder, step)
        reporter.line(f"continuing at step {step} of {total}")
    saved = time.monotonic()
    with (
        tracking(track, folder, step, reporter.line) as tell,
        reporter.training(title, total, step, size) as live,
    ):
        for epoch in range(step // per_epoch, epochs):
            order = torch.randperm(len(split), generator=generator_of(seed, epoch))
            for k in range(step % per_epoch, per_epoch):
                pick = order[k * size : (k + 1) * size]
                generator = generator_of(seed, epoch, k)
                images = augmentation(split.images[pick].to(device), generator)
                labels = split.labels[pick].to(device)
                batch = Batch(to_float(images), labels, step, total, epoch, epochs, generator, pick)
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
                tell.moment(step, total, means)
                if k + 1 < per_epoch and time.monotonic() - saved >= checkpoint_seconds:
                    save_checkpoint(folder, task, {"step": step, "sums": sums, "row": row})
                    saved = time.monotonic()
            train = {f"train.{name}": value / per_epoch for name, value in sums.items()}
            validation = {f"validation.{n}": value for n, value in task.validate().items()}
            row = {"step": step, "epoch": epoch + 1, **train, **validation}
            tell.epoch(row)
            sums = {}
            save_checkpoint(folder, task, {"step": step, "sums": sums, "row": row})
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
