"""Two checkpoints: one is always whole, and whichever is used, the bits in the end are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from epdistill import training
from epdistill.augment import Augmentation
from epdistill.checkpoints import (
    PREVIOUS,
    SECONDS,
    STATE,
    last_step,
    load_checkpoint,
    pick_up,
    read_checkpoint,
    save_checkpoint,
)
from epdistill.console import Reporter
from epdistill.data import Split
from epdistill.errors import RunError
from epdistill.runs import METRICS, append_metrics, read_metrics
from epdistill.training import CHECKPOINT_SECONDS, Batch, fit

SPLIT = Split(
    torch.randint(0, 256, (23, 1, 4, 4), dtype=torch.uint8,
                  generator=torch.Generator().manual_seed(1)),
    torch.arange(23) % 3,
)  # fmt: skip
STEPS, EPOCHS = 5, 3


class KilledError(Exception):
    """Stands for SIGKILL between two steps."""


class Walk:
    """A task whose state depends on every image and draw, and on their order."""

    def __init__(self, stop: int | None = None) -> None:
        self.place, self.stop = torch.zeros(3, dtype=torch.float64), stop

    def step(self, batch: Batch) -> dict[str, float]:
        if batch.step == self.stop:
            raise KilledError
        drawn = torch.rand(3, generator=batch.generator, dtype=torch.float64)
        self.place = 0.9 * self.place + drawn * batch.images.double().mean()
        return {"loss": float(self.place.sum())}

    def validate(self) -> dict[str, float]:
        return {"accuracy": float(self.place.mean())}

    def state(self) -> dict[str, Tensor]:
        return {"place": self.place}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.place = state["place"]


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def train(task: Walk, folder: Path, seconds: float = 0.0) -> list[str]:
    said = Said()
    fit(
        task, SPLIT, folder, title="t", epochs=EPOCHS, batch_size=4,
        augmentation=Augmentation(1, True, "zeros"), seed=7, device=torch.device("cpu"),
        reporter=said, checkpoint_seconds=seconds,
    )  # fmt: skip
    return said.lines


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, bytes]:
    folder = tmp_path_factory.mktemp("straight")
    task = Walk()
    train(task, folder)
    return task.place, (folder / METRICS).read_bytes()


def stopped(folder: Path, step: int) -> None:
    with pytest.raises(KilledError):
        train(Walk(step), folder)


def test_time_before_an_interruption_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Walk):
        def step(self, batch: Batch) -> dict[str, float]:
            values = super().step(batch)
            clock[0] += 1.0
            return values

    clock = [5.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(KilledError):
        train(Slow(3), tmp_path)
    assert read_checkpoint(tmp_path / STATE).facts[SECONDS] == 3
    clock[0] += 1000.0  # nobody trains
    train(Slow(), tmp_path)
    assert read_checkpoint(tmp_path / STATE).facts[SECONDS] == STEPS * EPOCHS


def flip(path: Path, position: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


def goes_on(folder: Path, straight: tuple[Tensor, bytes]) -> list[str]:
    task = Walk()
    lines = train(task, folder)
    assert torch.equal(task.place, straight[0])
    assert (folder / METRICS).read_bytes() == straight[1]
    return lines


@pytest.mark.parametrize("seconds", [0.0, CHECKPOINT_SECONDS, float("inf")])
def test_how_often_one_is_written_steers_nothing(
    seconds: float, straight: tuple[Tensor, bytes], tmp_path: Path
) -> None:
    task = Walk()
    train(task, tmp_path, seconds)
    assert torch.equal(task.place, straight[0])
    assert (tmp_path / METRICS).read_bytes() == straight[1]


@pytest.mark.parametrize("step", range(STEPS * EPOCHS))
@pytest.mark.parametrize("damage", ["none", "newest", "between the renames"])
def test_stopped_anywhere(
    step: int, damage: str, straight: tuple[Tensor, bytes], tmp_path: Path
) -> None:
    stopped(tmp_path, step)
    if damage == "newest" and step >= 2:
        flip(tmp_path / STATE)
    elif damage == "between the renames" and step >= 1:
        # The newest has become the previous one, and nothing has taken its place yet.
        (tmp_path / STATE).replace(tmp_path / PREVIOUS)
    lines = goes_on(tmp_path, straight)
    if damage == "newest" and step >= 2:
        assert f"{STATE} is damaged" in lines[0]
        assert lines[1] == f"going on from {PREVIOUS}, step {step - 1}"
    else:
        assert not any("damaged" in line for line in lines)


def test_the_previous_is_kept_until_the_next_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, 4)
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (read_checkpoint(tmp_path / STATE).facts["step"], last_step(tmp_path)) == (4, 4)
    assert read_checkpoint(tmp_path / PREVIOUS).facts["step"] == 3

    def failing(_: int) -> None:
        raise OSError("not now")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", failing)
        with pytest.raises(OSError, match="not now"):
            save_checkpoint(tmp_path, Walk().state(), {"step": 5})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == names


def test_a_damaged_newest_does_not_push_out_the_whole_one(tmp_path: Path) -> None:
    stopped(tmp_path, 4)
    flip(tmp_path / STATE)
    stopped(tmp_path, 3)  # picks up at 3, stops before it wrote anything
    assert not (tmp_path / STATE).exists()
    assert last_step(tmp_path) == 3


@pytest.mark.parametrize("kept", ["one", "two"])
def test_nothing_whole_is_an_error(kept: str, tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    flip(tmp_path / STATE)
    if kept == "one":
        (tmp_path / PREVIOUS).unlink()
    else:
        flip(tmp_path / PREVIOUS, 3)
    with pytest.raises(RunError, match=r"is damaged .*delete it to start again") as caught:
        train(Walk(), tmp_path)
    assert "\n" not in str(caught.value)
    assert last_step(tmp_path) is None


def test_every_byte_counts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"w": torch.arange(3.0)}, {"step": 1})
    path = tmp_path / STATE
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good)
        flip(path, position)
        with pytest.raises(RunError, match="damaged"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_metrics_come_back_from_the_checkpoint(
    damage: str, straight: tuple[Tensor, bytes], tmp_path: Path
) -> None:
    stopped(tmp_path, STEPS * 2 + 1)
    path = tmp_path / METRICS
    if damage == "flip":
        flip(path, 9)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    assert any("metrics.jsonl was damaged" in line for line in goes_on(tmp_path, straight))


def test_rows_of_an_epoch_that_has_no_checkpoint_are_written_once(
    straight: tuple[Tensor, bytes], tmp_path: Path
) -> None:
    append_metrics(tmp_path, {"step": STEPS, "epoch": 1})
    goes_on(tmp_path, straight)


def test_a_checkpoint_from_before_it_kept_the_rows(tmp_path: Path) -> None:
    for step in (5, 10):
        append_metrics(tmp_path, {"step": step})
    save_checkpoint(tmp_path, {"w": torch.ones(1)}, {"step": 7, "metrics": None})
    found = pick_up(tmp_path)
    assert found is not None and found.notes == ()
    assert read_metrics(tmp_path) == [{"step": 5}]


def test_metrics_with_a_damaged_line_are_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps({"step": 1}) + "\n{\n" + json.dumps({"step": 2}))
    with pytest.raises(RunError, match=r"line 2 of .* is damaged"):
        read_metrics(tmp_path)
