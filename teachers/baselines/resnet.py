"""The stages of a residual network for small and large images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

# Smaller images keep their resolution in the stem.
LARGE_IMAGE = 64
# The most that a block of oneDNN's kernels holds.
BLOCK = 16


class Shortcut(nn.Conv2d):
    """A strided 1x1 convolution without bias, whose few channels are picked before it.

    With fewer input channels than a block of its kernels (8 with AVX2, 16 with AVX-512), in
    channels-last order, oneDNN's backward pass of such a convolution writes past its memory
    (https://github.com/uxlfoundation/oneDNN/issues/6035): crashes, hangs or wrong gradients,
    torch 2.14 included. Without a stride it does not, and the answer is the same.
    """

    def __init__(self, below: int, above: int, stride: int) -> None:
        super().__init__(below, above, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (N,C,H,W) to (N,C',H',W')."""
        if self.in_channels >= BLOCK:
            return super().forward(images)
        rows, columns = self.stride
        return F.conv2d(images[:, :, ::rows, ::columns], self.weight)


def conv_bn_relu(below: int, above: int, kernel: int, stride: int) -> nn.Sequential:
    """A convolution that keeps the size (or divides it by `stride`), BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(below, above, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(above),
        nn.ReLU(inplace=True),
    )


def resnet_stages(
    in_channels: int, image_size: int, width: int, depths: Sequence[int] = (2, 2, 2, 2)
) -> tuple[nn.Module, list[nn.Module]]:
    """Stem and stages of a ResNet of basic blocks (He et al. 2016); the default is ResNet-18.

    For 32 pixels the stages end at width x 32 x 32, 2 width x 16 x 16, 4 width x 8 x 8 and
    8 width x 4 x 4. Images of 64 pixels and more get the ImageNet stem: they would cost 16
    times as much otherwise.

    Args:
        in_channels: Image channels.
        image_size: Side of the images, in pixels.
        width: Channels of the first stage; doubled by every further one.
        depths: Blocks per stage.
    """
    if image_size < LARGE_IMAGE:
        stem = conv_bn_relu(in_channels, width, 3, 1)
    else:
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        stem = nn.Sequential(*conv_bn_relu(in_channels, width, 7, 2), pool)
    stages: list[nn.Module] = []
    below = width
    for index, depth in enumerate(depths):
        above = width * 2**index
        blocks: list[nn.Module] = []
        for block in range(depth):
            stride = 2 if index and not block else 1
            shortcut = None
            if stride != 1 or below != above:
                shortcut = nn.Sequential(Shortcut(below, above, stride), nn.BatchNorm2d(above))
            blocks.append(BasicBlock(below, above, stride, shortcut))
            below = above
        stages.append(nn.Sequential(*blocks))
    for part in (stem, *stages):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stem, stages
