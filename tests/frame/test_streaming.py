"""Images left on disk: the same bits in the same order, bounded memory, clear errors."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from epdistill import streaming
from epdistill.augment import Augmentation
from epdistill.data import DataSet, describe, load
from epdistill.errors import DataError, RecipeError
from epdistill.images import read_image
from epdistill.recipes import load_recipe
from epdistill.streaming import AHEAD, CHUNK, Files
from epdistill.teachers.teach import TeachTask, build_teacher
from epdistill.training import Batch, fit


def paint(folder: Path, counts: dict[str, int], *, grey: bool = False) -> Path:
    draw = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (11 + number % 3, 12) if grey else (11 + number % 3, 12, 3)
            pixels = draw.integers(0, 256, shape, dtype=np.uint8) // (label + 1)
            kind = "png" if number % 2 else "jpg"
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.{kind}")
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("pets"), {"cat": 30, "dog": 25})


def both(folder: Path, **how: Any) -> tuple[DataSet, DataSet]:
    name = f"folder:{folder}"
    return load(name, image_size=8, stream=False, **how), load(
        name, image_size=8, stream=True, workers=0, **how
    )


@pytest.mark.parametrize("limit", [None, 12])
def test_a_streamed_folder_is_the_same_data_set(pets: Path, limit: int | None) -> None:
    whole, lazy = both(pets, limit=limit, seed=4)
    for one, other in (
        (whole.train, lazy.train),
        (whole.validation, lazy.validation),
        (whole.test, lazy.test),
    ):
        assert isinstance(one.images, Tensor) and isinstance(other.images, Files)
        assert one.images.shape == other.images.shape and len(one) == len(other)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images[:])
        assert torch.equal(one.images[2:5], other.images[2:5])
        pick = torch.tensor([3, 0, 3])
        assert torch.equal(one.images[pick], other.images[pick])
        assert torch.equal(one.to("cpu").images[:], other.to("cpu").images[:])
    assert (whole.mean, whole.std) == (lazy.mean, lazy.std)
    assert describe(whole) == describe(lazy)


def test_a_folder_with_a_test_set_of_its_own(tmp_path: Path) -> None:
    paint(tmp_path / "train", {"a": 6, "b": 7}, grey=True)
    paint(tmp_path / "test", {"a": 2, "b": 3}, grey=True)
    whole, lazy = both(tmp_path)
    assert lazy.channels == 1 and len(lazy.test) == 5
    assert describe(whole) == describe(lazy)
    assert torch.equal(whole.train.images[:], lazy.train.images[:])


class Seen:
    """A task that remembers what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self, batch: Batch) -> dict[str, float]:
        self.seen.append((batch.images, batch.labels, batch.index))
        return {"loss": 0.0}

    def validate(self) -> dict[str, float]:
        return {"accuracy": 0.0}

    def state(self) -> dict[str, Tensor]:
        return {"x": torch.zeros(1)}

    def restore(self, state: Any) -> None: ...


def show(task: Any, data: DataSet, folder: Path, epochs: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    fit(
        task, data.train, folder, title="t", epochs=epochs, batch_size=8,
        augmentation=Augmentation(2, True), seed=5, device=torch.device("cpu"),
    )  # fmt: skip


def test_training_sees_the_same_batches(pets: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    whole, lazy = both(pets)
    tasks = Seen(), Seen()
    for task, data, name in zip(tasks, (whole, lazy), "ab", strict=True):
        show(task, data, tmp_path / name)
    assert torch.equal(before, torch.get_rng_state())
    assert len(tasks[0].seen) == len(tasks[1].seen) == 3 * (len(whole.train) // 8)
    for one, other in zip(tasks[0].seen, tasks[1].seen, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours, theirs)


def test_training_goes_on_where_it_was_killed(pets: Path, tmp_path: Path) -> None:
    _, lazy = both(pets)
    straight, again = Seen(), Seen()
    show(straight, lazy, tmp_path / "a")
    show(Seen(), lazy, tmp_path / "b", epochs=1)  # as if killed after the first of three
    show(again, lazy, tmp_path / "b")
    rest = straight.seen[len(lazy.train) // 8 :]
    assert len(again.seen) == len(rest)
    for one, other in zip(again.seen, rest, strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.slow
def test_workers_give_the_same_weights(pets: Path, tmp_path: Path) -> None:
    recipe = load_recipe("digits", {"teacher.channels": [4, 6], "data.crop_padding": 1}, {})
    name, weights = f"folder:{pets}", []
    for how in ({"stream": False}, {"stream": True, "workers": 2}):
        data = load(name, image_size=8, **how)  # type: ignore[arg-type]
        task = TeachTask(build_teacher(recipe, data), recipe, data.validation)
        show(task, data, tmp_path / str(len(weights)), epochs=2)
        weights.append(task.state())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is decoded from now on, in order."""
    opened: list[Path] = []

    def read(path: Path, **how: int) -> Any:
        opened.append(path)
        return read_image(path, **how)

    monkeypatch.setattr(streaming, "read_image", read)
    return opened


def test_nothing_is_decoded_before_it_is_needed(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = counted(monkeypatch)
    _, lazy = both(pets)
    assert opened == []
    rows = iter([torch.arange(i, i + 4) for i in range(0, 40, 4)])
    with lazy.train.feed(rows) as feed:
        for done in range(1, 4):
            pick, pixels = next(feed)
            assert torch.equal(pixels, lazy.train.images[pick])
            # This test's own look has decoded the batch once more.
            assert len(opened) == 2 * 4 * done


def test_a_whole_split_is_gone_through_in_pieces(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lazy = both(pets)
    monkeypatch.setattr(streaming, "CHUNK", 7)
    sizes = []
    original = Files.__getitem__

    def look(self: Files, index: slice | Tensor) -> Tensor:
        found = original(self, index)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(Files, "__getitem__", look)
    describe(lazy)
    assert lazy.mean and sum(sizes) == len(lazy.test) + len(lazy.train)
    assert max(sizes) == 7 < CHUNK


class Marked(Files):
    """Leaves a mark on disk for every batch it decodes, whichever process does it."""

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        with (self.paths[0].parent.parent / "marks").open("a") as file:
            file.write("x")
        return super().__getitem__(index)


@pytest.mark.slow
def test_workers_are_a_few_batches_ahead_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The workers import this very module for `Marked`.
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    folder = paint(tmp_path / "many", {"a": 40, "b": 40})
    paths = tuple(sorted(folder.rglob("*.*")))
    whole = torch.stack([torch.from_numpy(read_image(p, channels=3, size=8)) for p in paths])
    workers, batches, marks = 2, 40, folder / "marks"
    files = Marked(paths, 3, 8, workers)
    rows = [torch.tensor([i, 79 - i]) for i in range(batches)]
    taken: list[int] = []

    def asked() -> Iterator[Tensor]:
        for number, pick in enumerate(rows):
            taken.append(number)
            yield pick

    with files.feed(asked()) as feed:
        for done in range(1, batches + 1):
            pick, pixels = next(feed)
            assert torch.equal(pick, rows[done - 1])
            assert torch.equal(pixels, whole[pick])
            # Numbers are handed out only as batches come back; marks lag behind that.
            assert len(taken) <= done + AHEAD * workers
            assert len(marks.read_text()) <= done + AHEAD * workers
            if done == 3:
                time.sleep(1.0)  # workers that would run on have the time to
                assert len(marks.read_text()) <= done + AHEAD * workers
    assert len(marks.read_text()) == batches
    del feed
    gc.collect()
    assert not torch.multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    folder = paint(tmp_path / "pets", {"cat": 12, "dog": 12})
    data = load(f"folder:{folder}", image_size=8, stream=True, workers=workers)
    assert isinstance(data.train.images, Files)
    victim = data.train.images.paths[5]
    victim.write_bytes(victim.read_bytes()[:-200])
    with (
        pytest.raises(DataError, match="is not a readable image") as caught,
        data.train.feed([torch.arange(4), torch.arange(4, 8)]) as feed,
    ):
        assert len(next(feed)[0]) == 4
        next(feed)
    assert str(victim) in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_auto_streams_what_would_fill_memory(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"folder:{pets}"
    assert isinstance(load(name, image_size=8).train.images, Tensor)
    monkeypatch.setattr(streaming, "SHARE", 0.0)
    assert isinstance(load(name, image_size=8).train.images, Files)
    assert isinstance(load(name, image_size=8, stream=False).train.images, Tensor)


def test_only_folders_stream() -> None:
    assert isinstance(load("digits", stream="auto").train.images, Tensor)
    with pytest.raises(DataError, match=r"data\.stream = true for digits"):
        load("digits", stream=True)
    with pytest.raises(RecipeError, match=r"data\.workers = 65"):
        load_recipe("digits", {"data.workers": 65}, {})
    with pytest.raises(RecipeError, match=r"data\.stream"):
        load_recipe("digits", {"data.stream": "sometimes"}, {})
