"""The rivals: each learns, answers as a teacher must, and resumes to the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.augment import Augmentation
from epdistill.data import DataSet, load, to_float
from epdistill.errors import RecipeError
from epdistill.recipes import MODELS, Recipe, load_recipe
from epdistill.robustness.attacks import expectation
from epdistill.robustness.guards import distances
from epdistill.teachers.baselines.base import Baseline, ImageSpec
from epdistill.teachers.baselines.convnet import ConvNet
from epdistill.teachers.baselines.registry import KINDS, build_baseline
from epdistill.teachers.baselines.tasks import TASKS, BaselineTask, measure, seeded
from epdistill.teachers.baselines.vit import ViT, patch_for
from epdistill.teachers.baselines.wca import WcaNet
from epdistill.teachers.figures import flops, parameters, published_accuracy
from epdistill.teachers.targets import Teacher
from epdistill.teachers.teach import build_teacher
from epdistill.training import Batch, fit

CPU = torch.device("cpu")
SMALL = {
    "teacher.channels": [6, 8],
    "baselines.adv_cnn.steps": 3,
    "baselines.vit.width": 16,
    "baselines.vit.depth": 3,
    "baselines.vit.heads": 2,
    "baselines.vit.hidden": 16,
    "baselines.vit.learning_rate": 0.01,
    "baselines.wca.width": 4,
    "baselines.wca.features": 8,
}


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load("digits", limit=128)


def recipe_of(name: str, **changes: object) -> Recipe:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("digits", {**SMALL, "model": name, **changed}, {})


def task_of(name: str, data: DataSet, **changes: object) -> BaselineTask:
    recipe = recipe_of(name, **changes)
    return TASKS[name](build_baseline(recipe, data), recipe, data.validation)


def batch_of(data: DataSet, step: int = 0, *, epoch: int = 0, epochs: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images, labels = to_float(data.train.images[:64]), data.train.labels[:64]
    return Batch(images, labels, step, 40, epoch, epochs, generator, torch.arange(64))


def loss_of(model: Baseline, data: DataSet) -> float:
    model.eval()
    logits = model.targets(to_float(data.train.images[:64])).logits
    return float(F.cross_entropy(logits, data.train.labels[:64]))


@pytest.mark.parametrize("name", KINDS)
def test_it_learns(name: str, data: DataSet) -> None:
    task = task_of(name, data)
    before = loss_of(task.model, data)
    told = [task.step(batch_of(data, step)) for step in range(20)]
    assert loss_of(task.model, data) < 0.8 * before
    assert told[-1]["loss"] < told[0]["loss"]
    assert 0 <= task.validate()["accuracy"] <= 1


@pytest.mark.parametrize("name", KINDS)
def test_a_step_depends_on_its_batch_alone(name: str, data: DataSet) -> None:
    first, second = task_of(name, data), task_of(name, data)
    torch.manual_seed(1)
    first.step(batch_of(data))
    before = torch.get_rng_state()
    torch.manual_seed(2)
    here = torch.get_rng_state()
    second.step(batch_of(data))
    assert torch.equal(torch.get_rng_state(), here)
    assert not torch.equal(before, here)
    for name_, value in first.state().items():
        assert torch.equal(value, second.state()[name_]), name_


class KilledError(Exception):
    """Stands for SIGKILL between two steps."""


@pytest.mark.parametrize("name", ["bp-cnn", "vit", "wca"])
def test_killed_and_resumed_is_the_same(name: str, data: DataSet, tmp_path: Path) -> None:
    def train(task: BaselineTask, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        fit(
            task, data.train, folder, title="t", epochs=2, batch_size=32,
            augmentation=Augmentation(1, True, "zeros"), seed=5, device=CPU,
            checkpoint_seconds=0.0,
        )  # fmt: skip

    changes = {"baselines__vit__auto_augment": "svhn"}
    whole, first, second = (task_of(name, data, **changes) for _ in range(3))
    train(whole, tmp_path / "straight")
    step = first.step

    def dying(batch: Batch) -> dict[str, float]:
        if batch.step == 6:
            raise KilledError
        return step(batch)

    first.step = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        train(first, tmp_path / "broken")
    train(second, tmp_path / "broken")
    assert second.state().keys() == whole.state().keys()
    for name_, value in whole.state().items():
        assert torch.equal(value, second.state()[name_]), name_


@pytest.mark.parametrize("name", MODELS)
def test_every_teacher_answers_a_student(name: str, data: DataSet) -> None:
    recipe = recipe_of(name)
    model: Teacher = (
        build_teacher(recipe, data) if name == "ep-cnn" else build_baseline(recipe, data).eval()
    )
    images = to_float(data.test.images[:5]).requires_grad_()
    answer = model.targets(images)
    assert tuple(tuple(state.shape[1:]) for state in answer.states) == model.shapes
    assert (model.in_channels, model.image_size, model.classes) == (1, 8, 10)
    assert answer.settled.dtype == torch.bool
    assert answer.settled.shape == (5,)
    assert not any(part.requires_grad for part in (*answer.states, answer.logits))
    readout = model.linear_readout()
    assert readout is not None
    torch.testing.assert_close(F.linear(answer.states[-1].flatten(1), *readout), answer.logits)
    if name == "ep-cnn":
        assert answer.sweeps is not None and answer.sweeps.dtype == torch.int64
    else:
        assert answer.sweeps is None
        assert bool(answer.settled.all())
    if not model.stochastic:
        assert torch.equal(model(images), answer.logits)  # type: ignore[operator]


def test_settled_is_the_certificate_unless_the_schedule_promises_nothing(data: DataSet) -> None:
    images = to_float(data.test.images[:4])
    model = build_teacher(recipe_of("ep-cnn"), data)
    hasty = model.with_schedule(model.schedule.with_(sweeps=1, tolerance=1e-7))
    assert not hasty.targets(images).settled.any()
    assert model.targets(images).settled.all()
    fixed = model.with_schedule(model.schedule.with_(sweeps=1, tolerance=0.0))
    answer = fixed.targets(images)
    assert answer.settled.all()
    assert answer.sweeps is not None and answer.sweeps.tolist() == [1] * 4


def test_a_settling_output_layer_is_read_by_the_identity(data: DataSet) -> None:
    model = build_teacher(recipe_of("ep-cnn", teacher__readout="mse"), data)
    weight, bias = model.linear_readout()
    assert torch.equal(weight, torch.eye(10))
    assert not bias.any()


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_bp_cnn_has_the_shapes_of_the_ep_cnn(size: int) -> None:
    recipe = load_recipe("default", {"teacher.width": 4, "model": "bp-cnn"}, {})
    data = load("digits", image_size=size, limit=20)
    teacher, twin = build_teacher(recipe, data), build_baseline(recipe, data)
    assert twin.shapes == teacher.shapes
    # Without biases but with the scale and shift of BatchNorm.
    extra = sum(shape[0] for shape in twin.shapes)
    assert parameters(twin) == parameters(teacher) + extra


def test_bp_cnn_has_no_output_layer_inside(data: DataSet) -> None:
    plain, mse = (
        build_baseline(recipe_of("bp-cnn", teacher__readout=readout), data)
        for readout in ("cross-entropy", "mse")
    )
    assert plain.shapes == mse.shapes


def test_the_divisor_of_the_images_is_scaled_as_published(data: DataSet) -> None:
    for name, factor in (("bp-cnn", 3.0), ("adv-cnn", 3.0), ("vit", 1.0), ("wca", 1.0)):
        model = build_baseline(recipe_of(name), data)
        assert model.std.flatten().tolist() == pytest.approx([factor * data.std[0]])
        assert model.mean.flatten().tolist() == pytest.approx(list(data.mean))


def test_one_mean_per_channel(data: DataSet) -> None:
    with pytest.raises(RecipeError, match=r"mean has 3 and std 1 numbers .* 1 channels"):
        build_baseline(recipe_of("vit", teacher__mean=[0.5, 0.5, 0.5]), data)


def test_only_the_conv_nets_need_the_teachers_layers() -> None:
    data = load("digits", image_size=16, limit=20)  # SMALL has channels for 8 pixels
    for name in ("vit", "wca"):
        assert build_baseline(recipe_of(name), data).image_size == 16
    with pytest.raises(RecipeError, match="2 channel counts"):
        build_baseline(recipe_of("bp-cnn"), data)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l2", 1.0), ("linf", 8 / 255)])
def test_adversarial_images_stay_in_the_ball_and_hurt(norm: str, eps: float, data: DataSet) -> None:
    task = task_of("adv-cnn", data, baselines__adv_cnn__norm=norm, baselines__adv_cnn__eps=eps)
    for step in range(5):
        task.step(batch_of(data, step))
    batch = batch_of(data)
    task.model.train()
    found = task.place(batch, 0)
    assert all(module.training for module in task.model.modules())
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    away = distances(batch.images, found, norm)
    assert float(away.max()) <= eps + 1e-6
    assert float(away.median()) > 0.5 * eps
    task.model.eval()
    with torch.no_grad():
        before, after = (
            float(F.cross_entropy(task.model(x), batch.labels)) for x in (batch.images, found)
        )
    assert after > before


def test_wca_is_random_and_reproducible(data: DataSet) -> None:
    model = build_baseline(recipe_of("wca"), data).eval()
    images = to_float(data.test.images[:4])

    def answer(seed: int) -> Tensor:
        with seeded(seed, CPU):
            return model(images).detach()

    assert torch.equal(answer(1), answer(1))
    assert not torch.equal(answer(1), answer(2))
    with seeded(1, CPU):
        # Two passes under one seed are two draws, and every image has its own.
        assert not torch.equal(model(images), model(images))
        same = model(images[:1].expand(3, -1, -1, -1))
    assert len(same.unique(dim=0)) == 3
    split = replace(data.test, images=data.test.images[:100], labels=data.test.labels[:100])
    assert measure(model, split, 3) == measure(model, split, 3)
    assert measure(model, split, 3).without_noise is not None


def test_wca_noise_is_what_the_loss_says(data: DataSet) -> None:
    model = build_baseline(recipe_of("wca"), data).double().eval()
    assert isinstance(model, WcaNet)
    images = to_float(data.test.images[:1]).double().expand(500, -1, -1, -1)
    quiet = model.without_noise()
    expected = quiet(images[:1]).detach()
    assert torch.equal(expected, quiet(images[:1]))
    assert model.stochastic and not quiet.stochastic
    torch.testing.assert_close(expected, model.targets(images[:1]).logits)
    factor = model.factor.detach().tril()
    assert torch.equal(model.factor.detach(), factor)
    covariance = model.head.weight @ factor @ factor.T @ model.head.weight.T
    assert float(model.alignment().detach()) == pytest.approx(float(covariance.detach().trace()))
    with seeded(0, CPU), torch.no_grad():
        draws = torch.cat([model(images) for _ in range(40)])
    torch.testing.assert_close(draws.mean(0), expected[0], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.T.cov(), covariance.detach(), atol=0.1, rtol=0.05)


def test_wca_keeps_its_factor_triangular_and_grows_its_noise(data: DataSet) -> None:
    task = task_of("wca", data)
    assert isinstance(task.model, WcaNet)
    before = float(task.model.alignment().detach())
    for step in range(10):
        task.step(batch_of(data, step))
    assert not task.model.factor.triu(1).any()
    assert float(task.model.alignment().detach()) > before
    decayed, others = task.optimiser.param_groups
    assert decayed["weight_decay"] == 1e-4 and others["weight_decay"] == 0
    assert [tuple(p.shape) for p in decayed["params"]] == [(10, 8), (8, 8)]
    assert len(decayed["params"]) + len(others["params"]) == len(list(task.model.parameters()))


def test_wca_can_be_attacked_in_expectation(data: DataSet) -> None:
    model = build_baseline(recipe_of("wca"), data).eval()
    images = to_float(data.test.images[:4])
    exact = model.targets(images).logits

    def error(samples: int) -> float:
        return float((expectation(model, samples)(images).detach() - exact).norm())

    assert error(200) < 0.3 * error(1)


def test_auto_augment_draws_for_every_image(data: DataSet) -> None:
    task = task_of("vit", data, baselines__vit__auto_augment="cifar10")
    batch = batch_of(data)
    images = batch.images[:1].expand(32, -1, -1, -1)
    with seeded(0, CPU):
        found = task.place(replace(batch, images=images), 0)
    assert found.shape == images.shape and found.dtype == torch.float32
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert len(found.unique(dim=0)) > 8
    plain = task_of("vit", data, baselines__vit__auto_augment="none")
    assert torch.equal(plain.place(batch, 0), batch.images)


def test_rates_follow_their_schedules(data: DataSet) -> None:
    conv = task_of("bp-cnn", data, baselines__bp_cnn__step_epochs=8)
    rates = [conv.rate(batch_of(data, epoch=epoch, epochs=45)) for epoch in (0, 7, 8, 16)]
    assert rates == pytest.approx([1, 1, 0.3, 0.09])
    wca = task_of("wca", data)
    rates = [wca.rate(batch_of(data, epoch=epoch, epochs=6)) for epoch in range(6)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    vit = task_of("vit", data, baselines__vit__warmup=0.25)
    rates = [vit.rate(batch_of(data, step)) for step in range(40)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1 == max(rates)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.01)
    vit.step(batch_of(data, 0))
    assert vit.optimiser.param_groups[0]["lr"] == pytest.approx(1e-2 / 11)


def test_patches_leave_sixteen_tokens() -> None:
    assert [patch_for(size, 4) for size in (8, 12, 16, 32, 224)] == [2, 3, 4, 4, 4]
    assert patch_for(32, 8) == 8
    for size in (9, 30):
        with pytest.raises(RecipeError, match=rf"image size {size} .*--image-size"):
            patch_for(size, 4)


def test_vit_stages_are_thirds() -> None:
    images = ImageSpec(3, 16, 7, (0.5,) * 3, (0.25,) * 3)
    model = ViT(images, patch=4, width=12, depth=7, heads=3, hidden=8)
    assert model.ends == [3, 5, 7]
    assert model.shapes == ((12, 4, 4),) * 3 + ((12, 1, 1),)
    # Every patch sees every other: one pixel of the image reaches all of the last map.
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.stages(x)[2][0, :, 3, 3].sum(), x)
    assert gradient[0, :, 0, 0].abs().min() > 0
    with pytest.raises(RecipeError, match="5 heads"):
        ViT(images, patch=4, width=12, depth=1, heads=5, hidden=8)


def test_figures_count_by_hand(data: DataSet) -> None:
    images = ImageSpec(1, 8, 10, (0.5,), (0.25,))
    layer = {"channels": 4, "kernel": 3, "stride": 1, "padding": 1, "pool": "max"}
    model = ConvNet(images, [layer])
    assert model.shapes == ((4, 4, 4),)
    assert parameters(model) == 4 * 9 + 2 * 4 + 10 * 64 + 10
    sample = to_float(data.test.images[:3])
    assert flops(model, sample) == 2 * (8 * 8 * 9 * 4 + 10 * 64)
    assert model.training

    teacher = build_teacher(recipe_of("ep-cnn"), data)

    def after(sweeps: int) -> float:
        return flops(
            teacher.with_schedule(teacher.schedule.with_(tolerance=0, sweeps=sweeps)), sample
        )

    assert after(20) - after(10) == pytest.approx(after(30) - after(20))
    assert after(20) > after(10) > flops(build_baseline(recipe_of("bp-cnn"), data), sample)


def test_published_figures_belong_to_the_setting() -> None:
    assert published_accuracy(recipe_of("bp-cnn")) == {"cifar10": 0.88, "cifar100": 0.67}
    assert published_accuracy(recipe_of("ep-cnn"))["cifar10"] == 0.88
    assert published_accuracy(recipe_of("ep-cnn", teacher__rule="bptt")) == {}
    rows = {
        (norm, eps): published_accuracy(
            recipe_of("adv-cnn", baselines__adv_cnn__norm=norm, baselines__adv_cnn__eps=eps)
        ).get("cifar10")
        for norm, eps in (("l2", 0.5), ("l2", 1.0), ("linf", 8 / 255))
    }
    assert list(rows.values()) == [0.82, 0.74, None]
