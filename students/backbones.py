"""Feedforward backbones that give their stages: images in, feature maps out.

A backbone returns a list of feature maps from the image upwards; the last one
is pooled to a single pixel. Which stage is matched to which teacher layer is
decided in `epdistill.students.model` from the shapes alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from epdistill.errors import RecipeError
from epdistill.teachers.architecture import Architecture


@dataclass(frozen=True)
class Request:
    """What a backbone is built for.

    Attributes:
        in_channels: Image channels.
        image_size: Side of the images, in pixels.
        width: Channels of the first stage, or None for the backbone's own default.
        teacher: The teacher's architecture, for backbones that mirror it.
    """

    in_channels: int
    image_size: int
    width: int | None
    teacher: Architecture


Builder = Callable[[Request], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Make a backbone available as `--student NAME`."""

    def add(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def names() -> list[str]:
    """The registered backbones."""
    return sorted(_BUILDERS)


def build(name: str, request: Request) -> nn.Module:
    """Build a backbone by name.

    Raises:
        RecipeError: The name is unknown.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(f"unknown student {name!r}{hint}; expected {' or '.join(names())}")
    return _BUILDERS[name](request)


class _Stages(nn.Module):
    """Modules run one after the other, every output kept, the last one pooled too."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps.append(self.pool(x))
        return maps


def _conv_bn_relu(below: int, above: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(below, above, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(above),
        nn.ReLU(inplace=True),
    )


def _resnet(request: Request, depths: tuple[int, ...]) -> nn.Module:
    width = request.width or 64
    if request.image_size >= 64:
        # The ImageNet stem: large images would otherwise cost 16 times as much.
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        stem = nn.Sequential(*_conv_bn_relu(request.in_channels, width, 7, 2), pool)
    else:
        stem = _conv_bn_relu(request.in_channels, width, 3, 1)
    stages: list[nn.Module] = []
    below = width
    for index, depth in enumerate(depths):
        above, stride = width * 2**index, 1 if index == 0 else 2
        blocks: list[nn.Module] = []
        for block in range(depth):
            step = stride if block == 0 else 1
            shortcut = None
            if step != 1 or below != above:
                shortcut = nn.Sequential(
                    nn.Conv2d(below, above, 1, step, bias=False), nn.BatchNorm2d(above)
                )
            blocks.append(BasicBlock(below, above, step, shortcut))
            below = above
        stages.append(nn.Sequential(*blocks))
    backbone = _Stages(stem, stages)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


@register("resnet18")
def resnet18(request: Request) -> nn.Module:
    """ResNet-18 of torchvision's BasicBlocks (He et al. 2016), with the 3x3 stem for small images.

    For 32 pixels the stages end at width x 32 x 32, 2 width x 16 x 16,
    4 width x 8 x 8 and 8 width x 4 x 4; `width` is 64 unless asked otherwise.
    """
    return _resnet(request, (2, 2, 2, 2))


@register("cnn")
def cnn(request: Request) -> nn.Module:
    """One convolution stage per teacher layer, with the teacher's strides and pools.

    Without `width`, a stage has the channels of its teacher layer.
    """
    teacher = request.teacher
    factor = 1.0 if request.width is None else request.width / teacher.layers[0].channels
    stages: list[nn.Module] = []
    below = request.in_channels
    for layer in teacher.layers:
        above = max(1, round(layer.channels * factor))
        parts: list[nn.Module] = [
            nn.Conv2d(below, above, layer.kernel, layer.stride, layer.padding, bias=False),
            nn.BatchNorm2d(above),
            nn.ReLU(inplace=True),
        ]
        if layer.pool != "none":
            parts.append(nn.MaxPool2d(2) if layer.pool == "max" else nn.AvgPool2d(2))
        stages.append(nn.Sequential(*parts))
        below = above
    return _Stages(nn.Identity(), stages)
