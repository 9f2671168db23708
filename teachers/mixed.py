"""Relaxing in bfloat16 without its errors: only differences go through it.

Plain bfloat16 never reaches a fixed point: nudges move the lower layers by
about 2e-4, far under its resolution near 1. So a float32 *base* is kept, the
states s*, the drives u*_n = W_n * s*_{n-1} + b_n and the feedbacks
f*_n = W_{n+1}^T U(s*_{n+1}), and bfloat16 convolutions only carry what changed:

    u_n = u*_n + W_n * (s_{n-1} - s*_{n-1})
    f_n = f*_n + W_{n+1}^T [U(s_{n+1}; argmax) - U(s*_{n+1}; argmax*)]

The pool, and so the argmax, sees u_n in float32. The error is a share 2^-8 of
the *difference*; moving the base to the present state (`refresh`) makes the
forces exact again, and every round shrinks the difference further.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from epdistill.teachers.energy import Network, Pooled, States
from epdistill.teachers.phase import Phase, pooled_rows, rows_of
from epdistill.teachers.schedule import Nudge, Push

LOW = torch.bfloat16


@cache
def computes_low(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself; elsewhere torch imitates it.

    On a processor with AVX2 alone a relaxation by differences took some 18 times as long as one in
    float32, and layers' gradients had cosines down to .96 with the settled ones.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN says yes to every AVX-512, and then works in float32 between conversions.
        asked = [(torch.cpu, "_is_avx512_bf16_supported"), (torch.cpu, "_is_amx_tile_supported")]
    else:
        asked = [(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")]
    # Not public, so that they may go one day: float32 is right on any device.
    return any(getattr(place, name, bool)() for place, name in asked)


@dataclass(frozen=True)
class Base:
    """A state with everything that differences are taken from, in float32.

    Attributes:
        states: s*_1..s*_L.
        drives: u*_2..u*_L before the pool, biases included.
        pooled: P(u*_1)..P(u*_L).
        feedbacks: f*_1..f*_{L-1}.
    """

    states: States
    drives: list[Tensor]
    pooled: list[Pooled]
    feedbacks: list[Tensor]


@contextmanager
def full_float32() -> Iterator[None]:
    """No TensorFloat-32 while a `with` lasts: a base rounded to it is not the differences' base."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@full_float32()
def make_base(network: Network, drive: Pooled, states: States) -> Base:
    """Evaluate a state once in float32: as many convolutions as one sweep.

    Args:
        network: The weights.
        drive: P(u_1).
        states: s_1..s_L.
    """
    layers = range(2, network.depth + 1)
    drives = [network.drive(n, states[n - 2]) for n in layers]
    pooled = [drive, *(network.pool(n, u) for n, u in zip(layers, drives, strict=True))]
    feedbacks = [
        network.feedback(
            n, network.unpool(n, states[n - 1], pooled[n - 1]), states[n - 2].shape[2:]
        )
        for n in layers
    ]
    return Base(list(states), drives, pooled, feedbacks)


def lowered(network: Network) -> Network:
    """The same weights in bfloat16, without biases: for differences, which have none."""
    weights = tuple(weight.to(LOW) for weight in network.weights)
    return Network(network.architecture, weights, (None,) * network.depth)  # type: ignore[arg-type]


def coarse_states(
    network: Network, drive: Pooled, start: States, sweeps: int, omega: float
) -> States:
    """A plain bfloat16 red-black relaxation: fast, and right to about 1e-2.

    Returns:
        States in the dtype of `start`.
    """
    low = Network(
        network.architecture,
        tuple(weight.to(LOW) for weight in network.weights),
        tuple(bias.to(LOW) for bias in network.biases),
        None if network.readout_weight is None else network.readout_weight.to(LOW),
        None if network.readout_bias is None else network.readout_bias.to(LOW),
    )
    phase = Phase(
        low,
        Pooled(drive.value.to(LOW), drive.index, drive.size),
        [state.to(LOW) for state in start],
        None,
    )
    for _ in range(sweeps):
        phase.red_black(omega, None)
    return [state.to(drive.value.dtype) for state in phase.states]


def _may_ask(tensor: Tensor) -> bool:
    """Whether looking for a few elements is cheap: a GPU would finish all that comes before."""
    return not tensor.is_cuda


def _same(states: States, others: States) -> bool:
    return all(state is other for state, other in zip(states, others, strict=True))


class DifferencePhase(Phase):
    """A phase whose convolutions see differences from a base only."""

    def __init__(
        self, network: Network, low: Network, base: Base, states: States, nudge: Nudge | Push | None
    ) -> None:
        self.low, self.base = low, base
        at_base = _same(states, base.states)
        super().__init__(network, base.pooled[0], states, nudge, base.pooled if at_base else None)

    def refresh(self) -> None:
        """Move the base to the present states, unless it is there."""
        if self.current_base():
            return
        self.base = make_base(self.network, self.pooled[0], self.states)
        self.pooled = list(self.base.pooled)

    def current_base(self) -> Base | None:
        """The base, if the states have not left it."""
        return self.base if _same(self.states, self.base.states) else None

    def look(self, n: int) -> Pooled:
        """P(u*_n + W_n * difference), pooled in float32."""
        below = self.states[n - 2]
        change = self.low.drive(n, (below - self.base.states[n - 2]).to(LOW))
        # Cast first: adding unlike dtypes takes twice as long as casting and adding.
        u = change.to(below.dtype).add_(self.base.drives[n - 2])
        return self.network.pool(n, u)

    def from_above(self, n: int) -> Tensor:
        """f*_n plus the feedback of what changed above."""
        top = self._top_change(n + 1)
        change = self.low.feedback(n + 1, top, self.states[n - 1].shape[2:])
        return change.to(self.states[n - 1].dtype).add_(self.base.feedbacks[n - 1])

    def _top_change(self, n: int) -> Tensor:
        """U(s_n; argmax) - U(s*_n; argmax*) in bfloat16, (N, C, H, W)."""
        state, old = self.states[n - 1], self.base.states[n - 1]
        now, then = self.pooled[n - 1], self.base.pooled[n - 1]
        if now.index is None or then.index is None:
            return self.low.unpool(n, (state - old).to(LOW), now)
        moved = now.index != then.index
        value = torch.where(moved, state, state - old).to(LOW)
        top = self.low.unpool(n, value, now)
        if not _may_ask(top):
            gone = torch.where(moved, old, 0).to(LOW)
            return top.sub_(self.low.unpool(n, gone, then))
        where = moved.permute(0, 2, 3, 1).nonzero(as_tuple=True)
        if len(where[0]):
            # Few maxima have moved; there the old value is taken away at the old place.
            image, row, column, channel = where
            place = then.index[image, channel, row, column]
            flat = top.permute(0, 2, 3, 1).flatten(1, 2)
            flat[image, place, channel] = -old[image, channel, row, column].to(LOW)
        return top

    def keep(self, index: Tensor) -> None:
        """Drop all images but those at `index`, from the base as well."""
        super().keep(index)
        base = self.base
        self.base = replace(
            base,
            states=[rows_of(state, index) for state in base.states],
            drives=[rows_of(drive, index) for drive in base.drives],
            pooled=[pooled_rows(pooled, index) for pooled in base.pooled],
            feedbacks=[rows_of(feedback, index) for feedback in base.feedbacks],
        )
