"""Fidelity figures against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from epdistill.data import DataSet, Split
from epdistill.recipes import Recipe
from epdistill.robustness.paper import TABLE_L2
from epdistill.students.distill import build_student
from epdistill.students.fidelity import calibration_error, fidelities, measure, with_attack
from epdistill.teachers.model import EPCNN
from epdistill.teachers.targets import Targets


def test_calibration_by_hand() -> None:
    # Bins of .2: confidences .9, .9 (one right), .7 (right), .6 on the border of the lower bin.
    rows = [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]
    chances = torch.tensor(rows, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1])
    # |1/2 - .9| 2/4 + |1 - .7| 1/4 + |0 - .6| 1/4
    assert calibration_error(chances, labels, bins=5) == pytest.approx(0.2 + 0.075 + 0.15)
    certain = torch.eye(3)
    assert calibration_error(certain, torch.arange(3)) == 0
    assert calibration_error(certain, torch.tensor([1, 2, 0])) == 1


class Fixed(nn.Module):
    """A student whose answers are written down."""

    def __init__(self, landed: list[Tensor], logits: Tensor, matched: int) -> None:
        super().__init__()
        self.landed, self.logits = landed, logits
        self.spec = type("Spec", (), {"matched": matched})()
        self.at = 0

    def match(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        part = slice(self.at, self.at + len(images))
        self.at += len(images)
        return [one[part] for one in self.landed], self.logits[part]

    def states(self, landed: list[Tensor]) -> list[Tensor]:
        return landed


class Said(nn.Module):
    """A teacher whose answers are written down; the last image never settles."""

    shapes = ((1, 1, 2), (1, 1, 1))
    mean = torch.zeros(1, 1, 1, 1)

    def __init__(self, states: list[Tensor], logits: Tensor) -> None:
        super().__init__()
        self.written, self.logits, self.at = states, logits, 0

    def targets(self, images: Tensor) -> Targets:
        part = slice(self.at, self.at + len(images))
        self.at += len(images)
        settled = torch.tensor([True, True, True, False])[part]
        return Targets([s[part] for s in self.written], self.logits[part], settled)


def four(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(4, 1, 1, -1)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("matched", [1, 2])
def test_fidelity_by_hand(batch_size: int, matched: int) -> None:
    below = four([1, 0], [0, 1], [1, 1], [9, 9])
    top = four([0.0], [1.0], [2.0], [-50.0])
    ours = [four([1, 0], [1, 0], [1, 1], [0, 0]), four([0.0], [1.0], [1.0], [7.0])]
    # Answers: teacher 0 0 1 1, student 0 1 1 1, truth 0 1 1 0.
    hot = torch.eye(2) * 50
    student = Fixed(ours[2 - matched :], hot[[0, 1, 1, 1]], matched)
    teacher = Said([below, top], hot[[0, 0, 1, 1]])
    split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0]))
    found = measure(student, teacher, split, batch_size=batch_size)  # type: ignore[arg-type]
    assert (found.images, found.accuracy, found.teacher_accuracy) == (4, 0.75, 0.5)
    assert (found.agreement, found.settled) == (0.75, 0.75)
    assert found.ece == pytest.approx(0.25)
    # Top: errors 0 0 1 over squares about the mean 1 0 1.
    assert found.r2[1] == pytest.approx(1 - 1 / 2)
    assert found.cosine[1] == pytest.approx((0 + 1 + 1) / 3)
    if matched == 1:
        assert found.r2[0] is None
        assert found.cosine[0] is None
        assert found.mean_r2 == found.r2[1]
    else:
        # Below: squared errors 0 2 0; four ones of six, squares about the mean 4 - 16/6.
        assert found.r2[0] == pytest.approx(1 - 2 / (4 - 16 / 6))
        assert found.cosine[0] == pytest.approx(2 / 3)


def test_a_student_that_says_what_the_teacher_says(data: DataSet, teacher: EPCNN) -> None:
    class Mirror(nn.Module):
        spec = type("Spec", (), {"matched": 2})()

        def match(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
            said = teacher.targets(images)
            return said.states, said.logits

        def states(self, landed: list[Tensor]) -> list[Tensor]:
            return landed

    found = measure(Mirror(), teacher, data.validation)  # type: ignore[arg-type]
    assert found.agreement == 1
    assert found.r2 == (1.0, 1.0)
    assert found.cosine == pytest.approx((1.0, 1.0))


def test_all_three_inputs(data: DataSet, teacher: EPCNN, recipe: Callable[..., Recipe]) -> None:
    own = recipe(fidelity_noise=0.3, fidelity_eps=0.2)
    student = build_student(own, teacher).train()
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    before = torch.get_rng_state()
    found = fidelities(student, teacher, data.test, own.student, 5)
    assert torch.equal(before, torch.get_rng_state())
    assert student.training
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert list(found) == ["clean", "noise", "adversarial", "l2"]
    # The farther the attack goes, the fewer answers of the student are left.
    assert [one["eps"] for one in found["l2"]] == list(TABLE_L2)
    left = [one["accuracy"] for one in found["l2"]]
    assert left == sorted(left, reverse=True) and left[-1] < found["clean"]["accuracy"]
    assert {one["images"] for one in found["l2"]} == {200}
    assert (found["noise"]["std"], found["adversarial"]["eps"]) == (0.3, 0.2)
    assert found["clean"]["images"] == found["noise"]["images"] == len(data.test)
    assert found["adversarial"]["images"] == 200
    assert found == fidelities(student, teacher, data.test, own.student, 5)
    assert found["noise"] != fidelities(student, teacher, data.test, own.student, 6)["noise"]
    assert found["clean"] == {**vars(measure(student, teacher, data.test))}


def test_the_attack_stays_inside_and_hurts(
    data: DataSet, teacher: EPCNN, recipe: Callable[..., Recipe]
) -> None:
    student = build_student(recipe(), teacher).eval()
    images = data.test.images[:32].float() / 255
    labels = student(images).argmax(1)
    worse = with_attack(student, 0.3, 0)(images, labels, 0)
    assert (worse - images).abs().max() <= 0.3 + 1e-6
    loss = nn.functional.cross_entropy
    assert loss(student(worse), labels) > loss(student(images), labels)
