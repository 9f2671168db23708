"""Torchvision's networks as backbones, their stems adapted to small images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torchvision
from torch import nn
from torchvision.models import VisionTransformer

from epdistill.errors import RecipeError
from epdistill.students.registry import TORCHVISION, Request, hint, no_width, register
from epdistill.students.tapping import Tapped, tap

# Channels of the first stage of MobileNetV3-Small at width 1 (Howard et al. 2019).
MOBILENET_WIDTH = 16
# DeiT-Tiny (Touvron et al. 2021): 12 layers of 192, 3 heads, four times as wide inside.
VIT_WIDTH, VIT_LAYERS, VIT_HEADS, VIT_MLP = 192, 12, 3, 4
# Three stages end with these layers, the fourth with the last one and its norm.
VIT_TAPS = (2, 5, 8)
LARGEST_PATCH, FEWEST_TOKENS = 16, 4
# PyTorch's default weight of a new batch in BatchNorm's running statistics.
MOMENTUM = 0.1


def adapt_stem(net: nn.Module, request: Request) -> None:
    """Fit a network's first layers to the images, in place.

    For small images a first convolution that strides becomes a 3x3 one that does not, and
    the max-pool after it goes (the CIFAR stem of He et al. 2016). Other image channels
    than the network's make a new first convolution.
    """
    convolutions = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    name, first = convolutions[0]
    shrinks = request.small and first.stride != (1, 1)
    if not shrinks and first.in_channels == request.in_channels:
        return
    shape: dict[str, Any] = (
        {"kernel_size": 3, "padding": 1}
        if shrinks
        else {
            "kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding,
        }
    )  # fmt: skip
    bias = first.bias is not None
    net.set_submodule(name, nn.Conv2d(request.in_channels, first.out_channels, **shape, bias=bias))
    pool = next((n for n, m in net.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    if shrinks and pool is not None:
        net.set_submodule(pool, nn.Identity())


def quicken_statistics(net: nn.Module) -> None:
    """Let BatchNorm's running statistics follow within tens of steps, in place.

    Torchvision's mobile networks average them over hundreds, which suits ImageNet's many
    steps; a short training would end with those of its beginning.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
            module.momentum = max(module.momentum, MOMENTUM)


def patch_size(image_size: int) -> int:
    """The patch of `vit_tiny`: an eighth of the image, at most 16 pixels, a divisor of its side.

    4 pixels at 32 and 28; smaller images keep at least 4x4 patches.

    Raises:
        RecipeError: No patch of two pixels or more divides the image.
    """
    largest = min(LARGEST_PATCH, max(image_size // 7, 2))
    for patch in range(largest, 1, -1):
        if image_size % patch == 0 and image_size // patch >= FEWEST_TOKENS:
            return patch
    raise RecipeError(
        f"vit_tiny cannot cut {image_size}x{image_size} images into patches of 2 to {largest} "
        "pixels; expected a side that one of them divides: resize with --image-size"
    )


@register("mobilenet_v3_small")
def mobilenet_v3_small(request: Request) -> Tapped:
    """MobileNetV3-Small (Howard et al. 2019) of torchvision; `width` is 16 unless asked otherwise.

    For small images the stem does not stride: 32 pixels end as 2x2 maps.
    """
    factor = (request.width or MOBILENET_WIDTH) / MOBILENET_WIDTH
    net = torchvision.models.mobilenet_v3_small(width_mult=factor)
    adapt_stem(net, request)
    quicken_statistics(net)
    return tap(net, request)


@register("vit_tiny")
def vit_tiny(request: Request) -> Tapped:
    """ViT of DeiT-Tiny's size (Touvron et al. 2021), its patches as small as the images ask for.

    `width` is the tokens' length, 192 unless asked otherwise, a multiple of its 3 heads.
    The class token takes part, but the patches are what is pooled.

    Raises:
        RecipeError: No patch divides the image, or the heads do not divide the width.
    """
    width = request.width or VIT_WIDTH
    if width % VIT_HEADS:
        raise RecipeError(f"width {width} for vit_tiny; expected a multiple of {VIT_HEADS}")
    net = VisionTransformer(
        request.image_size, patch_size(request.image_size), VIT_LAYERS, VIT_HEADS, width,
        VIT_MLP * width,
    )  # fmt: skip
    if request.in_channels != net.conv_proj.in_channels:
        old = net.conv_proj
        net.conv_proj = nn.Conv2d(request.in_channels, width, old.kernel_size, old.stride)
    quarters = tuple(f"encoder.layers.encoder_layer_{n}" for n in VIT_TAPS)
    return tap(net, replace(request, stages=request.stages or (*quarters, "encoder.ln")))


def torchvision_net(name: str, request: Request) -> Tapped:
    """A classification network of torchvision by its name there, without its classifier.

    Raises:
        RecipeError: The name is unknown, a width was asked for, or the network cannot be
            built for this image size.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise RecipeError(
            f"unknown student {TORCHVISION}{name}{hint(name, known)}; expected a classification "
            "model of torchvision, as torchvision:resnet50"
        )
    no_width(f"{TORCHVISION}{name}", request)
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": request.image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (request.image_size, request.image_size)}
    elif name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    net = torchvision.models.get_model(name, weights=None, **options)
    if not name.startswith("vit_"):
        adapt_stem(net, request)
    elif request.in_channels != net.conv_proj.in_channels:
        old = net.conv_proj
        size = (old.out_channels, old.kernel_size, old.stride)
        net.conv_proj = nn.Conv2d(request.in_channels, *size)
    quicken_statistics(net)
    return tap(net, request)
