"""Students: stages find their layers, folding is exact, a run's configuration rebuilds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from epdistill.errors import RecipeError, RunError
from epdistill.students.model import Student, pair_stages, student_from
from epdistill.students.spec import Goal, StudentSpec
from epdistill.teachers.architecture import Architecture, layers_for

GoalOf = Callable[..., Goal]


def test_cifar_resnet_stages_are_the_fixed_points(goal: GoalOf) -> None:
    student = Student(StudentSpec("resnet18", 16, goal(32, 3, 32)))
    assert student.pairs == [1, 2, 3, 4]
    assert all(isinstance(adaptor, torch.nn.Identity) for adaptor in student.adaptors)


def test_pairing_shrinks_where_it_can() -> None:
    stages = [(8, 32, 32), (16, 16, 16), (32, 8, 8), (32, 1, 1)]
    assert pair_stages(stages, [(4, 16, 16), (4, 9, 9), (4, 1, 1)]) == [1, 1, 3]
    # Nothing is wide enough: the widest has most to give.
    assert pair_stages(stages, [(4, 64, 64), (4, 1, 1)]) == [0, 3]


def test_equally_wide_stages_are_spread_by_depth() -> None:
    stages = [(8, 8, 8)] * 4 + [(8, 1, 1)]
    assert pair_stages(stages, [(4, 16, 16), (4, 8, 8), (4, 4, 4), (4, 1, 1)]) == [0, 1, 2, 4]
    assert pair_stages(stages, [(4, 4, 4), (4, 1, 1)]) == [1, 4]


@pytest.mark.parametrize("match", ["states", "last", "logits"])
def test_only_what_is_matched_lands(match: str, goal: GoalOf) -> None:
    spec = StudentSpec("cnn", None, goal(16), match=match, readout="learned")  # type: ignore[arg-type]
    student = Student(spec)
    landed, logits = student.match(torch.rand(2, 1, 16, 16))
    shapes = goal(16).shapes
    expected = {"states": shapes, "last": shapes[-1:], "logits": ()}[match]
    assert tuple(tuple(m.shape[1:]) for m in landed) == expected
    assert logits.shape == (2, 5)


def test_stages_by_name(goal: GoalOf) -> None:
    student = Student(StudentSpec("resnet18", 4, goal(16), ("stage1", "stage3")))
    assert student.pairs == [0, 2, 4]
    with pytest.raises(RecipeError, match=r"unknown stage 'stage9'.*did you mean stage"):
        Student(StudentSpec("resnet18", 4, goal(16), ("stage1", "stage9")))
    with pytest.raises(RecipeError, match="1 stages stage1; expected 2"):
        Student(StudentSpec("resnet18", 4, goal(16), ("stage1",)))


@pytest.mark.parametrize("readout", ["frozen", "learned"])
def test_folding_gives_the_same_answers(readout: str, goal: GoalOf) -> None:
    generator = torch.Generator().manual_seed(0)
    student = Student(StudentSpec("cnn", None, goal(16), readout=readout)).double()  # type: ignore[arg-type]
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
    frozen = not any(p is student.readout_weight for p in student.parameters())
    assert frozen == (readout == "frozen")


def test_unknown_student(goal: GoalOf) -> None:
    with pytest.raises(RecipeError, match="did you mean resnet18"):
        Student(StudentSpec("resnet81", None, goal(8)))


def test_weights_that_do_not_fit(goal: GoalOf) -> None:
    student = Student(StudentSpec("cnn", None, goal(8)))
    other = Student(StudentSpec("cnn", 9, goal(8)))
    with pytest.raises(RunError, match="do not fit"):
        student_from({"model": student.spec.to_dict()}, other.state_dict())


def test_a_configuration_rebuilds_the_student(goal: GoalOf) -> None:
    import json

    spec = StudentSpec(
        "resnet18", 4, goal(16), ("stage1", "stage3"), bounded=True, readout="learned"
    )
    assert StudentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    without = StudentSpec("resnet18", 4, Goal(**{**vars(goal(16)), "layers": None}))
    assert StudentSpec.from_dict(json.loads(json.dumps(without.to_dict()))) == without
    student = Student(spec).eval()
    again = student_from({"model": spec.to_dict()}, student.state_dict())
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(student(images), again(images))


def test_a_configuration_of_before_other_teachers_is_read() -> None:
    architecture = Architecture(1, 8, layers_for(8, width=4), 5, (0.5,), (0.25,))
    old = {"name": "resnet18", "width": 4, "teacher": asdict(architecture)}
    spec = StudentSpec.from_dict(old)
    assert spec.goal == Goal.of_architecture(architecture)
    assert (spec.match, spec.readout, spec.bounded) == ("states", "frozen", False)
    names = set(Student(spec).state_dict())
    assert {"backbone.stem.0.weight", "backbone.stages.3.1.conv2.weight", "head.weight"} <= names
    assert {"readout_weight", "readout_bias", "adaptors.0.weight", "mean", "std"} <= names
