"""Starting from weights: whose they are, whether they fit, and what is said if not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from epdistill.data import DataSet
from epdistill.errors import RecipeError
from epdistill.recipes import Recipe
from epdistill.students.backbones import Request, build
from epdistill.students.distill import build_student
from epdistill.students.pretrained import read_weights, start_from
from epdistill.teachers.model import EPCNN

LARGE = Request(3, 64, None, ((4, 4, 4), (4, 1, 1)))


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_torchvision_weights_give_torchvision_features(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    path = tmp_path / "resnet18.pth"
    torch.save(net.state_dict(), path)
    backbone = build(name, LARGE).eval()
    left = start_from(backbone, path)
    assert left == ["fc.weight", "fc.bias"]
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.fc(backbone(images)[-1].flatten(1)), net(images))


def test_prefixes_and_wrappers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old, new = (build("cnn", Request(1, 8, 3, ((4, 4, 4), (4, 1, 1)))) for _ in range(2))
    student = {f"backbone.{name}": value for name, value in old.state_dict().items()}
    save_file({**student, "head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert start_from(new, tmp_path / "model.safetensors") == []
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value)
    wrapped = {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in old.state_dict().items()}}
    torch.save(wrapped, tmp_path / "checkpoint.pt")
    assert set(read_weights(tmp_path / "checkpoint.pt")) == set(old.state_dict())


def test_a_student_starts_from_the_file(
    teacher: EPCNN, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    first = build_student(recipe(), teacher)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second = build_student(recipe(pretrained=str(tmp_path / "model.safetensors")), teacher)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(second.backbone.state_dict()[name], value)
    assert not torch.equal(first.head.weight, second.head.weight)


def test_what_does_not_fit_is_named(tmp_path: Path, data: DataSet) -> None:
    small = build("resnet18", Request(1, 8, 4, ((4, 4, 4), (4, 1, 1))))
    path = tmp_path / "wide.safetensors"
    save_file(build("resnet18", Request(1, 8, 8, ((4, 4, 4), (4, 1, 1)))).state_dict(), path)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    shapes = r"stem\.0\.weight is \(8, 1, 3, 3\) in the file and \(4, 1, 3, 3\) in the student"
    with pytest.raises(RecipeError, match=f"does not fit the student: {shapes}.* more$"):
        start_from(small, path)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    save_file({"stem.0.weight": torch.zeros(4, 1, 3, 3)}, path)
    with pytest.raises(RecipeError, match=r"stem\.1\.weight is missing"):
        start_from(small, path)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(RecipeError, match="neither safetensors nor plain torch weights"):
            read_weights(tmp_path / name)
    torch.save(Path("code"), tmp_path / "object.pth")
    with pytest.raises(RecipeError, match="neither safetensors nor plain torch weights"):
        read_weights(tmp_path / "object.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(RecipeError, match="holds a Tensor; expected weights by name"):
        read_weights(tmp_path / "tensor.pth")
