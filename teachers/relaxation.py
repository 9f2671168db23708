"""Relaxation: from an image to the fixed point s = sigma(dPhi/ds), with a certificate.

Two schedules. *Red-black*: layers of equal parity do not touch each other, so
all odd layers are updated, then all even ones; each half-sweep minimises a
majoriser of the energy, so the energy never rises, also over-relaxed by any
omega in (0, 2). *Synchronous*: every layer reads the old states, as in the
published code; it has no such guarantee and may cycle.

What makes it fast: P(u_1) depends on the image alone and is computed once; one
u_{n+1} serves both as the drive of layer n+1 and for the argmax of the feedback
to layer n, so a sweep costs L-1 convolutions and L-1 transposed ones; images
that have converged leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.errors import RecipeError
from epdistill.teachers.energy import Network, Pooled, States, activate, zero_states

Kind = Literal["red-black", "synchronous"]


@dataclass(frozen=True)
class Schedule:
    """How a state is relaxed. The equilibrium is not unique, so this is part of the model.

    Attributes:
        kind: `"red-black"` or the published `"synchronous"`.
        omega: Over-relaxation, in (0, 2); red-black only.
        tolerance: An image is settled when its residual max |sigma(dPhi/ds) - s|
            is at most this; 0 runs `sweeps` sweeps for every image.
        sweeps: The most sweeps an image gets.
        check_every: Sweeps between two looks at the residual.
    """

    kind: Kind = "red-black"
    omega: float = 1.5
    tolerance: float = 1e-4
    sweeps: int = 250
    check_every: int = 5

    def __post_init__(self) -> None:
        """Refuse what cannot relax."""
        if self.kind not in ("red-black", "synchronous"):
            raise RecipeError(f"schedule {self.kind!r}; expected 'red-black' or 'synchronous'")
        if not 0 < self.omega < 2:
            raise RecipeError(f"omega {self.omega}; expected a number between 0 and 2, exclusive")
        if self.sweeps < 1 or self.check_every < 1 or self.tolerance < 0:
            raise RecipeError(
                f"sweeps {self.sweeps}, check_every {self.check_every}, tolerance "
                f"{self.tolerance}; expected at least 1, 1 and 0"
            )

    def with_(self, **changes: Any) -> Schedule:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `Schedule(**content)` reads it back."""
        return asdict(self)


PUBLISHED = Schedule(kind="synchronous", omega=1.0, tolerance=0.0, sweeps=250)
"""The published free phase: 250 synchronous sweeps for every image."""


@dataclass(frozen=True)
class Certificate:
    """What is known about each image's state; every tensor has shape (N,).

    Attributes:
        residual: max over units of |sigma(dPhi/ds) - s| at the returned state.
        sweeps: int64, sweeps spent on the image.
        converged: bool, residual <= tolerance.
    """

    residual: Tensor
    sweeps: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Relaxed:
    """States s_1..s_L (each (N, C, h, w), in [0,1]) and their certificate."""

    states: States
    certificate: Certificate


@dataclass(frozen=True)
class Nudge:
    """A pull of strength beta down (beta > 0) or up (beta < 0) the loss.

    Attributes:
        beta: Strength; the nudged energy is E + beta * loss.
        target: (N, classes) one-hot labels in the dtype of the states.
        bound: Upper bound on the curvature of beta * loss in s_L (0 for beta < 0):
            keeps the update a majorise-minimise step. See `make_nudge`.
    """

    beta: float
    target: Tensor
    bound: float = 0.0


def make_nudge(network: Network, labels: Tensor, beta: float, *, bounded: bool = True) -> Nudge:
    """Build the nudge of a phase.

    For beta > 0 the cross-entropy, linearised at the current state, lies below
    the loss; adding its curvature bound (Boehning 1992) beta * lambda_max(V^T B V),
    B = (I - 11^T/K)/2, makes the quadratic model lie above it again.

    Args:
        network: The weights; the readout decides the loss.
        labels: (N,) int64.
        beta: Strength and sign.
        bounded: False leaves the bound out, as the published dynamics do.
    """
    classes = network.architecture.classes
    target = F.one_hot(labels, classes).to(network.weights[0].dtype)
    bound = 0.0
    if bounded and beta > 0 and network.readout_weight is not None:
        v = network.readout_weight.detach().double()
        centred = v - v.mean(0, keepdim=True)  # B V up to the factor 1/2
        bound = beta * 0.5 * float(torch.linalg.eigvalsh(v @ centred.T).max())
    return Nudge(beta, target, bound)


def _pull(network: Network, nudge: Nudge, top: Tensor) -> Tensor:
    """-beta * dloss/ds_L at the current top state, shaped like it."""
    flat = top.flatten(1)
    if network.readout_weight is None:
        force = nudge.target - flat
    else:
        error = nudge.target - network.logits(top).softmax(1)
        force = error @ network.readout_weight
    return (nudge.beta * force).view(top.shape)


class _Batch:
    """The images still relaxing: their states and the pooled drives at those states."""

    def __init__(self, network: Network, drive: Pooled, states: States, nudge: Nudge | None):
        self.network = network
        self.nudge = nudge
        self.states = list(states)
        # pooled[n-1] is P(u_n) at the current s_{n-1}; the first never changes.
        self.pooled: list[Pooled] = [drive]
        self.pooled += [self._look(n) for n in range(2, network.depth + 1)]

    def _look(self, n: int) -> Pooled:
        return self.network.pool(n, self.network.drive(n, self.states[n - 2]))

    def force(self, n: int) -> Tensor:
        """dPhi/ds_n at the current states, the nudge included."""
        network, pooled = self.network, self.pooled
        h = pooled[n - 1].value
        if n < network.depth:
            top = network.unpool(n + 1, self.states[n], pooled[n])
            size = self.states[n - 1].shape[2:]
            return network.feedback(n + 1, top, size).add_(h)
        if self.nudge is not None:
            return h + _pull(network, self.nudge, self.states[-1])
        return h

    def forces(self) -> States:
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
        if n == self.network.depth and self.nudge is not None:
            if self.network.readout_weight is None:
                # The squared error is quadratic in the unit itself: its exact
                # minimiser is clip((h + beta y) / (a + beta)); h holds beta (y - s).
                beta = self.nudge.beta
                return (h + beta * self.states[-1]).div_(a + beta).clamp_(0, 1)
            if self.nudge.bound:
                k = self.nudge.bound
                return (h + k * self.states[-1]).div_(a + k).clamp_(0, 1)
        return (h / a).clamp_(0, 1)

    def move(self, n: int, h: Tensor, omega: float) -> None:
        """Update layer n, then everything that reads it."""
        new = self.minimiser(n, h)
        if omega != 1.0:
            new = torch.lerp(self.states[n - 1], new, omega).clamp_(0, 1)
        self.states[n - 1] = new
        if n < self.network.depth:
            self.pooled[n] = self._look(n + 1)

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
            self.pooled[n - 1] = self._look(n)

    def keep(self, index: Tensor) -> None:
        """Drop all images but those at `index`."""
        self.states = [_rows(state, index) for state in self.states]
        self.pooled = [
            Pooled(
                _rows(p.value, index), None if p.index is None else _rows(p.index, index), p.size
            )
            for p in self.pooled
        ]
        if self.nudge is not None:
            self.nudge = replace(self.nudge, target=self.nudge.target[index])


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    # index_select keeps neither layout for certain; the dynamics want channels-last.
    return tensor.index_select(0, index).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def relax(
    network: Network,
    images: Tensor,
    schedule: Schedule,
    *,
    nudge: Nudge | None = None,
    start: States | None = None,
    drive: Pooled | None = None,
    watch: Callable[[int, States], None] | None = None,
) -> Relaxed:
    """Relax a batch to its fixed points.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised.
        schedule: How, how far and for how long.
        nudge: None for a free phase.
        start: States to start from; zeros without it. Only ever the state itself
            or its numerical neighbourhood: other starts reach other equilibria.
        drive: P(u_1) of these images if it is at hand (it is the same in every phase).
        watch: Called as `watch(sweep, states)` before the first sweep and after
            each one, for plots and tests; only with `tolerance` 0.

    Returns:
        The states and, per image, residual, sweeps and whether it converged.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if drive is None:
        drive = network.pool(1, network.drive(1, images))
    count = images.shape[0]
    batch = _Batch(network, drive, start or zero_states(network, count), nudge)
    device = images.device
    final = [torch.empty_like(state) for state in batch.states]
    residual = torch.full((count,), float("inf"), device=device, dtype=images.dtype)
    sweeps = torch.zeros(count, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)  # where each live image sits in `final`
    done = torch.zeros(count, dtype=torch.bool, device=device)  # settled, yet not dropped

    for sweep in range(schedule.sweeps + 1):
        last = sweep == schedule.sweeps
        forces = None
        if watch is not None:
            watch(sweep, batch.states)
        if last or (schedule.tolerance and sweep and sweep % schedule.check_every == 0):
            forces = batch.forces()
            gap = batch.residual(forces)
            settled = (gap <= schedule.tolerance) & ~done
            write = ~done if last else settled
            if bool(write.any()):
                pick = write.nonzero().squeeze(1)
                where = rows[pick]
                for target, state in zip(final, batch.states, strict=True):
                    target[where] = state[pick]
                residual[where], sweeps[where] = gap[pick], sweep
            done |= settled
            if last or bool(done.all()):
                break
            # Compacting costs a copy of everything: worth it from a quarter on.
            if int(done.sum()) * 4 >= done.numel():
                live = (~done).nonzero().squeeze(1)
                batch.keep(live)
                rows, done = rows[live], done[live]
                forces = [_rows(h, live) for h in forces]
        if schedule.kind == "red-black":
            batch.red_black(schedule.omega, forces)
        else:
            batch.synchronous(forces)
    certificate = Certificate(residual, sweeps, residual <= schedule.tolerance)
    return Relaxed(final, certificate)


def residuals(
    network: Network, images: Tensor, states: States, *, nudge: Nudge | None = None
) -> Tensor:
    """max over units of |sigma(dPhi/ds) - s| per image, (N,), at the given states."""
    with torch.no_grad():
        drive = network.pool(1, network.drive(1, images))
        batch = _Batch(network, drive, states, nudge)
        return batch.residual(batch.forces())


def unrolled(
    network: Network, images: Tensor, schedule: Schedule, *, start: States | None = None
) -> States:
    """`schedule.sweeps` sweeps of the free phase that autograd can differentiate.

    The same updates as `relax` without retirement; memory grows with the sweeps.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised; gradients flow to them.
        schedule: Kind, omega and number of sweeps.
        start: Where to start; zeros without it.
    """
    a, depth = network.architecture.curvature, network.depth
    states = list(start) if start is not None else zero_states(network, images.shape[0])
    pooled = [network.pool(1, network.drive(1, images))]
    pooled += [network.pool(n, network.drive(n, states[n - 2])) for n in range(2, depth + 1)]
    odd, even = range(1, depth + 1, 2), range(2, depth + 1, 2)
    halves = [odd, even] if schedule.kind == "red-black" else [range(1, depth + 1)]
    omega = schedule.omega if schedule.kind == "red-black" else 1.0
    for _ in range(schedule.sweeps):
        for half in halves:
            moved = {}
            for n in half:
                h = pooled[n - 1].value
                if n < depth:
                    top = network.unpool(n + 1, states[n], pooled[n])
                    h = h + network.feedback(n + 1, top, states[n - 1].shape[2:])
                moved[n] = (states[n - 1] + omega * (activate(h, a) - states[n - 1])).clamp(0, 1)
            for n, new in moved.items():
                states[n - 1] = new
                if n < depth:
                    pooled[n] = network.pool(n + 1, network.drive(n + 1, new))
    return states
