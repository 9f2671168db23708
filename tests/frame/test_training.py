"""The training loop: killed and resumed equals never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epdistill.augment import Augmentation
from epdistill.checkpoints import PREVIOUS, STATE
from epdistill.data import DataSet, load
from epdistill.errors import DivergedError, RunError
from epdistill.recipes import Recipe, load_recipe
from epdistill.runs import read_metrics
from epdistill.students.distill import DistillTask, build_student
from epdistill.teachers.teach import TeachTask, build_teacher, measure
from epdistill.training import Batch, Task, cosine, fit, seed_of


class KilledError(Exception):
    """Stands for SIGKILL between two steps."""


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load("digits", limit=96)


def tiny(**changes: object) -> Recipe:
    return load_recipe(
        "digits",
        {
            "teacher.channels": [4, 6], "student.name": "cnn", "student.width": None,
            "data.crop_padding": 1, "data.padding_mode": "zeros", **changes,
        },
        {},
    )  # fmt: skip


def make(kind: str, data: DataSet) -> Task:
    recipe = tiny()
    teacher = build_teacher(recipe, data)
    if kind == "teacher":
        return TeachTask(teacher, recipe, data.validation)
    return DistillTask(build_student(recipe, teacher), teacher, recipe, data.validation)


def train(task: Task, data: DataSet, folder: Path, epochs: int = 3) -> dict[str, float]:
    recipe = tiny().data
    return fit(
        task, data.train, folder, title="t", epochs=epochs, batch_size=32,
        augmentation=Augmentation(recipe.crop_padding, recipe.flip, recipe.padding_mode),
        seed=5, device=torch.device("cpu"), checkpoint_seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_killed_and_resumed_is_the_same(
    kind: str, stop: int, data: DataSet, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    whole = make(kind, data)
    train(whole, data, straight)
    first = make(kind, data)
    step = first.step

    def dying(batch: Batch) -> dict[str, float]:
        if batch.step == stop:
            raise KilledError
        return step(batch)

    first.step = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        train(first, data, broken)
    second = make(kind, data)
    train(second, data, broken)
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
    assert read_metrics(straight) == read_metrics(broken)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_rng(
    data: DataSet, tmp_path: Path
) -> None:
    results = []
    before = torch.get_rng_state()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        task = make("teacher", data)
        train(task, data, tmp_path / name, epochs=1)
        results.append(task.state())
    assert torch.equal(before, torch.get_rng_state())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert any(value.abs().max() > 0 for value in results[0].values())


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_two_damaged_checkpoints_are_refused(data: DataSet, tmp_path: Path) -> None:
    train(make("teacher", data), data, tmp_path, epochs=1)
    for name in (STATE, PREVIOUS):
        flip(tmp_path / name)
    with pytest.raises(RunError, match=r"state\.safetensors is damaged.*previous.*is damaged"):
        train(make("teacher", data), data, tmp_path, epochs=2)


def test_divergence_stops_with_advice(data: DataSet, tmp_path: Path) -> None:
    task = make("teacher", data)
    task.step = lambda batch: {"loss": float("nan"), "accuracy": 0.0}  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="lower the learning rates"):
        train(task, data, tmp_path)


def test_teaching_learns_digits(tmp_path: Path) -> None:
    digits = load("digits")
    recipe = load_recipe("digits", {"teacher.channels": [8, 16], "teacher.epochs": 4}, {})
    model = build_teacher(recipe, digits)
    before = measure(model, digits.test).accuracy
    fit(
        TeachTask(model, recipe, digits.validation), digits.train, tmp_path, title="t", epochs=4,
        batch_size=16, augmentation=Augmentation(), seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    after = measure(model, digits.test)
    assert before < 0.3
    assert after.accuracy > 0.85
    assert after.converged > 0.99


def test_seeds_and_cosine() -> None:
    seeds = {seed_of(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert cosine(0.0) == 1.0
    assert cosine(1.0, 0.1) == pytest.approx(0.1)
    assert cosine(2.0, 0.1) == pytest.approx(0.1)
