"""Cached views: what is read back is what was said, and training on it is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.data import DataSet
from epdistill.errors import DiskError, RunError
from epdistill.recipes import Recipe
from epdistill.students.cache import VIEWS, ViewCache
from epdistill.students.distill import DistillTask, build_student, cache_for
from epdistill.teachers.model import EPCNN
from epdistill.teachers.targets import Targets
from epdistill.training import Batch, fit

RecipeOf = Callable[..., Recipe]
# float16 keeps 11 bits.
CLOSE = {"rtol": 2**-10, "atol": 2**-10}


def never(places: Tensor) -> Tensor:
    raise AssertionError(f"asked for {places}")


def make(
    folder: Path, teacher: EPCNN, data: DataSet, recipe: Recipe
) -> tuple[DistillTask, ViewCache]:
    student = build_student(recipe, teacher)
    cache = cache_for(recipe.student, student, teacher, data, folder)
    assert cache is not None
    return DistillTask(student, teacher, recipe, data.validation, cache), cache


@pytest.mark.parametrize("match", ["states", "last", "logits"])
def test_read_back_is_what_was_said(
    match: str, teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    _, cache = make(tmp_path, teacher, data, recipe(cached_views=2, match=match))
    index = torch.tensor([5, 0, 17])
    images = data.train.images[index].float() / 255
    seen, said = cache.fetch(1, index, lambda places: images[places])
    assert (seen - images).abs().max() <= 2**-12
    online = teacher.targets(seen)
    count = {"states": 2, "last": 1, "logits": 0}[match]
    assert len(said.states) == count
    for ours, theirs in zip(said.states, online.states[2 - count :], strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(said.logits, online.logits, **CLOSE)
    assert torch.equal(said.settled, online.settled)
    assert said.sweeps is not None
    assert online.sweeps is not None
    assert torch.equal(said.sweeps, online.sweeps)
    # In another order, from the file alone; the other view is its own.
    again, same = cache.fetch(1, index.flip(0), never)
    assert torch.equal(again, seen.flip(0))
    assert torch.equal(same.logits, said.logits.flip(0))
    assert same.sweeps is not None
    assert int(same.sweeps.sum()) == 0
    with pytest.raises(AssertionError, match="asked for"):
        cache.fetch(0, index, never)


def test_only_what_is_missing_is_asked_for(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    _, cache = make(tmp_path, teacher, data, recipe(cached_views=1))
    images = data.train.images[:4].float() / 255
    cache.fetch(0, torch.tensor([0, 2]), lambda places: images[[0, 2]][places])
    asked: list[list[int]] = []

    def fresh(places: Tensor) -> Tensor:
        asked.append(places.tolist())
        return images[places]

    seen, _ = cache.fetch(0, torch.arange(4), fresh)
    assert asked == [[1, 3]]
    assert torch.equal(seen, images.half().float())


def test_unsettled_images_stay_unsettled(tmp_path: Path) -> None:
    def teacher(images: Tensor) -> Targets:
        return Targets([], images.flatten(1)[:, :2], images[:, 0, 0, 0] > 0.5)

    cache = ViewCache(
        tmp_path, views=1, images=2, image=(1, 2, 2), states=[], classes=2, teacher=teacher
    )
    images = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    for _ in range(2):
        assert cache.fetch(0, torch.arange(2), lambda places: images)[1].settled.tolist() == [
            False,
            True,
        ]


def train(task: DistillTask, data: DataSet, folder: Path, epochs: int) -> None:
    fit(
        task, data.train, folder, title="t", epochs=epochs, batch_size=30,
        augmentation=Augmentation(1, False, "zeros"), seed=5, device=torch.device("cpu"),
        checkpoint_seconds=0.0,
    )  # fmt: skip


def test_replaying_equals_the_teacher_online_on_the_same_views(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    own = recipe(cached_views=1, inputs="noise", learning_rate=0.01)
    cached, cache = make(tmp_path, teacher, data, own)
    train(cached, data, tmp_path, 1)
    assert cache.filled.sum() == len(data.train) // 30 * 30
    asked = []

    class Online:
        """The cached pictures, but the teacher's answer of now."""

        views = 1

        def fetch(self, view: int, index: Tensor, fresh: object) -> tuple[Tensor, Targets]:
            images, _ = cache.fetch(view, index, never)
            asked.append(len(images))
            return images, teacher.targets(images)

        def state(self) -> Tensor:
            return cache.state()

    results = []
    index = cache.filled[0].nonzero().squeeze(1)[:32]
    for source in (cache, Online()):
        task = DistillTask(build_student(own, teacher), teacher, own, data.validation)
        task.cache = source  # type: ignore[assignment]
        images = torch.zeros(32, 1, 8, 8)
        generator = torch.Generator().manual_seed(0)
        values = [
            task.step(
                Batch(images, data.train.labels[index], 0, 10, 1, 2, generator, index)
            )
            for _ in range(3)
        ]  # fmt: skip
        results.append((values, task.student.state_dict()))
    assert asked == [32] * 3
    (kept, ours), (now, theirs) = results
    assert [v["loss"] for v in kept] == pytest.approx([v["loss"] for v in now], rel=1e-3)
    assert kept[-1]["loss"] < kept[0]["loss"]
    assert [v["sweeps"] for v in kept] == [0.0] * 3
    assert all(v["sweeps"] > 1 for v in now)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=1e-3)


class KilledError(Exception):
    """Stands for SIGKILL between two steps."""


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_killed_and_resumed_is_the_same(
    stop: int, teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    # Three steps an epoch leave images over that the replay must ask for.
    own = recipe(cached_views=2, inputs="mix")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    whole, _ = make(straight, teacher, data, own)
    train(whole, data, straight, 4)
    first, cache = make(broken, teacher, data, own)
    step = first.step

    def dying(batch: Batch) -> dict[str, float]:
        if batch.step == stop:
            # Written after the checkpoint: these rows must not be trusted.
            step(batch)
            cache.filled[:] = True
            raise KilledError
        return step(batch)

    first.step = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        train(first, data, broken, 4)
    second, _ = make(broken, teacher, data, own)
    train(second, data, broken, 4)
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name


def test_a_lost_file_is_told(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    own = recipe(cached_views=1)
    task, cache = make(tmp_path, teacher, data, own)
    train(task, data, tmp_path, 1)
    state = task.state()
    cache.remove()
    assert not (tmp_path / VIEWS).exists()
    again, _ = make(tmp_path, teacher, data, own)
    with pytest.raises(RunError, match="is gone or of another size"):
        again.restore(state)


def test_no_room(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2, 1, 1))
    with pytest.raises(DiskError, match=r"1 cached views need [\d,]+ bytes, 1 are free"):
        make(tmp_path, teacher, data, recipe(cached_views=1))
    assert not (tmp_path / VIEWS).exists()


def test_the_size_is_that_of_the_file(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    _, cache = make(tmp_path, teacher, data, recipe(cached_views=3))
    # Picture, two states, logits, settled: 2 bytes each.
    row = 64 + sum(c * h * w for c, h, w in teacher.shapes) + 10 + 1
    assert cache.size_bytes == 2 * row * 3 * len(data.train) == cache.path.stat().st_size


def test_a_damaged_row_is_told(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    own = recipe(cached_views=1)
    task, cache = make(tmp_path, teacher, data, own)
    train(task, data, tmp_path, 1)
    state = task.state()
    row = cache.size_bytes // len(data.train)
    number = int(cache.filled[0].nonzero()[3])
    with cache.path.open("r+b") as file:
        file.seek(number * row + 7)
        byte = file.read(1)[0]
        file.seek(number * row + 7)
        file.write(bytes([byte ^ 1]))
    again, found = make(tmp_path, teacher, data, own)
    again.restore(state)
    found.fetch(
        0,
        torch.tensor([n for n in range(len(data.train)) if n != number][:5]),
        lambda p: data.train.images[p].float() / 255,
    )
    with pytest.raises(RunError, match=f"is damaged .view 0 of image {number}"):
        found.fetch(0, torch.tensor([number]), never)


def test_the_room_is_taken_at_once(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, tmp_path: Path
) -> None:
    """A file with holes would kill the process where a page finds no room."""
    _, cache = make(tmp_path, teacher, data, recipe(cached_views=1))
    assert cache.path.stat().st_blocks * 512 >= cache.size_bytes
