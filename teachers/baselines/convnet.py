"""BP-CNN: the EP-CNN's convolutions as an ordinary network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from epdistill.teachers.architecture import LayerSpec
from epdistill.teachers.baselines.base import Baseline, ImageSpec


class ConvNet(Baseline):
    """Convolution without bias, BatchNorm, ReLU and pool per layer, then one linear layer.

    The published baseline of EP-CNNs, trained plainly or on adversarial images.

    Args:
        images: What it is built for.
        layers: The layers of an `Architecture`, as dictionaries.
    """

    def __init__(self, images: ImageSpec, layers: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(images, {"layers": list(layers)})
        self.layers = nn.ModuleList()
        below = images.in_channels
        for layer in (LayerSpec(**content) for content in layers):
            parts: list[nn.Module] = [
                nn.Conv2d(
                    below, layer.channels, layer.kernel, layer.stride, layer.padding, bias=False
                ),
                nn.BatchNorm2d(layer.channels),
                nn.ReLU(inplace=True),
            ]
            if layer.pool != "none":
                parts.append(nn.MaxPool2d(2) if layer.pool == "max" else nn.AvgPool2d(2))
            self.layers.append(nn.Sequential(*parts))
            below = layer.channels
        self.finish()

    def stages(self, x: Tensor) -> list[Tensor]:
        """Normalised images (N, C, H, W) -> every pooled layer, shaped like the EP-CNN's states."""
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states
