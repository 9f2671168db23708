"""Recorded sweeps: what is kept between relaxations, and what a GPU makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.data import DataSet, Split
from epdistill.recipes import load_recipe
from epdistill.teachers import captured, mixed, relaxation
from epdistill.teachers.architecture import Architecture, LayerSpec
from epdistill.teachers.captured import allowed, relax_recorded, rounded
from epdistill.teachers.energy import unpool_by_place
from epdistill.teachers.figures import flops
from epdistill.teachers.model import EPCNN
from epdistill.teachers.relaxation import records, relax
from epdistill.teachers.schedule import Relaxed, Schedule
from epdistill.teachers.teach import TeachTask, build_teacher
from epdistill.training import Batch, generator_of

SCHEDULE = Schedule(omega=1.3, tolerance=1e-4, sweeps=250, check_every=2)


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    captured.forget()
    yield
    captured.forget()


def small_model(seed: int = 0) -> EPCNN:
    layers = (LayerSpec(6), LayerSpec(8), LayerSpec(8, padding=0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EPCNN(Architecture(1, 16, layers, 4, (0.5,), (0.25,)), SCHEDULE, init_scale=2.5)


def images_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 16, 16, generator=generator)


def replayed(model: EPCNN, images: Tensor, schedule: Schedule = SCHEDULE) -> Relaxed:
    network, x = model.network(), model.normalise(images)
    return relax_recorded(network, network.pool(1, network.drive(1, x)), schedule)


def test_batches_are_rounded_up_to_few_sizes() -> None:
    sizes = [rounded(count) for count in range(1, 1001)]
    assert all(count <= size <= max(1.5 * count, 2) for count, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 20


def test_images_leave_the_batch_as_they_settle_and_come_back_in_order() -> None:
    model, images = small_model(), images_of(33)
    expected = relax(model.network(), model.normalise(images), SCHEDULE)
    found = replayed(model, images)
    assert len(set(expected.certificate.sweeps.tolist())) > 2
    assert len({key[1] for key in captured._recorded}) > 1
    assert found.certificate.sweeps.tolist() == expected.certificate.sweeps.tolist()
    for state, other in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(state, other, rtol=0, atol=1e-6)


def test_a_recording_takes_new_weights_and_leaves_earlier_answers_alone() -> None:
    model, other, images = small_model(0), small_model(1), images_of(5)
    first = replayed(model, images)
    kept = [state.clone() for state in first.states]
    second = replayed(other, images)
    assert len({key[1] for key in captured._recorded if key[1] == rounded(5)}) == 1
    assert all(torch.equal(state, old) for state, old in zip(first.states, kept, strict=True))
    expected = relax(other.network(), other.normalise(images), SCHEDULE)
    for state, goal in zip(second.states, expected.states, strict=True):
        torch.testing.assert_close(state, goal, rtol=0, atol=1e-6)


def test_rows_beyond_the_batch_do_not_touch_it() -> None:
    model, images = small_model(), images_of(8)
    replayed(model, images)
    for count in (7, 5):
        found, alone = replayed(model, images[:count]), small_model()
        expected = relax(alone.network(), alone.normalise(images[:count]), SCHEDULE)
        for state, goal in zip(found.states, expected.states, strict=True):
            torch.testing.assert_close(state, goal, rtol=0, atol=1e-6)


def test_only_so_many_recordings_are_kept() -> None:
    model = small_model()
    for count in range(1, 200, 3):
        replayed(model, images_of(count), SCHEDULE.with_(tolerance=0.0, sweeps=1))
    for omega in torch.linspace(0.5, 1.5, 20).tolist():
        replayed(model, images_of(3), SCHEDULE.with_(tolerance=0.0, sweeps=1, omega=omega))
    assert len(captured._recorded) == captured.KEPT


def test_a_processor_records_nothing() -> None:
    model = small_model()
    assert not records(model.network(), SCHEDULE)
    model.relax(images_of(2))
    assert not captured._recorded


def test_flops_are_those_of_sweeps_that_were_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_model(), images_of(3)
    expected = flops(model, images)
    monkeypatch.setattr(relaxation, "records", lambda *_: allowed())
    assert flops(model, images) == expected
    assert not captured._recorded and allowed()
    model.relax(images)
    assert captured._recorded


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 2), (3, 3)])
def test_unpooling_by_place_is_unpooling(size: tuple[int, int]) -> None:
    u = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0))
    value, index = F.max_pool2d(u, 2, return_indices=True)
    expected = F.max_unpool2d(value, index, (2, 2), output_size=size)
    found = unpool_by_place(value, index, size)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_differences_need_not_ask_which_maxima_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_model(), images_of(6)
    schedule = SCHEDULE.with_(precision="mixed")
    monkeypatch.setattr(relaxation, "computes_low", lambda device: True)
    asked = model.relax(images, schedule)
    monkeypatch.setattr(mixed, "_may_ask", lambda _: False)
    unasked = model.relax(images, schedule)
    for state, other in zip(unasked.states, asked.states, strict=True):
        assert torch.equal(state, other)


def digits_like(count: int) -> DataSet:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % 4)
    return DataSet("folder:x", ("a", "b", "c", "d"), split, split, split)


def taught(device: str, steps: int = 4) -> list[Tensor]:
    recipe = load_recipe("default", overrides={"teacher.channels": [8, 8, 8], "teacher.sweeps": 30})
    data = digits_like(32)
    model = build_teacher(recipe, data).to(device)
    task = TeachTask(model, recipe, data.validation)
    for step in range(steps):
        images = data.train.images[step * 8 : step * 8 + 8].to(device).float() / 255
        labels = data.train.labels[step * 8 : step * 8 + 8].to(device)
        rows = torch.arange(8)
        task.step(Batch(images, labels, step, steps, 0, 1, generator_of(step), rows))
    return [parameter.detach().cpu() for parameter in model.parameters()]


def test_a_teacher_learns_the_same_from_recorded_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = taught("cpu")
    monkeypatch.setattr(relaxation, "records", lambda *_: True)
    for one, other in zip(taught("cpu"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_replays_what_it_does_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_model().cuda(), images_of(33).cuda()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network, x = model.network(), model.normalise(images)
    assert records(network, SCHEDULE)
    found = relax(network, x, SCHEDULE)
    assert captured._recorded
    monkeypatch.setattr(relaxation, "records", lambda *_: False)
    expected = relax(network, x, SCHEDULE)
    for state, other in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(state, other, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_teaches_the_same_bits_twice() -> None:
    from epdistill.workflows.context import Context

    Context(device="cuda").torch_device()
    assert all(map(torch.equal, taught("cuda"), taught("cuda")))
