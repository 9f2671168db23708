"""What answers cost: operations counted, the machine's own rate, and a compiled contender.

A latency alone does not say whether a program or a machine is slow. So the operations of
every contender are counted, and their rate is compared with that of one large float32 matrix
product, measured in the same interleaved rounds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from epdistill.export.bench import Contender
from epdistill.export.tracing import one_line, silence

MATRIX = "float32 matrix product"
MATRIX_SIDE = 512
MATRIX_FLOPS = 2.0 * MATRIX_SIDE**3


def matrix_contender() -> Contender:
    """A product of two square float32 matrices, whatever the images."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(MATRIX_SIDE, MATRIX_SIDE, generator=generator) for _ in range(2))

    def run(_: Tensor) -> object:
        return left @ right

    return Contender(MATRIX, run)


def flops_per_image(run: Callable[[Tensor], object], images: Tensor) -> float:
    """Floating-point operations of an answer, a multiplication and an addition each.

    Convolutions and matrix products are counted, forwards and backwards. A model that
    relaxes spends what these very images need to settle.

    Args:
        run: Answers a batch with torch, not in inference mode.
        images: (N, C, H, W), N >= 1.
    """
    with FlopCounterMode(display=False) as counter:
        run(images)
    return float(counter.get_total_flops() / len(images))


def compiled_contender(
    model: nn.Module, name: str, images: Tensor, batch_sizes: Sequence[int]
) -> Contender | str:
    """A module under torch.compile, warmed up for these batch sizes; or why there is none.

    Args:
        model: Images to logits; a copy of it is compiled, in eval mode.
        name: The contender's.
        images: float32 (N, C, H, W) in [0,1].
        batch_sizes: Images per call.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on this machine, which torch.compile needs"
    module = torch.compile(deepcopy(model).eval(), dynamic=False)

    def run(batch: Tensor) -> object:
        with torch.inference_mode():
            return module(batch)

    try:
        with silence():
            for size in batch_sizes:
                run(images[torch.arange(size) % len(images)].contiguous())
    except Exception as error:  # the compiler's and the back end's errors share no base
        return f"torch.compile failed ({one_line(error)})"
    return Contender(name, run)
