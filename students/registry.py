"""The names under which backbones are known, and what one is asked for.

A backbone is a module from normalised images to a list of feature maps, from the
image upwards, whose last one is pooled to a single pixel. Its stages may have names,
as `backbone.names`; without them they are `stage1`, `stage2`, ...
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from epdistill.errors import RecipeError
from epdistill.teachers.architecture import LayerSpec
from epdistill.teachers.baselines.resnet import LARGE_IMAGE
from epdistill.teachers.targets import Shape

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Request:
    """What a backbone is built for.

    Attributes:
        in_channels: Image channels.
        image_size: Side of the images, in pixels.
        width: Channels of the first stage, or None for the backbone's own default.
        shapes: (channels, height, width) of the teacher's states.
        layers: The teacher's layers where it is an EP-CNN, for backbones that mirror it.
        stages: Names of the stages that will be matched, or None for the backbone's choice.
    """

    in_channels: int
    image_size: int
    width: int | None
    shapes: tuple[Shape, ...]
    layers: tuple[LayerSpec, ...] | None = None
    stages: tuple[str, ...] | None = None

    @property
    def small(self) -> bool:
        """Whether the images are too small for a stem that shrinks them."""
        return self.image_size < LARGE_IMAGE


Builder = Callable[[Request], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Make a backbone available as `--student NAME`."""

    def add(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def registered() -> dict[str, Builder]:
    """The registered backbones by name."""
    return dict(_BUILDERS)


def hint(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` if one of the known names is near, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Stages(nn.Module):
    """Modules run one after the other, every output kept, the last one pooled too.

    Args:
        stem: Runs first; its output is not kept.
        stages: Each a stage.
    """

    def __init__(self, stem: nn.Module, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) to every stage's map and the pooled last one, (N, C', 1, 1)."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps.append(self.pool(x))
        return maps


def no_width(name: str, request: Request) -> None:
    """Refuse a width where the family has none.

    Raises:
        RecipeError: A width was asked for.
    """
    if request.width is not None:
        raise RecipeError(f"width {request.width} for {name}, which has none; leave --width away")
