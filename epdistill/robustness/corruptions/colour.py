"""Brightness, contrast and saturation; and how a grey image stands in for a colour one."""

from __future__ import annotations

import torch
from torch import Tensor

from epdistill.robustness.corruptions.registry import corruption

# ITU-R BT.601, as in OpenCV's and Pillow's conversion to grey.
LUMA = (0.299, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """The grey image of (N,C,H,W) images, (N,1,H,W); a grey image is its own."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(LUMA, dtype=images.dtype)[:, None, None]
    return (images * weights).sum(dim=1, keepdim=True)


def like(images: Tensor, coloured: Tensor) -> Tensor:
    """(N,3,H,W) `coloured` with as many channels as `images`: itself, or its luma."""
    return coloured if images.shape[1] == 3 else luma(coloured)


@corruption("brightness", (0.05, 0.10, 0.15, 0.20, 0.30))
def brightness(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """HSV's V raised by `amount` with hue and saturation held; for grey, plain addition.

    With H and S fixed the three channels are proportional to V = max(R, G, B), so
    no detour through HSV is needed; black has no hue and becomes grey.
    """
    value = images.amax(dim=1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


@corruption("contrast", (0.75, 0.50, 0.40, 0.30, 0.15))
def contrast(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Distances from each channel's mean over the image, shrunk by `factor`."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + factor * (images - mean)


@corruption("saturate", ((0.3, 0), (0.1, 0), (1.5, 0), (2.0, 0.1), (2.5, 0.2)))
def saturate(images: Tensor, line: tuple[float, float], generator: torch.Generator) -> Tensor:
    """HSV's S becomes clip(factor S + offset, 0, 1), with hue and V held.

    With H and V fixed the distances of the channels from V are proportional to S. A
    grey pixel has no hue; HSV's convention is 0, red, so an offset tints it red. A grey
    image has S = 0 everywhere: severities 1 to 3 leave it as it is, and 4 and 5 darken
    it, being the luma of the tinted image.
    """
    factor, offset = line
    colours = images.expand(-1, 3, -1, -1)
    value = colours.amax(dim=1, keepdim=True)
    lack = value - colours  # V S k with k in [0,1], and 1 for the smallest channel
    spread = lack.amax(dim=1, keepdim=True)
    saturation = spread / value.clamp_min(1e-12)
    changed = (factor * saturation + offset).clamp(0, 1)
    # Without a hue: red at V, the other two lowered alike.
    red = value * torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    direction = torch.where(spread > 0, lack / spread.clamp_min(1e-12) * value, red)
    return like(images, value - changed * direction)
