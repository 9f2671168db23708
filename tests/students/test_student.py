"""Students: stages find their layers, the loss is what it says, folding is exact."""

from __future__ import annotations

import pytest
import torch

from epdistill.errors import RecipeError, RunError
from epdistill.students.backbones import names
from epdistill.students.matching import matching_loss, place
from epdistill.students.model import Student, StudentSpec, pair_stages, student_from
from epdistill.teachers.architecture import Architecture, layers_for


def architecture(size: int, channels: int = 1, width: int = 4) -> Architecture:
    layers = layers_for(size, width=width)
    return Architecture(channels, size, layers, 5, (0.5,) * channels, (0.25,) * channels)


def test_cifar_resnet_stages_are_the_fixed_points() -> None:
    teacher = architecture(32, 3, width=32)
    student = Student(StudentSpec("resnet18", 16, teacher))
    assert student.pairs == [1, 2, 3, 4]
    assert all(isinstance(adaptor, torch.nn.Identity) for adaptor in student.adaptors)


def test_pairing_only_shrinks() -> None:
    stages = [(8, 32, 32), (16, 16, 16), (32, 8, 8), (32, 1, 1)]
    assert pair_stages(stages, [(4, 16, 16), (4, 9, 9), (4, 1, 1)]) == [1, 1, 3]
    assert pair_stages(stages, [(4, 64, 64), (4, 1, 1)]) == [2, 3]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_maps_have_the_shapes_of_the_states(name: str, size: int) -> None:
    teacher = architecture(size)
    student = Student(StudentSpec(name, 4, teacher))
    landed, logits = student.match(torch.rand(2, 1, size, size))
    assert [tuple(m.shape[1:]) for m in landed] == teacher.shapes
    assert logits.shape == (2, 5)
    student.eval()
    images = torch.rand(2, 1, size, size)
    torch.testing.assert_close(student(images), student.match(images)[1])


def test_folding_gives_the_same_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    student = Student(StudentSpec("cnn", None, architecture(16))).double()
    width = student.readout_weight.shape[1]
    student.take_readout(
        torch.randn(5, width, generator=generator), torch.randn(5, generator=generator)
    )
    images = torch.rand(8, 1, 16, 16, generator=generator, dtype=torch.float64)
    student(images)  # moves the running statistics away from their start
    student.eval()
    folded = student.folded().double()
    assert not folded.training
    assert student(images).abs().max() > 0
    # The folded layer is stored in float32: one rounding.
    torch.testing.assert_close(folded(images), student(images), rtol=1e-6, atol=1e-6)


def test_unknown_student() -> None:
    with pytest.raises(RecipeError, match="did you mean resnet18"):
        Student(StudentSpec("resnet81", None, architecture(8)))


def test_weights_that_do_not_fit() -> None:
    student = Student(StudentSpec("cnn", None, architecture(8)))
    other = Student(StudentSpec("cnn", 9, architecture(8)))
    with pytest.raises(RunError, match="do not fit"):
        student_from({"model": student.spec.to_dict()}, other.state_dict())


def loss(landed: torch.Tensor, goal: torch.Tensor, settled: torch.Tensor) -> float:
    logits = torch.zeros(len(goal), 3)
    return float(
        matching_loss(
            [landed], logits, [goal], logits, settled, state_weight=1.0, logit_weight=1.0
        ).states
    )


def test_the_loss_is_one_minus_r2() -> None:
    generator = torch.Generator().manual_seed(1)
    goal = torch.rand(50, 2, 3, 3, generator=generator)
    everyone = torch.ones(50, dtype=torch.bool)
    assert loss(goal, goal, everyone) == 0
    assert loss(torch.full_like(goal, float(goal.mean())), goal, everyone) == pytest.approx(1.0)
    assert loss(10 * goal, 10 * goal + 1, everyone) == pytest.approx(
        1 / (100 * float(goal.var(unbiased=False))), rel=1e-4
    )


def test_unsettled_images_do_not_count() -> None:
    generator = torch.Generator().manual_seed(2)
    goal = torch.rand(6, 2, 3, 3, generator=generator)
    landed = goal.clone()
    landed[3:] += 5
    settled = torch.tensor([True] * 3 + [False] * 3)
    assert loss(landed, goal, settled) == 0
    assert loss(landed, goal, ~settled) > 1
    parts = matching_loss(
        [landed.requires_grad_()], torch.zeros(6, 3, requires_grad=True), [goal],
        torch.zeros(6, 3), torch.zeros(6, dtype=torch.bool), state_weight=1.0, logit_weight=1.0,
    )  # fmt: skip
    parts.total.backward()
    assert float(parts.total.detach()) == 0


def test_kl_is_zero_only_for_equal_answers() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = torch.randn(2, 8, 4, generator=generator)
    goal = torch.rand(8, 1, 2, 2, generator=generator)
    everyone = torch.ones(8, dtype=torch.bool)

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(
            matching_loss([goal], a, [goal], b, everyone, state_weight=1.0, logit_weight=1.0).logits
        )

    assert kl(theirs, theirs) == pytest.approx(0, abs=1e-7)
    p = theirs.softmax(1)
    expected = (p * (p.log() - ours.log_softmax(1))).sum(1).mean()
    assert kl(ours, theirs) == pytest.approx(float(expected), rel=1e-5)


def test_places_in_input_space() -> None:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(4))

    def placed(inputs: str, seed: int = 0) -> torch.Tensor:
        return place(images, inputs, 0.3, torch.Generator().manual_seed(seed))

    assert torch.equal(placed("clean"), images)
    noisy = placed("noise")
    assert all(not torch.equal(a, b) for a, b in zip(noisy, images, strict=True))
    mixed = placed("mix")
    assert torch.equal(mixed[::2], images[::2])
    assert not torch.equal(mixed[1::2], images[1::2])
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert torch.equal(noisy, placed("noise"))
    assert not torch.equal(noisy, placed("noise", 1))
