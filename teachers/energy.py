"""The scalar functions of an EP-CNN and their exact derivatives.

Notation, as everywhere in this room: s_0 = x is the normalised image, s_1..s_L
are the layers' states in [0,1], P is the pool, u_n = W_n * s_{n-1} + b_n, and

    Phi(x, s) = sum_n <s_n, P(u_n)>                       (primitive function)
    E(x, s)   = a/2 sum_n ||s_n||^2 - Phi(x, s)           (energy)
    sigma(h)  = clip(h/a, 0, 1)                           (exact minimiser per unit)

with a = 2 (the published clip(h/2, 0, 1)) or a = 1. Source: Laborieux et al.,
"Scaling Equilibrium Propagation to Deep ConvNets" (2021), eq. 8-11; the energy
is the one whose exact coordinate minimiser is the published update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.teachers.architecture import Architecture

States = list[Tensor]


@dataclass(frozen=True)
class Pooled:
    """P(u_n) and what is needed to send values back through the pool.

    Attributes:
        value: (N, C, h, w), the pooled map.
        index: (N, C, h, w) int64 positions of the maxima in the flattened map; None
            unless the pool is a max-pool.
        size: (H, W) of the map before the pool.
    """

    value: Tensor
    index: Tensor | None
    size: tuple[int, int]

    def map(self, change: Callable[[Tensor], Tensor]) -> Pooled:
        """The same pool with both tensors changed alike."""
        index = None if self.index is None else change(self.index)
        return Pooled(change(self.value), index, self.size)


@dataclass(frozen=True)
class Network:
    """The tensors of an EP-CNN that its dynamics read, in one dtype on one device.

    Attributes:
        architecture: The shapes.
        weights: W_1..W_L, each (C_n, C_{n-1}, k, k).
        biases: b_1..b_L, each (C_n,).
        readout_weight: V, (classes, d), or None for the mse readout.
        readout_bias: c, (classes,), or None for the mse readout.
    """

    architecture: Architecture
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    readout_weight: Tensor | None = None
    readout_bias: Tensor | None = None

    @property
    def depth(self) -> int:
        """The number L of layers."""
        return len(self.weights)

    def drive(self, n: int, below: Tensor) -> Tensor:
        """u_n = W_n * s_{n-1} + b_n, before the pool; `below` is s_{n-1} (N, C, H, W)."""
        layer = self.architecture.layers[n - 1]
        return F.conv2d(below, self.weights[n - 1], self.biases[n - 1], layer.stride, layer.padding)

    def pool(self, n: int, u: Tensor) -> Pooled:
        """P(u_n) with its argmax."""
        kind = self.architecture.layers[n - 1].pool
        size = (u.shape[2], u.shape[3])
        if kind == "max":
            value, index = F.max_pool2d(u, 2, return_indices=True)
            return Pooled(value, index, size)
        if kind == "average":
            return Pooled(F.avg_pool2d(u, 2), None, size)
        return Pooled(u, None, size)

    def unpool(self, n: int, value: Tensor, pooled: Pooled) -> Tensor:
        """The transpose U of the pool of layer n, with the argmax held fixed.

        Args:
            n: The layer, counted from 1.
            value: (N, C, h, w), for example s_n.
            pooled: What `pool` returned for u_n; only its argmax and size are read.

        Returns:
            (N, C, H, W), zero wherever the pool did not look.
        """
        kind = self.architecture.layers[n - 1].pool
        if kind == "max":
            assert pooled.index is not None
            if value.is_cuda:
                return unpool_by_place(value, pooled.index, pooled.size)
            return F.max_unpool2d(value, pooled.index, (2, 2), output_size=pooled.size)
        if kind == "average":
            up = value.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) / 4
            height, width = pooled.size
            return F.pad(up, (0, width - up.shape[3], 0, height - up.shape[2]))
        return value

    def select(self, n: int, u: Tensor, pooled: Pooled) -> Tensor:
        """The pool of layer n as a linear map: `u` read at the fixed argmax of `pooled`."""
        kind = self.architecture.layers[n - 1].pool
        if kind == "max":
            assert pooled.index is not None
            # Position-major views: free for the channels-last layout the dynamics work in.
            flat = u.permute(0, 2, 3, 1).flatten(1, 2)
            index = pooled.index.permute(0, 2, 3, 1)
            picked = flat.gather(1, index.flatten(1, 2))
            return picked.view(index.shape).permute(0, 3, 1, 2)
        if kind == "average":
            return F.avg_pool2d(u, 2)
        return u

    def feedback(self, n: int, top: Tensor, size: Sequence[int]) -> Tensor:
        """W_n^T * top: the transposed convolution of layer n.

        Args:
            n: The layer whose weights are used, counted from 1.
            top: (N, C_n, H, W), shaped like u_n.
            size: (height, width) of s_{n-1}.

        Returns:
            (N, C_{n-1}, height, width).
        """
        layer = self.architecture.layers[n - 1]
        extra = [
            (full + 2 * layer.padding - layer.kernel) % layer.stride for full in (size[0], size[1])
        ]
        return F.conv_transpose2d(
            top,
            self.weights[n - 1],
            stride=layer.stride,
            padding=layer.padding,
            output_padding=(extra[0], extra[1]),
        )

    def logits(self, top: Tensor, below: Tensor | None = None) -> Tensor:
        """The class scores of settled states, (N, classes).

        For the cross-entropy readout V vec(s_L) + c. For the mse readout the
        drive V s_{L-1} + c of the output layer, whose clipped value is the
        settled output: the same answer, without its flat ends.

        Args:
            top: s_L, (N, C, h, w).
            below: s_{L-1}; needed for the mse readout only.
        """
        if self.readout_weight is None:
            assert below is not None
            return self.drive(self.depth, below).flatten(1)
        return F.linear(top.flatten(1), self.readout_weight, self.readout_bias)

    def answer(self, images: Tensor, states: Sequence[Tensor]) -> Tensor:
        """The class scores, (N, classes), of states s_1..s_L reached from `images` (= s_0)."""
        return self.logits(states[-1], states[-2] if len(states) > 1 else images)


@lru_cache(maxsize=64)
def _places(size: tuple[int, int], device: torch.device) -> Tensor:
    """The flat position of every pixel that a 2x2 pool looks at, (1, h, 2, w, 2, 1) int64."""
    height, width = (side // 2 for side in size)
    rows = torch.arange(2 * height, device=device).view(1, height, 2, 1, 1, 1)
    columns = torch.arange(2 * width, device=device).view(1, 1, 1, width, 2, 1)
    return rows * size[1] + columns


def unpool_by_place(value: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """`F.max_unpool2d` of 2x2 windows as a comparison of positions.

    On a GPU torch's own takes its input channels-first and may add in any order, so it is
    refused where results must repeat; this one keeps channels innermost and repeats.

    Args:
        value: (N, C, h, w).
        index: (N, C, h, w) int64, positions in the flattened map.
        size: (H, W) of the map.

    Returns:
        (N, C, H, W), channels-last.
    """
    n, channels, height, width = value.shape
    inside = (n, height, 1, width, 1, channels)
    here = index.permute(0, 2, 3, 1).reshape(inside) == _places(size, value.device)
    spread = torch.where(here, value.permute(0, 2, 3, 1).reshape(inside), 0)
    up = spread.view(n, 2 * height, 2 * width, channels)
    if size != (2 * height, 2 * width):
        up = F.pad(up, (0, 0, 0, size[1] - 2 * width, 0, size[0] - 2 * height))
    return up.permute(0, 3, 1, 2)


def activate(h: Tensor, curvature: float) -> Tensor:
    """sigma(h) = clip(h/a, 0, 1)."""
    return (h / curvature).clamp(0, 1)


def zero_states(network: Network, batch: int) -> States:
    """The start of every free phase: all states zero, channels-last."""
    like = network.weights[0]
    return [
        torch.zeros((batch, *shape), dtype=like.dtype, device=like.device).contiguous(
            memory_format=torch.channels_last
        )
        for shape in network.architecture.shapes
    ]


def phi(network: Network, images: Tensor, states: Sequence[Tensor]) -> Tensor:
    """The primitive function Phi per image, (N,); differentiable in everything.

    Args:
        network: The weights.
        images: (N, C, H, W), already normalised.
        states: s_1..s_L.
    """
    total = images.new_zeros(images.shape[0])
    below = images
    for n, state in enumerate(states, start=1):
        pooled = network.pool(n, network.drive(n, below))
        total = total + (state * pooled.value).flatten(1).sum(1)
        below = state
    return total


def loss(network: Network, states: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The loss per image that the nudge pulls at, (N,).

    Cross-entropy of the readout, or half the squared distance of the output
    layer to the one-hot label (Laborieux et al. 2021, section 2).
    """
    if network.readout_weight is None:
        target = F.one_hot(labels, network.architecture.classes).to(states[-1].dtype)
        return 0.5 * (states[-1].flatten(1) - target).square().sum(1)
    return F.cross_entropy(network.logits(states[-1]), labels, reduction="none")


def energy(
    network: Network,
    images: Tensor,
    states: Sequence[Tensor],
    *,
    beta: float = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """The energy a/2 ||s||^2 - Phi + beta * loss per image, (N,)."""
    squares = torch.stack([state.flatten(1).square().sum(1) for state in states]).sum(0)
    total = 0.5 * network.architecture.curvature * squares - phi(network, images, states)
    if beta:
        assert labels is not None
        total = total + beta * loss(network, states, labels)
    return total
