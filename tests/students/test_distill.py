"""Distilling: every option trains, says what it did, and refuses what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.data import DataSet
from epdistill.errors import EvaluationError, RecipeError
from epdistill.recipes import Recipe, load_recipe
from epdistill.students.distill import DistillTask, build_student, check, hurried, spec_for
from epdistill.students.model import Student
from epdistill.teachers.baselines.registry import build_baseline
from epdistill.teachers.model import EPCNN
from epdistill.teachers.relaxation import residuals
from epdistill.teachers.targets import Targets, Teacher
from epdistill.training import Batch

RecipeOf = Callable[..., Recipe]
BatchOf = Callable[..., Batch]
OPTIONS: list[dict[str, Any]] = [
    {"match": "states"},
    {"match": "last"},
    {"match": "logits"},
    {"match": "logits", "readout": "frozen", "temperature": 4.0},
    {"distance": "bce"},
    {"distance": "cosine"},
    {"readout": "learned"},
    {"inputs": "clean"},
    {"inputs": "noise"},
    {"inputs": "mix"},
    {"inputs": "corruption", "corruptions": ["brightness", "pixelate"]},
    {"inputs": "adversarial", "adversarial_steps": 2},
    {"inputs": "adversarial", "adversarial_steps": 2, "targets": "clean"},
    {"inputs": "noise", "targets": "clean"},
    {"label_weight": 0.5, "label_smoothing": 0.1},
    {"teacher_tolerance": 0.05},
    {"inputs": "adversarial", "adversarial_norm": "l2", "adversarial_eps": 0.5},
    {"loss": "ce"},
    {"loss": "ce", "label_smoothing": 0.2},
    {"loss": "ce", "inputs": "noise"},
    {"loss": "ce", "inputs": "adversarial", "adversarial_steps": 2},
]


def task_for(recipe: Recipe, teacher: Teacher, data: DataSet) -> DistillTask:
    check(recipe.student, teacher, data)
    return DistillTask(build_student(recipe, teacher), teacher, recipe, data.validation)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_trains(
    options: dict[str, Any], teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    task = task_for(recipe(learning_rate=0.02, warmup=0.0, **options), teacher, data)
    before = torch.get_rng_state()
    values = [task.step(batch_of()) for _ in range(12)]
    assert torch.equal(before, torch.get_rng_state())
    assert values[-1]["loss"] < values[0]["loss"]
    supervised = options.get("loss") == "ce"
    assert ("sweeps" in values[0]) is ("settled" in values[0]) is not supervised
    found = task.validate()
    assert ("r2" in found) is (task.student.spec.matched > 0)
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_repeats_bit_by_bit(
    options: dict[str, Any], teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    states = []
    for _ in range(2):
        task = task_for(recipe(**options), teacher, data)
        task.step(batch_of(1))
        states.append(task.state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def first_loss(recipe: Recipe, teacher: Teacher, data: DataSet, batch: Batch) -> dict[str, float]:
    return task_for(recipe, teacher, data).step(batch)


def test_supervised_losses_are_cross_entropies(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    for smoothing in (0.0, 0.3):
        own = recipe(loss="ce", inputs="clean", label_smoothing=smoothing)
        student = build_student(own, teacher).train()
        batch = batch_of()
        logits = student(batch.images).detach().log_softmax(1)
        true = logits.gather(1, batch.labels[:, None]).mean()
        expected = -(1 - smoothing) * true - smoothing * logits.mean()
        found = first_loss(own, teacher, data, batch_of())
        assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_is_not_asked_without_one(
    teacher: EPCNN,
    data: DataSet,
    recipe: RecipeOf,
    batch_of: BatchOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = task_for(recipe(loss="ce"), teacher, data)
    monkeypatch.setattr(EPCNN, "targets", lambda self, images: pytest.fail("asked"))
    assert task.step(batch_of())["loss"] > 0


def asked_images(
    recipe: Recipe, teacher: EPCNN, data: DataSet, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """What teacher and student saw in one step, in order."""
    task = task_for(recipe, teacher, data)
    taught: list[Tensor] = []
    seen: list[Tensor] = []
    targets, match = EPCNN.targets, Student.match

    def watched(self: EPCNN, images: Tensor) -> Targets:
        taught.append(images)
        return targets(self, images)

    def looked(self: Student, images: Tensor) -> tuple[list[Tensor], Tensor]:
        seen.append(images.detach())
        return match(self, images)

    monkeypatch.setattr(EPCNN, "targets", watched)
    monkeypatch.setattr(Student, "match", looked)
    task.step(batch)
    return taught, seen


@pytest.mark.parametrize("inputs", ["clean", "noise", "mix", "corruption"])
def test_both_sides_see_the_same_images(
    inputs: str, teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batch = batch_of()
    taught, seen = asked_images(recipe(inputs=inputs), teacher, data, batch, monkeypatch)
    assert len(taught) == len(seen) == 1
    assert torch.equal(taught[0], seen[0])
    assert torch.equal(taught[0], batch.images) is (inputs == "clean")


@pytest.mark.parametrize("inputs", ["noise", "mix", "corruption"])
def test_the_clean_answer_is_asked_for_noisy_images(
    inputs: str, teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batch = batch_of()
    own = recipe(inputs=inputs, targets="clean")
    taught, seen = asked_images(own, teacher, data, batch, monkeypatch)
    assert len(taught) == len(seen) == 1
    assert torch.equal(taught[0], batch.images)
    assert not torch.equal(seen[0], batch.images)


def test_the_labels_term_is_added(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    without = first_loss(recipe(), teacher, data, batch_of())
    labels = first_loss(recipe(loss="ce"), teacher, data, batch_of())
    both = first_loss(recipe(label_weight=0.5, readout="learned"), teacher, data, batch_of())
    frozen = first_loss(recipe(label_weight=0.5), teacher, data, batch_of())
    assert frozen["loss"] > without["loss"]
    parts = both["states"] + both["kl"]
    # The same student, whose learned readout starts as that of a student without a teacher.
    assert both["loss"] == pytest.approx(parts + 0.5 * labels["loss"], rel=1e-5)


def test_a_hurried_teacher_stops_early_at_the_same_equilibria(
    teacher: EPCNN, batch_of: BatchOf, plain: Callable[..., Any]
) -> None:
    images = batch_of().images
    exact, early = teacher.targets(images), hurried(teacher, 0.05).targets(images)
    assert exact.sweeps is not None and early.sweeps is not None
    assert float(early.sweeps.double().mean()) < float(exact.sweeps.double().mean())
    assert bool(early.settled.all())
    network, x = teacher.network(), teacher.normalise(images)
    assert float(residuals(network, x, early.states).max()) <= 0.05
    gap = [((a - b) ** 2).mean() / a.var() for a, b in zip(exact.states, early.states, strict=True)]
    assert 0 < float(max(gap)) < 0.05
    for same in (hurried(teacher, None), hurried(teacher, teacher.schedule.tolerance / 2)):
        assert same is teacher
    other = plain()
    assert hurried(other, 0.05) is other


@pytest.mark.parametrize("where", ["there", "clean"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_inputs(
    where: str, norm: str, teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = recipe(
        inputs="adversarial", targets=where, adversarial_norm=norm,
        adversarial_eps=0.3, adversarial_steps=3,
    )  # fmt: skip
    batch = batch_of()
    taught, seen = asked_images(own, teacher, data, batch, monkeypatch)
    assert len(seen) == 4
    worst = seen[-1]
    length = (worst - batch.images).flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2)
    assert 0.05 < float(length.max()) <= 0.3 + 1e-6
    assert torch.equal(taught[0], batch.images)
    assert len(taught) == (2 if where == "there" else 1)
    if where == "there":
        assert torch.equal(taught[1], worst)


def test_the_search_finds_more_disagreement_than_noise(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    changes = {"targets": "clean", "adversarial_eps": 0.1, "adversarial_steps": 5}
    worst = first_loss(recipe(inputs="adversarial", **changes), teacher, data, batch_of())
    clean = first_loss(recipe(inputs="clean"), teacher, data, batch_of())
    assert worst["loss"] > clean["loss"]


def test_readouts(teacher: EPCNN, plain: Callable[..., Any], recipe: RecipeOf) -> None:
    def readout(teacher: Teacher, **changes: object) -> str:
        return spec_for(recipe(**changes).student, teacher).readout

    assert readout(teacher) == "frozen"
    assert readout(teacher, match="last") == "frozen"
    assert readout(teacher, match="logits") == "learned"
    assert readout(teacher, loss="ce") == "learned"
    assert readout(teacher, match="logits", readout="frozen") == "frozen"
    assert readout(plain()) == "learned"
    with pytest.raises(RecipeError, match="expected readout learned"):
        readout(plain(), readout="frozen")
    student = build_student(recipe(), teacher)
    weight, bias = teacher.linear_readout()
    assert torch.equal(student.readout_weight, weight)
    assert torch.equal(student.readout_bias, bias)
    assert not torch.equal(build_student(recipe(readout="learned"), teacher).readout_weight, weight)


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_teacher_that_is_no_ep_cnn(
    name: str, plain: Callable[..., Any], data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    own = recipe(name=name, width=3, learning_rate=0.02, warmup=0.0)
    task = task_for(own, plain(), data)
    if name == "cnn":
        shapes = [tuple(m.shape[1:]) for m in task.student.backbone(torch.zeros(2, 1, 8, 8))]
        assert shapes == [(3, 4, 4), (5, 1, 1), (5, 1, 1)]
    values = [task.step(batch_of()) for _ in range(12)]
    assert values[-1]["loss"] < values[0]["loss"]
    assert "sweeps" not in values[0]
    assert values[0]["settled"] == 1


def test_refusals_before_training(
    teacher: EPCNN, plain: Callable[..., Any], data: DataSet, recipe: RecipeOf
) -> None:
    def refuse(match: str, against: Teacher = teacher, **changes: object) -> None:
        with pytest.raises((RecipeError, EvaluationError), match=match):
            check(recipe(**changes).student, against, data)

    refuse(
        r"distance bce, but this teacher's states reach from 0 to .*\[0,1\]",
        plain(9.0),
        distance="bce",
    )
    refuse("corruption 'brigthness'", corruptions=["brigthness"])
    refuse("cached_views = 1 with adversarial inputs", cached_views=1, inputs="adversarial")
    refuse("cached_views = 1 with loss ce", cached_views=1, loss="ce")
    other = plain()
    other.classes = 7
    refuse("digits has 10 classes, the teacher 7", other)
    other.classes, other.image_size = 10, 28
    refuse("digits has 8 pixels a side, the teacher 28", other)
    check(recipe(distance="bce").student, teacher, data)
    clean = {"inputs": "adversarial", "targets": "clean"}
    check(recipe(cached_views=1, **clean).student, teacher, data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("match", "some"), ("distance", "l1"), ("readout", "none"), ("inputs", "dirty"),
        ("loss", "mse"), ("label_smoothing", 1.0), ("temperature", 0), ("adversarial_eps", 0),
        ("cached_views", -1), ("targets", "here"), ("corruptions", []),
        ("teacher_tolerance", 0), ("label_weight", -1.0),
    ],
)  # fmt: skip
def test_keys_out_of_range(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"student.{key}"):
        load_recipe("digits", {f"student.{key}": value}, {})


def test_unsettled_images_are_masked_and_counted(
    teacher: EPCNN, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    few = teacher.schedule.with_(sweeps=5, check_every=5)
    residual = teacher.relax(batch_of().images, few).certificate.residual
    hasty = teacher.with_schedule(few.with_(tolerance=float(residual.median())))
    settled = hasty.targets(batch_of().images).settled
    assert 0 < int(settled.sum()) < len(settled)
    own = recipe(inputs="clean")
    found = first_loss(own, hasty, data, batch_of())
    assert found["settled"] == pytest.approx(float(settled.double().mean()))
    student = build_student(own, hasty).train()
    logits = student(batch_of().images).detach()
    theirs = hasty.targets(batch_of().images).logits
    kl = F.kl_div(
        logits[settled].log_softmax(1), theirs[settled].log_softmax(1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("name", ["bp-cnn", "vit", "wca"])
def test_every_baseline_can_teach(
    name: str, data: DataSet, recipe: RecipeOf, batch_of: BatchOf
) -> None:
    own = recipe(learning_rate=0.02, warmup=0.0).model_copy(update={"model": name})
    teacher = build_baseline(own, data).eval()
    task = task_for(own, teacher, data)
    before = torch.get_rng_state()
    values = [task.step(batch_of()) for _ in range(12)]
    assert values[-1]["loss"] < values[0]["loss"]
    found = task.validate()
    assert 0 <= found["agreement"] <= 1
    assert torch.equal(before, torch.get_rng_state())
    twin = task_for(own, teacher, data)
    assert [twin.step(batch_of()) for _ in range(12)] == values
