"""Kernels for what a sweep does between its convolutions, where Triton and a GPU are there.

On a GPU the pools, their transposes and the updates of a sweep are many small passes over
memory, which together take as long as the convolutions. Each function here is one pass; on
other devices, and without Triton, it is the same in torch operations.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.teachers.energy import Pooled, unpool_by_place

# Places are counted in 32 bits, also in a map of four times as many elements.
LARGEST = (2**31 - 1) // 4
BLOCK = 1024


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The kernels, or None without Triton. It takes long to import, so only who needs it does."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("epdistill.teachers.kernels")


def fuses(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor; Triton's interpreter takes those of a processor."""
    placed = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    fits = tensor.dtype == torch.float32 and tensor.numel() <= LARGEST
    return placed and fits and kernels() is not None


def _launch(name: str, total: int, *arguments: Tensor | float, **constants: bool) -> None:
    """Run a kernel over `total` elements, on the device of its tensors."""
    tensor = arguments[0]
    assert isinstance(tensor, Tensor)
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        kernel = getattr(kernels(), name)
        kernel[(-(-total // BLOCK),)](*arguments, **constants, SIZE=BLOCK)


def _inside(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def pool(u: Tensor, bias: Tensor | None) -> Pooled:
    """The 2x2 max-pool of u + bias with its argmax.

    Rounding keeps order, so the value is the same bit for bit whether the bias is added before
    or after; where rounding makes two pixels equal, the argmax may be the other one.

    Args:
        u: (N, C, H, W).
        bias: (C,), or None.
    """
    if not fuses(u):
        value, index = F.max_pool2d(u, 2, return_indices=True)
        if bias is not None:
            value = value + bias.view(1, -1, 1, 1)
        return Pooled(value, index, (u.shape[2], u.shape[3]))
    u = _inside(u)
    n, channels, height, width = u.shape
    shape = (n, channels, height // 2, width // 2)
    value, index = _empty(u, shape), _empty(u, shape, torch.int64)
    total, offset = value.numel(), u if bias is None else bias
    _launch(
        "pool_kernel", total, u, offset, value, index, total, channels, height, width,
        height // 2, width // 2, BIAS=bias is not None,
    )  # fmt: skip
    return Pooled(value, index, (height, width))


def unpool(value: Tensor, pooled: Pooled) -> Tensor:
    """The transpose of the pool that gave `pooled`: (N, C, h, w) -> (N, C, H, W), channels-last."""
    assert pooled.index is not None
    if not fuses(value):
        return unpool_by_place(value, pooled.index, pooled.size)
    value, index = _inside(value), _inside(pooled.index)
    n, channels, h, w = value.shape
    height, width = pooled.size
    up = _empty(value, (n, channels, height, width))
    if (height, width) != (2 * h, 2 * w):
        up.zero_()
    total = value.numel()
    _launch("unpool_kernel", total, value, index, up, total, channels, height, width, h, w)
    return up


def settle(above: Tensor, below: Tensor, state: Tensor, curvature: float, omega: float) -> Tensor:
    """The over-relaxed update of a layer between others: towards clip((above + below) / a, 0, 1).

    Args:
        above: Feedback, (N, C, h, w).
        below: Pooled drive, (N, C, h, w).
        state: The present state, (N, C, h, w).
        curvature: a.
        omega: 1 goes there, more beyond; what comes out is clipped to [0, 1].
    """
    if not fuses(state):
        goal = ((above + below) / curvature).clamp_(0, 1)
        return goal if omega == 1.0 else torch.lerp(state, goal, omega).clamp_(0, 1)
    above, below, state = _inside(above), _inside(below), _inside(state)
    new = torch.empty_like(state)
    total = state.numel()
    _launch("settle_kernel", total, above, below, state, new, total, curvature, 1.0 - omega)
    return new
