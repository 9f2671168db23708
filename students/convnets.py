"""Backbones of our own: the teacher's mirror image and the ResNets."""

from __future__ import annotations

from torch import nn

from epdistill.students.registry import Request, Stages, register
from epdistill.teachers.baselines.resnet import resnet_stages


def _conv_bn_relu(
    below: int, above: int, kernel: int, stride: int, padding: int
) -> list[nn.Module]:
    return [
        nn.Conv2d(below, above, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(above),
        nn.ReLU(inplace=True),
    ]


class ResNet(Stages):
    """Stages of torchvision's BasicBlocks, each but the first halving the resolution."""

    def rename(self, key: str) -> str:
        """The name that a weight of torchvision's ResNet has here."""
        first, _, rest = key.partition(".")
        if first in ("conv1", "bn1"):
            return f"stem.{0 if first == 'conv1' else 1}.{rest}"
        if first.startswith("layer"):
            return f"stages.{int(first.removeprefix('layer')) - 1}.{rest}"
        return key


def _resnet(request: Request, depths: tuple[int, ...]) -> nn.Module:
    width = request.width or 64
    return ResNet(*resnet_stages(request.in_channels, request.image_size, width, depths))


@register("resnet18")
def resnet18(request: Request) -> nn.Module:
    """ResNet-18 of torchvision's BasicBlocks (He et al. 2016), with the 3x3 stem for small images.

    For 32 pixels the stages end at width x 32 x 32, 2 width x 16 x 16,
    4 width x 8 x 8 and 8 width x 4 x 4; `width` is 64 unless asked otherwise.
    """
    return _resnet(request, (2, 2, 2, 2))


@register("resnet34")
def resnet34(request: Request) -> nn.Module:
    """ResNet-34 (He et al. 2016): as `resnet18`, with 3, 4, 6 and 3 blocks in the stages."""
    return _resnet(request, (3, 4, 6, 3))


@register("cnn")
def cnn(request: Request) -> nn.Module:
    """One convolution stage per teacher layer.

    With an EP-CNN's kernels, strides and pools; for another teacher, 3x3 convolutions
    and max-pools that give its states' sizes. Without `width`, a stage has the channels
    of its teacher layer.
    """
    factor = 1.0 if request.width is None else request.width / request.shapes[0][0]
    stages: list[nn.Module] = []
    below, size = request.in_channels, request.image_size
    for index, (channels, height, _) in enumerate(request.shapes):
        above = max(1, round(channels * factor))
        if request.layers is not None:
            layer = request.layers[index]
            parts = _conv_bn_relu(below, above, layer.kernel, layer.stride, layer.padding)
            if layer.pool != "none":
                parts.append(nn.MaxPool2d(2) if layer.pool == "max" else nn.AvgPool2d(2))
        else:
            parts = _conv_bn_relu(below, above, 3, 1, 1)
            # A size that does not divide is left a little larger: matching shrinks it.
            if size // height > 1:
                parts.append(nn.MaxPool2d(size // height))
                size //= size // height
        stages.append(nn.Sequential(*parts))
        below = above
    return Stages(nn.Identity(), stages)
