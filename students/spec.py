"""What fixes a student's shape, and how it is written into a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from epdistill.teachers.architecture import Architecture, LayerSpec
from epdistill.teachers.model import EPCNN
from epdistill.teachers.targets import Shape, Teacher


@dataclass(frozen=True)
class Goal:
    """What a student is matched to: the outward shape of its teacher.

    Attributes:
        in_channels: Image channels.
        image_size: Side of the square images, in pixels.
        classes: Number of classes.
        mean: Per-channel mean of the images in [0,1], subtracted inside the model.
        std: Per-channel divisor of the images, applied inside the model.
        shapes: (channels, height, width) of the teacher's states.
        layers: The teacher's layers where it is an EP-CNN, for the backbone that mirrors it.
    """

    in_channels: int
    image_size: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shapes: tuple[Shape, ...]
    layers: tuple[LayerSpec, ...] | None = None

    @staticmethod
    def of(teacher: Teacher) -> Goal:
        """What a student of this teacher is matched to."""
        layers = teacher.architecture.layers if isinstance(teacher, EPCNN) else None
        return Goal(
            teacher.in_channels,
            teacher.image_size,
            teacher.classes,
            tuple(teacher.mean.flatten().tolist()),
            tuple(teacher.std.flatten().tolist()),
            tuple(teacher.shapes),
            layers,
        )

    @staticmethod
    def of_architecture(architecture: Architecture) -> Goal:
        """What a student of an EP-CNN of this architecture is matched to."""
        return Goal(
            architecture.in_channels,
            architecture.image_size,
            architecture.classes,
            architecture.mean,
            architecture.std,
            tuple(architecture.shapes),
            architecture.layers,
        )

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Goal:
        """Read a dataclass that went through JSON."""
        layers = content["layers"]
        return Goal(
            content["in_channels"],
            content["image_size"],
            content["classes"],
            tuple(content["mean"]),
            tuple(content["std"]),
            tuple((c, h, w) for c, h, w in content["shapes"]),
            None if layers is None else tuple(LayerSpec(**layer) for layer in layers),
        )


@dataclass(frozen=True)
class StudentSpec:
    """Everything that fixes a student's shape.

    Attributes:
        name: The backbone.
        width: Channels of its first stage, or None for its default.
        goal: What it is matched to.
        stages: The stages matched to the teacher's layers below the last, or None for the
            choice by size.
        match: The teacher's layers that are matched: all `states`, the `last`, or, for
            `logits`, none.
        bounded: Whether the layers below the last are matched through a sigmoid.
        readout: `frozen`: the teacher's; `learned`: the student's own.
    """

    name: str
    width: int | None
    goal: Goal
    stages: tuple[str, ...] | None = None
    match: Literal["states", "last", "logits"] = "states"
    bounded: bool = False
    readout: Literal["frozen", "learned"] = "frozen"

    @property
    def matched(self) -> int:
        """How many of the teacher's layers are matched, counted from its last."""
        return {"states": len(self.goal.shapes), "last": 1, "logits": 0}[self.match]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> StudentSpec:
        """Read what `to_dict` wrote, now or when only EP-CNNs were teachers."""
        content = dict(content)
        if "teacher" in content:
            architecture = Architecture.from_dict(content.pop("teacher"))
            return StudentSpec(goal=Goal.of_architecture(architecture), **content)
        content["goal"] = Goal.from_dict(content["goal"])
        if content["stages"] is not None:
            content["stages"] = tuple(content["stages"])
        return StudentSpec(**content)
