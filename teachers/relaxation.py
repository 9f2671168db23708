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

import torch
from torch import Tensor

from epdistill.teachers.captured import allowed, relax_recorded
from epdistill.teachers.energy import Network, Pooled, States, zero_states
from epdistill.teachers.mixed import (
    Base,
    DifferencePhase,
    coarse_states,
    computes_low,
    lowered,
    make_base,
)
from epdistill.teachers.phase import Phase, pools_at, rows_of
from epdistill.teachers.schedule import Certificate, Nudge, Push, Relaxed, Schedule


def _begin(
    network: Network,
    drive: Pooled,
    schedule: Schedule,
    nudge: Nudge | Push | None,
    start: States | None,
    pooled: list[Pooled] | None,
    base: Base | None,
) -> tuple[Phase, int]:
    """The phase before its first counted sweep, and the sweeps already spent on it."""
    begin = start or zero_states(network, drive.value.shape[0])
    if not is_mixed(network, schedule):
        return Phase(network, drive, begin, nudge, pooled), 0
    spent = 0
    if start is None:
        spent = min(schedule.coarse, schedule.sweeps)
        begin = coarse_states(network, drive, begin, spent, schedule.omega)
    if base is None:
        base = make_base(network, drive, begin)
        begin = base.states
    return DifferencePhase(network, lowered(network), base, begin, nudge), spent


def is_mixed(network: Network, schedule: Schedule) -> bool:
    """Whether this network relaxes by differences under this schedule, where it is now."""
    first = network.weights[0]
    return (
        schedule.precision == "mixed"
        and first.dtype == torch.float32
        and computes_low(first.device)
    )


def records(network: Network, schedule: Schedule) -> bool:
    """Whether relaxations of this network under this schedule are replayed from CUDA graphs."""
    return allowed() and network.weights[0].is_cuda and not is_mixed(network, schedule)


@torch.no_grad()
def relax(
    network: Network,
    images: Tensor,
    schedule: Schedule,
    *,
    nudge: Nudge | Push | None = None,
    start: States | None = None,
    drive: Pooled | None = None,
    pooled: list[Pooled] | None = None,
    base: Base | None = None,
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
        pooled: P(u_1)..P(u_L) at `start` if they are at hand.
        base: `start` as evaluated by `make_base`, if it is at hand; mixed precision only.
        watch: Called as `watch(sweep, states)` before the first sweep and after
            each one, for plots and tests; only with `tolerance` 0.

    Returns:
        The states and, per image, residual, sweeps and whether it converged. In mixed
        precision with `tolerance` 0 the residual is that of the difference form.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if drive is None:
        drive = pooled[0] if pooled else network.pool(1, network.drive(1, images))
    if watch is None and not isinstance(nudge, Push) and records(network, schedule):
        return relax_recorded(network, drive, schedule, nudge=nudge, start=start, pooled=pooled)
    count = images.shape[0]
    batch, spent = _begin(network, drive, schedule, nudge, start, pooled, base)
    device = images.device
    final = [torch.empty_like(state) for state in batch.states]
    residual = torch.full((count,), float("inf"), device=device, dtype=images.dtype)
    sweeps = torch.zeros(count, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)  # where each live image sits in `final`
    done = torch.zeros(count, dtype=torch.bool, device=device)  # settled, yet not dropped

    retired = False
    for sweep in range(spent, schedule.sweeps + 1):
        last = sweep == schedule.sweeps
        forces = None
        if watch is not None:
            watch(sweep, batch.states)
        if last or (schedule.tolerance and sweep and sweep % schedule.check_every == 0):
            if schedule.tolerance:  # a certificate must be exact; a fixed budget needs none
                batch.refresh()
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
                forces = [rows_of(h, live) for h in forces]
                retired = True
        if schedule.kind == "red-black":
            batch.red_black(schedule.omega, forces)
        else:
            batch.synchronous(forces)
    certificate = Certificate(residual, sweeps, residual <= schedule.tolerance)
    # What the phase holds belongs to `final` only if every image was written at the very end.
    whole = not retired and bool((sweeps == sweep).all())
    if not whole:
        return Relaxed(final, certificate)
    return Relaxed(batch.states, certificate, batch.pooled, batch.current_base())


def residuals(
    network: Network, images: Tensor, states: States, *, nudge: Nudge | Push | None = None
) -> Tensor:
    """max over units of |sigma(dPhi/ds) - s| per image, (N,), at the given states."""
    with torch.no_grad():
        drive = network.pool(1, network.drive(1, images))
        batch = Phase(network, drive, states, nudge)
        return batch.residual(batch.forces())


def unit_clip(x: Tensor) -> Tensor:
    """clip(x, 0, 1), elementwise."""
    return x.clamp(0, 1)


def unrolled(
    network: Network,
    images: Tensor,
    schedule: Schedule,
    *,
    start: States | None = None,
    clip: Callable[[Tensor], Tensor] = unit_clip,
) -> States:
    """`schedule.sweeps` sweeps of the free phase that autograd can differentiate.

    The same updates as `relax` without retirement; memory grows with the sweeps.

    Args:
        network: The weights.
        images: (N, C, H, W), normalised; gradients flow to them.
        schedule: Kind, omega and number of sweeps.
        start: Where to start; zeros without it.
        clip: What keeps states in [0,1]; another one may have another slope.
    """
    a, depth = network.architecture.curvature, network.depth
    states = list(start) if start is not None else zero_states(network, images.shape[0])
    pooled = pools_at(network, states, network.pool(1, network.drive(1, images)))
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
                moved[n] = clip(states[n - 1] + omega * (clip(h / a) - states[n - 1]))
            for n, new in moved.items():
                states[n - 1] = new
                if n < depth:
                    pooled[n] = network.pool(n + 1, network.drive(n + 1, new))
    return states
