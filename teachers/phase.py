"""One phase of a batch: its states, the forces on them, and the updates that lower the energy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epdistill.teachers.energy import Network, Pooled, States, activate
from epdistill.teachers.schedule import Nudge, Push

if TYPE_CHECKING:
    from epdistill.teachers.mixed import Base


def _pull(network: Network, nudge: Nudge, top: Tensor) -> Tensor:
    """-beta * dloss/ds_L at the current top state, shaped like it."""
    flat = top.flatten(1)
    if network.readout_weight is None:
        force = nudge.target - flat
    else:
        error = nudge.target - network.logits(top).softmax(1)
        force = error @ network.readout_weight
    return (nudge.beta * force).view(top.shape)


class Phase:
    """The images still relaxing: their states and the pooled drives at those states."""

    def __init__(
        self,
        network: Network,
        drive: Pooled,
        states: States,
        nudge: Nudge | Push | None,
        pooled: list[Pooled] | None = None,
    ) -> None:
        self.network = network
        self.nudge = nudge
        self.states = list(states)
        # pooled[n-1] is P(u_n) at the current s_{n-1}; the first never changes.
        self.pooled: list[Pooled] = list(pooled) if pooled is not None else [drive]
        if pooled is None:
            self.pooled += [self.look(n) for n in range(2, network.depth + 1)]

    def refresh(self) -> None:
        """Make the next forces exact to the network's dtype; here they always are."""

    def current_base(self) -> Base | None:
        """The current states as the base of differences; None where forces take none."""
        return None

    def look(self, n: int) -> Pooled:
        """P(u_n) at the current s_{n-1}."""
        return self.network.pool(n, self.network.drive(n, self.states[n - 2]))

    def force(self, n: int) -> Tensor:
        """dPhi/ds_n at the current states, the nudge included."""
        h = self.pooled[n - 1].value
        if n < self.network.depth:
            h = self.from_above(n).add_(h)
        if isinstance(self.nudge, Push):
            push = self.nudge.forces[n - 1]
            return h if push is None else h + push
        if self.nudge is not None and n == self.network.depth:
            return h + _pull(self.network, self.nudge, self.states[-1])
        return h

    def from_above(self, n: int) -> Tensor:
        """The feedback to layer n: W_{n+1}^T U(s_{n+1}); a fresh tensor."""
        top = self.network.unpool(n + 1, self.states[n], self.pooled[n])
        return self.network.feedback(n + 1, top, self.states[n - 1].shape[2:])

    def forces(self) -> States:
        """dPhi/ds_1..dPhi/ds_L, all at the current states."""
        return [self.force(n) for n in range(1, self.network.depth + 1)]

    def residual(self, forces: States) -> Tensor:
        """max |sigma(dPhi/ds) - s| per image, all forces taken at one common state."""
        a = self.network.architecture.curvature
        gaps = [
            (activate(h, a) - s).abs_().flatten(1).amax(1)
            for h, s in zip(forces, self.states, strict=True)
        ]
        return torch.stack(gaps).amax(0)

    def minimiser(self, n: int, h: Tensor) -> Tensor:
        """The minimiser of (a majoriser of) the energy in layer n, given its force."""
        a = self.network.architecture.curvature
        if n == self.network.depth and isinstance(self.nudge, Nudge):
            if self.network.readout_weight is None:
                # The squared error is quadratic in the unit itself: its exact
                # minimiser is clip((h + beta y) / (a + beta)); h holds beta (y - s).
                beta = self.nudge.beta
                return (h + beta * self.states[-1]).div_(a + beta).clamp_(0, 1)
            k = self.nudge.bound
            if isinstance(k, Tensor) or k:
                return (h + k * self.states[-1]).div_(a + k).clamp_(0, 1)
        return (h / a).clamp_(0, 1)

    def move(self, n: int, h: Tensor, omega: float) -> None:
        """Update layer n, then everything that reads it."""
        new = self.minimiser(n, h)
        if omega != 1.0:
            new = torch.lerp(self.states[n - 1], new, omega).clamp_(0, 1)
        self.states[n - 1] = new
        if n < self.network.depth:
            self.pooled[n] = self.look(n + 1)

    def red_black(self, omega: float, forces: States | None) -> None:
        """One sweep; `forces` at the current state are used for the odd half if given."""
        depth = self.network.depth
        odd = [forces[n - 1] if forces else self.force(n) for n in range(1, depth + 1, 2)]
        for n, h in zip(range(1, depth + 1, 2), odd, strict=True):
            self.move(n, h, omega)
        even = [self.force(n) for n in range(2, depth + 1, 2)]
        for n, h in zip(range(2, depth + 1, 2), even, strict=True):
            self.move(n, h, omega)

    def synchronous(self, forces: States | None) -> None:
        """One published sweep: s <- sigma(dPhi/ds), all layers from the old states."""
        forces = forces or self.forces()
        a = self.network.architecture.curvature
        self.states = [activate(h, a) for h in forces]
        for n in range(2, self.network.depth + 1):
            self.pooled[n - 1] = self.look(n)

    def keep(self, index: Tensor) -> None:
        """Drop all images but those at `index`."""
        self.states = [rows_of(state, index) for state in self.states]
        self.pooled = [pooled_rows(pooled, index) for pooled in self.pooled]
        if isinstance(self.nudge, Nudge):
            self.nudge = replace(self.nudge, target=self.nudge.target[index])
        elif self.nudge is not None:
            self.nudge = Push([f if f is None else rows_of(f, index) for f in self.nudge.forces])


def pools_at(network: Network, states: States, drive: Pooled) -> list[Pooled]:
    """P(u_1)..P(u_L) at some states."""
    layers = range(2, network.depth + 1)
    return [drive, *(network.pool(n, network.drive(n, states[n - 2])) for n in layers)]


def rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """Some images of a batch, channels-last."""
    # index_select keeps neither layout for certain; the dynamics want channels-last.
    return tensor.index_select(0, index).contiguous(memory_format=torch.channels_last)


def pooled_rows(pooled: Pooled, index: Tensor) -> Pooled:
    """Some images of a pooled map."""
    return pooled.map(lambda tensor: rows_of(tensor, index))
