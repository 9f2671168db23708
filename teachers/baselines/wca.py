"""WCA-Net: a network that answers at random, with noise aligned to its classifier.

Eustratiadis, Gouk, Li and Hospedales, "Weight-Covariance Alignment for Adversarially
Robust Neural Networks", ICML 2021 (anisotropic variant).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epdistill.teachers.baselines.base import Baseline, ImageSpec
from epdistill.teachers.baselines.resnet import resnet_stages


class WcaNet(Baseline):
    """ResNet-18 -> h = ReLU(linear) of `features` units -> W (h + z) + b, z ~ N(0, L L^T).

    A fresh z is drawn for every image and forward pass, in training and in evaluation, from
    torch's global generator of the model's device. The head is linear, so the logits of
    `targets`, without noise, are the expectation of those of `forward`. The stages are the
    four of the ResNet, and h.

    Args:
        images: What it is built for.
        width: Channels of the ResNet's first stage; 64 in the paper.
        features: Length of h; in the paper 32 for 10 classes and 256 for 100.
    """

    stochastic = True

    def __init__(self, images: ImageSpec, width: int, features: int) -> None:
        super().__init__(images, {"width": width, "features": features})
        self.stem, stages = resnet_stages(images.in_channels, images.image_size, width)
        self.blocks = nn.ModuleList(stages)
        self.squeeze = nn.Linear(8 * width, features)
        # Only the lower triangle is ever read: it stays the Cholesky factor of a covariance.
        self.factor = nn.Parameter(torch.rand(features, features).tril())
        self.finish()

    def stages(self, x: Tensor) -> list[Tensor]:
        """Normalised images (N, C, H, W) -> the ResNet's stages, and h as (N, features, 1, 1)."""
        x = self.stem(x)
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        features = F.relu(self.squeeze(x.mean((2, 3))))
        return [*states, features[:, :, None, None]]

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes), with fresh noise."""
        features = self.stages(self.normalise(images))[-1].flatten(1)
        if self.stochastic:
            features = features + torch.randn_like(features) @ self.factor.tril().T
        logits: Tensor = self.head(features)
        return logits

    def without_noise(self) -> WcaNet:
        """A view of this model (same parameters) that answers with the expected logits."""
        view = copy.copy(self)
        view.stochastic = False
        return view

    def alignment(self) -> Tensor:
        """sum_c w_c^T Sigma w_c, the variance of all logits together; a scalar."""
        return (self.head.weight @ self.factor.tril()).square().sum()
