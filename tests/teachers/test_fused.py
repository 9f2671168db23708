"""The GPU's kernels, on a processor: interpreted for what they compute, compiled for whether."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from epdistill.teachers import fused

NEEDED = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# Triton looks at the variable when it is imported, so this runs in a process of its own.
INTERPRETED = """
import torch
import torch.nn.functional as F
from epdistill.teachers import fused
from epdistill.teachers.energy import Pooled

generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator)
for height, width, channels in ((8, 8, 6), (7, 9, 5), (2, 2, 700), (16, 16, 12)):
    u, bias = draw(3, channels, height, width), draw(channels)
    assert fused.fuses(u)
    found = fused.pool(u, bias)
    value, index = F.max_pool2d(u + bias.view(1, -1, 1, 1), 2, return_indices=True)
    assert torch.equal(found.value, value)
    assert torch.equal(fused.pool(u, None).index, F.max_pool2d(u, 2, return_indices=True)[1])
    pooled = Pooled(value, index, (height, width))
    up = F.max_unpool2d(value, index, (2, 2), output_size=(height, width))
    assert torch.equal(fused.unpool(value, pooled), up)
    above, below, state = draw(*value.shape), draw(*value.shape), draw(*value.shape).sigmoid()
    above[0, 0, 0, 0] = float("nan")
    for omega in (1.0, 1.3, 0.4):
        new = fused.settle(above, below, state, 2.0, omega)
        goal = torch.lerp(state, ((above + below) / 2).clamp(0, 1), omega).clamp(0, 1)
        torch.testing.assert_close(new, goal, rtol=0, atol=2e-7, equal_nan=True)
lost = draw(1, 1, 2, 2)
lost[0, 0, 1, 0] = float("nan")
assert fused.pool(lost, None).value.isnan().all()
print("done")
"""


def run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@NEEDED
def test_interpreted_kernels_do_what_torch_does() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1").endswith("done\n")


@NEEDED
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from epdistill.teachers import kernels

    numbers = dict.fromkeys(("total", "C", "H", "W", "h", "w"), "i32")
    maps = dict.fromkeys(("above", "below", "state", "new"), "*fp32")
    size = {"SIZE": fused.BLOCK}
    for kernel, types, constants in (
        (kernels.pool_kernel, {"u": "*fp32", "bias": "*fp32", "value": "*fp32", "index": "*i64",
                              **numbers, "BIAS": "constexpr"}, {"BIAS": True}),
        (kernels.unpool_kernel, {"value": "*fp32", "index": "*i64", "up": "*fp32", **numbers}, {}),
        (kernels.settle_kernel, {**maps, "total": "i32", "curvature": "fp32", "keep": "fp32"}, {}),
    ):  # fmt: skip
        source = ASTSource(
            fn=kernel, signature={**types, "SIZE": "constexpr"}, constexprs={**constants, **size}
        )
        assert "ptx" in compiled(source, target=GPUTarget("cuda", 80, 32)).asm


def test_without_kernels_the_same_is_done_by_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, 3, 6, 6, generator=generator)
    assert not fused.fuses(u) and not fused.fuses(u.double())
    pooled = fused.pool(u, torch.ones(3))
    assert torch.equal(pooled.value, torch.nn.functional.max_pool2d(u + 1, 2))
    up = fused.unpool(pooled.value, pooled)
    assert up.shape == u.shape and torch.equal(up[up != 0].sort().values,
                                               pooled.value.flatten().sort().values)  # fmt: skip
