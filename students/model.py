"""A student: a feedforward backbone whose stages land on the teacher's fixed points."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epdistill.errors import RunError
from epdistill.students.backbones import Request, build
from epdistill.teachers.architecture import Architecture

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class StudentSpec:
    """Everything that fixes a student's shape.

    Attributes:
        name: The backbone.
        width: Channels of its first stage, or None for its default.
        teacher: The architecture of the teacher it is matched to.
    """

    name: str
    width: int | None
    teacher: Architecture

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
        return {"name": self.name, "width": self.width, "teacher": self.teacher.to_dict()}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> StudentSpec:
        """Read what `to_dict` wrote."""
        teacher = Architecture.from_dict(content["teacher"])
        return StudentSpec(content["name"], content["width"], teacher)


def pair_stages(stages: Sequence[Shape], targets: Sequence[Shape]) -> list[int]:
    """Which stage is matched to which teacher layer.

    The last stage (pooled) goes to the last layer. Each other layer takes the
    deepest stage that is at least as wide as it, so that a map is only ever
    shrunk to fit, and failing that the deepest of all.

    Args:
        stages: (channels, height, width) of the student's maps, the pooled one last.
        targets: (channels, height, width) of the teacher's states.

    Returns:
        One index into `stages` per target.
    """
    chosen = []
    for _, height, _ in targets[:-1]:
        wide = [i for i, stage in enumerate(stages[:-1]) if stage[1] >= height]
        chosen.append(wide[-1] if wide else len(stages) - 2)
    return [*chosen, len(stages) - 1]


class Student(nn.Module):
    """Images in [0,1] to logits in one pass, matched to a teacher's fixed points.

    The answer is V (A z + b) + c: z is the backbone's last feature, A z + b the
    linear adaptor that lands on s_L, and V, c the teacher's readout, copied and
    frozen. No clamp stands in this path. The other adaptors serve the matching
    only and are dropped by `folded`.

    Args:
        spec: Backbone and teacher.
    """

    mean: Tensor
    std: Tensor
    readout_weight: Tensor
    readout_bias: Tensor

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        teacher = spec.teacher
        self.spec = spec
        self.backbone = build(
            spec.name, Request(teacher.in_channels, teacher.image_size, spec.width, teacher)
        )
        self.targets = teacher.shapes
        stages = self._stage_shapes()
        self.pairs = pair_stages(stages, self.targets)
        self.adaptors = nn.ModuleList()
        for index, target in zip(self.pairs[:-1], self.targets[:-1], strict=True):
            same = stages[index] == target
            self.adaptors.append(
                nn.Identity() if same else nn.Conv2d(stages[index][0], target[0], 1)
            )
        channels, height, width = self.targets[-1]
        size = channels * height * width
        self.head = nn.Linear(stages[-1][0], size)
        shape = (1, teacher.in_channels, 1, 1)
        self.register_buffer("mean", torch.tensor(teacher.mean).view(shape))
        self.register_buffer("std", torch.tensor(teacher.std).view(shape))
        self.register_buffer("readout_weight", torch.zeros(teacher.classes, size))
        self.register_buffer("readout_bias", torch.zeros(teacher.classes))

    def _stage_shapes(self) -> list[Shape]:
        teacher = self.spec.teacher
        image = torch.zeros(1, teacher.in_channels, teacher.image_size, teacher.image_size)
        training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            maps = self.backbone(image)
        self.backbone.train(training)
        return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]

    def take_readout(self, weight: Tensor, bias: Tensor) -> None:
        """Copy the teacher's readout V (classes, d) and c (classes,); it stays frozen."""
        self.readout_weight.copy_(weight)
        self.readout_bias.copy_(bias)

    def match(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is compared with the teacher.

        Args:
            images: (N, C, H, W), float in [0,1].

        Returns:
            One map per teacher layer, shaped like its state, and the logits (N, classes).
        """
        maps = self.backbone((images - self.mean) / self.std)
        landed = []
        for index, adaptor, target in zip(
            self.pairs[:-1], self.adaptors, self.targets[:-1], strict=True
        ):
            feature = adaptor(maps[index])
            _, height, width = target
            if feature.shape[2:] != (height, width):
                feature = F.adaptive_avg_pool2d(feature, (height, width))
            landed.append(feature)
        top = self.head(maps[-1].flatten(1))
        landed.append(top.view(-1, *self.targets[-1]))
        return landed, F.linear(top, self.readout_weight, self.readout_bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes)."""
        maps = self.backbone((images - self.mean) / self.std)
        top = self.head(maps[-1].flatten(1))
        return F.linear(top, self.readout_weight, self.readout_bias)

    def folded(self) -> nn.Module:
        """The deployable network: adaptors dropped, V (A z + b) + c folded into one layer.

        The product is formed in float64, so that folding costs one rounding only.
        """
        head = nn.Linear(self.head.in_features, self.readout_weight.shape[0])
        v = self.readout_weight.double()
        with torch.no_grad():
            head.weight.copy_(v @ self.head.weight.double())
            head.bias.copy_(v @ self.head.bias.double() + self.readout_bias.double())
        return Deployed(copy.deepcopy(self.backbone), head, self.mean, self.std).train(
            self.training
        )


class Deployed(nn.Module):
    """Normalisation, backbone and one linear layer: what is exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Linear, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes)."""
        logits: Tensor = self.head(self.backbone((images - self.mean) / self.std)[-1].flatten(1))
        return logits


def student_from(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Student:
    """Rebuild a student from its run's configuration and weights.

    Raises:
        RunError: The weights do not fit the configuration.
    """
    student = Student(StudentSpec.from_dict(config["model"]))
    try:
        student.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise RunError(
            f"the weights do not fit config.json: {str(error).splitlines()[0]}"
        ) from error
    return student.eval()
