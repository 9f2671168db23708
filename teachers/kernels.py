# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels of `epdistill.teachers.fused`, which says what they compute.

All maps are channels-last in memory: element i of (N, h, w, C). Annotations are left out, for
Triton reads them. N is counted by the grid; H, W, h and w are heights and widths before and
after the pool, and `total` is how many elements there are after it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(i, C, W, h, w):
    """Of element i of (N, h, w, C): channel, image, and the first row and column of its window."""
    c = i % C
    x = (i // C) % w
    y = (i // (C * w)) % h
    n = i // (C * w * h)
    return c, n, 2 * y, 2 * x


@triton.jit
def pool_kernel(
    u, bias, value, index, total, C, H, W, h, w, BIAS: tl.constexpr, SIZE: tl.constexpr
):
    """The largest of each window, plus the bias where there is one, and where it was."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < total
    c, n, y, x = _place(i, C, W, h, w)
    at = u + ((n * H + y) * W + x) * C + c
    place = y * W + x
    best = tl.load(at, mask=live, other=0.0)
    where = place
    for k in tl.static_range(1, 4):
        ahead = (k // 2) * W + k % 2
        other = tl.load(at + ahead * C, mask=live, other=0.0)
        # Not a number wins, as in torch.
        more = (other > best) | (other != other)
        best = tl.where(more, other, best)
        where = tl.where(more, place + ahead, where)
    if BIAS:
        best += tl.load(bias + c, mask=live, other=0.0)
    tl.store(value + i, best, mask=live)
    tl.store(index + i, where.to(tl.int64), mask=live)


@triton.jit
def unpool_kernel(value, index, up, total, C, H, W, h, w, SIZE: tl.constexpr):
    """Each value at its place in its window, and zeros around it."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < total
    c, n, y, x = _place(i, C, W, h, w)
    at = up + ((n * H + y) * W + x) * C + c
    place = y * W + x
    here = tl.load(value + i, mask=live, other=0.0)
    where = tl.load(index + i, mask=live, other=0).to(tl.int32)
    for k in tl.static_range(0, 4):
        ahead = (k // 2) * W + k % 2
        chosen = tl.where(where == place + ahead, here, 0.0)
        tl.store(at + ahead * C, chosen, mask=live)


@triton.jit
def settle_kernel(above, below, state, new, total, curvature, keep, SIZE: tl.constexpr):
    """The over-relaxed step towards clip(force / curvature, 0, 1); `keep` is 1 - omega."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < total
    force = tl.load(above + i, mask=live, other=0.0) + tl.load(below + i, mask=live, other=0.0)
    old = tl.load(state + i, mask=live, other=0.0)
    # Comparisons let what is not a number through; a minimum would not.
    goal = force / curvature
    goal = tl.where(goal < 0.0, 0.0, goal)
    goal = tl.where(goal > 1.0, 1.0, goal)
    moved = goal - (goal - old) * keep
    moved = tl.where(moved < 0.0, 0.0, moved)
    moved = tl.where(moved > 1.0, 1.0, moved)
    tl.store(new + i, moved, mask=live)
