"""Trackers: what they hear, resumed runs, failures, missing packages; and the live view."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.console import Reporter
from epdistill.data import Split
from epdistill.errors import RecipeError
from epdistill.live import describe, view
from epdistill.runs import read_metrics
from epdistill.tracking import TENSORBOARD, check, tracking
from epdistill.training import Batch, fit
from epdistill.workflows.context import Context


class Killed(Exception):
    """Stands for the end of the process."""


class Counting:
    """Learns nothing; fails at a step."""

    def __init__(self, until: int | None = None) -> None:
        self.done, self.until = torch.zeros((), dtype=torch.int64), until

    def step(self, batch: Batch) -> dict[str, float]:
        if self.until is not None and batch.step == self.until:
            raise Killed
        self.done = self.done + 1
        return {"loss": 1.0 / (1 + batch.step), "accuracy": 0.5}

    def validate(self) -> dict[str, float]:
        return {"accuracy": 0.25}

    def state(self) -> dict[str, Tensor]:
        return {"done": self.done}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.done = state["done"]


class Heard:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))


class Broken:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("no route")


def train(folder: Path, task: Counting, track: list[Any], **settings: Any) -> dict[str, float]:
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    return fit(
        task,
        Split(images, torch.zeros(40, dtype=torch.int64)),
        folder,
        title="test",
        epochs=3,
        batch_size=8,
        augmentation=Augmentation(0, False, "reflect"),
        seed=0,
        device=torch.device("cpu"),
        track=track,
        **settings,
    )


def test_trackers_hear_epochs_and_moments(tmp_path: Path) -> None:
    heard = Heard()
    train(tmp_path, Counting(), [heard])
    epochs = [(step, row) for step, row in heard.rows if "validation.accuracy" in row]
    kept = read_metrics(tmp_path)
    assert [step for step, _ in epochs] == [5, 10, 15] == [row["step"] for row in kept]
    for (_, row), written in zip(epochs, kept, strict=True):
        assert row == {name: value for name, value in written.items() if name != "step"}
    moments = [(step, row["running.loss"]) for step, row in heard.rows if "running.loss" in row]
    assert [step for step, _ in moments] == list(range(1, 16))
    assert moments[1][1] == pytest.approx((1 + 1 / 2) / 2)
    assert moments[5][1] == pytest.approx(1 / 6)  # a new epoch, a new mean


def test_a_broken_tracker_is_left_out_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, told = Reporter(quiet=True), []
    monkeypatch.setattr(reporter, "line", told.append)
    heard = Heard()
    train(tmp_path, Counting(), [Broken(), heard], reporter=reporter)
    assert len([line for line in told if "Broken failed at step 1 (no route)" in line]) == 1
    assert len(read_metrics(tmp_path)) == 3
    assert heard.rows[-1][0] == 15


def test_tensorboard_has_every_step_once_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        # Epoch 2 is written at step 10, steps 11 and 12 beyond it are lost.
        train(tmp_path, Counting(until=12), [TENSORBOARD])
    train(tmp_path, Counting(), [TENSORBOARD])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("running/loss")]
    assert steps == list(range(1, 16))
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    rows = [(row["step"], row["train.loss"]) for row in read_metrics(tmp_path)]
    assert [step for step, _ in losses] == [5, 10, 15]
    for (_, value), (_, expected) in zip(losses, rows, strict=True):
        assert value == pytest.approx(expected)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_metrics_do_not_depend_on_who_listens(tmp_path: Path) -> None:
    for name, track in (("alone", []), ("heard", [Heard()])):
        (tmp_path / name).mkdir()
        train(tmp_path / name, Counting(), track)
    assert read_metrics(tmp_path / "alone") == read_metrics(tmp_path / "heard")


def test_a_missing_package_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(RecipeError, match=r"pip install 'epdistill\[tensorboard\]'"):
        Context(runs=tmp_path / "runs", track=(TENSORBOARD,))
    assert not (tmp_path / "runs").exists()


def test_what_is_no_tracker_is_refused() -> None:
    check([Heard()])
    with pytest.raises(RecipeError, match=r"log\(step, values\)"):
        check([print])
    with pytest.raises(RecipeError, match="expected tensorboard"):
        check(["mlflow"])


def test_files_are_closed_when_a_training_fails(tmp_path: Path) -> None:
    with pytest.raises(Killed), tracking([TENSORBOARD], tmp_path, 0, print) as tell:
        tell.moment(1, 1, {"loss": 1.0})
        raise Killed
    assert sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()) > 0


def test_the_live_view_shows_figures_rate_and_eta() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with view(console, "teach", 20, 5, 64) as shown:
        for _ in range(15):
            shown.step({"loss": 0.25, "accuracy": 0.5, "sweeps": 31.24, "residual": 9.4e-5,
                        "converged": 0.998})  # fmt: skip
    text = screen.getvalue()
    for word in ("teach", "ETA", "images/s", "20/20", "loss 0.25", "accuracy 50.0 %",
                 "sweeps 31.2", "residual 9.4e-05", "settled 99.8 %"):  # fmt: skip
        assert word in text, word


def test_nothing_is_drawn_without_a_terminal() -> None:
    screen = io.StringIO()
    with view(Console(file=screen), "teach", 2, 0, 8) as shown:
        shown.step({"loss": 1.0})
    assert screen.getvalue() == ""


def test_figures_as_words() -> None:
    assert describe({"kl": 0.051517, "settled": 1.0}) == "kl 0.05152  settled 100.0 %"
