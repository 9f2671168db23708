"""Relaxing on a GPU without waiting for Python: sweeps recorded once, then replayed.

A sweep is some forty small operations, and Python takes longer to ask for them than a GPU to
do them. Here the sweeps of a batch size are recorded in a CUDA graph that reads and writes
tensors of its own; a relaxation copies in what it starts from, replays, and copies out. What
is computed is what `epdistill.teachers.relaxation` computes: the same updates in the same
order, the same certificate; settled images, once their state is taken, go on relaxing until
half of the recording can be left behind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.teachers import fused
from epdistill.teachers.architecture import LayerSpec
from epdistill.teachers.energy import Network, Pooled, States, zero_states
from epdistill.teachers.phase import Phase, pooled_rows, pools_at, rows_of
from epdistill.teachers.schedule import Certificate, Nudge, Relaxed, Schedule

# Free, pulled and pushed phases of training; of validation and attacks, halved as images settle.
KEPT = 24
# A recording before which nothing has run would record what only the first run does.
REHEARSALS = 2


def rounded(count: int) -> int:
    """The batch size that is recorded for `count` images: 1, 2, 3, 4, 6, 8, 12, 16, ...

    Attacks and last batches come in any size; each size that is recorded takes time and memory.
    """
    size = 1
    while size < count:
        between = size + size // 2
        if size > 1 and count <= between:
            return between
        size *= 2
    return size


class FusedPhase(Phase):
    """A phase whose pools and updates are single kernels where there are any."""

    def __init__(
        self,
        network: Network,
        drive: Pooled,
        states: States,
        nudge: Nudge | None,
        pooled: list[Pooled],
        turned: list[Tensor | None],
    ) -> None:
        self.turned = turned
        super().__init__(network, drive, states, nudge, pooled)

    def look(self, n: int) -> Pooled:
        """P(u_n) at the current s_{n-1}."""
        layer = self.network.architecture.layers[n - 1]
        if layer.pool != "max":
            return super().look(n)
        weight, bias = self.network.weights[n - 1], self.network.biases[n - 1]
        u = F.conv2d(self.states[n - 2], weight, None, layer.stride, layer.padding)
        return fused.pool(u, bias)

    def from_above(self, n: int) -> Tensor:
        """The feedback to layer n, as a plain convolution where it is one."""
        layer, weight = self.network.architecture.layers[n], self.turned[n]
        if layer.pool == "max":
            top = fused.unpool(self.states[n], self.pooled[n])
        else:
            top = self.network.unpool(n + 1, self.states[n], self.pooled[n])
        if weight is None:
            return self.network.feedback(n + 1, top, self.states[n - 1].shape[2:])
        return F.conv2d(top, weight, padding=layer.kernel - 1 - layer.padding)

    def red_black(self, omega: float, forces: States | None) -> None:
        """One sweep; layers of a half do not touch each other, so they may move one by one."""
        depth, a = self.network.depth, self.network.architecture.curvature
        for half in (range(1, depth + 1, 2), range(2, depth + 1, 2)):
            for n in half:
                if n == depth:
                    self.move(n, self.force(n), omega)
                    continue
                below, state = self.pooled[n - 1].value, self.states[n - 1]
                self.states[n - 1] = fused.settle(self.from_above(n), below, state, a, omega)
                self.pooled[n] = self.look(n + 1)


def turned(weight: Tensor) -> Tensor:
    """The kernel whose convolution is the transposed one of `weight`, at stride 1.

    Libraries convolve faster than they transpose: twice as fast on an H100.
    """
    return weight.flip(2, 3).transpose(0, 1)


def turns(layer: LayerSpec) -> bool:
    """Whether the layer's transposed convolution is a plain one of the turned kernel."""
    return layer.stride == 1 and layer.padding < layer.kernel


@lru_cache(maxsize=16)
def _pool(device: torch.device) -> Any:
    """Memory for what recordings make in passing: nothing of it is read after a replay."""
    return torch.cuda.graph_pool_handle()


def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work` as a CUDA graph; itself on other devices. It must only touch tensors that stay."""
    if device.type != "cuda":
        return work
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(REHEARSALS):
                work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, as NCCL's, may ask the card meanwhile.
        with torch.cuda.graph(graph, pool=_pool(device), capture_error_mode="thread_local"):
            work()
    replay: Callable[[], None] = graph.replay
    return replay


def _parameters(network: Network) -> list[Tensor]:
    parts = (*network.weights, *network.biases, network.readout_weight, network.readout_bias)
    return [part for part in parts if part is not None]


def _copy(mine: Pooled, one: Pooled) -> None:
    """A pooled map into the first rows of another."""
    size = len(one.value)
    mine.value[:size].copy_(one.value)
    if mine.index is not None and one.index is not None:
        mine.index[:size].copy_(one.index)


class Recorded:
    """Sweeps of one batch size, kind of phase and schedule, and the tensors they work on.

    Args:
        network: For shapes, dtype and device; `load` copies the weights.
        count: Images, at most.
        kind: As in `Schedule`.
        omega: As in `Schedule`.
        nudge: An example of the nudge, or None.
    """

    def __init__(
        self, network: Network, count: int, kind: str, omega: float, nudge: Nudge | None
    ) -> None:
        self.count, self.kind, self.omega = count, kind, omega
        weights = tuple(torch.empty_like(weight) for weight in network.weights)
        biases = tuple(torch.empty_like(bias) for bias in network.biases)
        readout = [
            None if part is None else torch.empty_like(part)
            for part in (network.readout_weight, network.readout_bias)
        ]
        self.network = Network(network.architecture, weights, biases, *readout)
        self.turned: list[Tensor | None] = [
            turned(weight).contiguous(memory_format=torch.channels_last)
            if n and turns(layer)
            else None
            for n, (layer, weight) in enumerate(
                zip(network.architecture.layers, network.weights, strict=True)
            )
        ]
        self.states = zero_states(network, count)
        self.pooled: list[Pooled] = []
        self.nudge = None if nudge is None else self._own(nudge)
        self.gap = torch.zeros(count, dtype=weights[0].dtype, device=weights[0].device)
        self._runs: dict[int, Callable[[], None]] = {}
        self._look: Callable[[], None] | None = None

    def _own(self, nudge: Nudge) -> Nudge:
        """A nudge whose numbers can be changed between replays."""
        like = self.network.weights[0]

        def number(value: float | Tensor) -> Tensor:
            return torch.as_tensor(value, dtype=like.dtype, device=like.device).clone()

        target = like.new_zeros((self.count, nudge.target.shape[1]))
        return Nudge(number(nudge.beta), target, number(nudge.bound) if nudge.bound else 0.0)

    def load(
        self, network: Network, start: States | None, pooled: list[Pooled], nudge: Nudge | None
    ) -> None:
        """Copy in what the next replays work on; rows beyond the batch keep what they have."""
        self._load_weights(network)
        size = len(pooled[0].value)
        if not self.pooled:
            self.pooled = [self._buffer(one) for one in pooled]
        for mine, one in zip(self.pooled, pooled, strict=True):
            _copy(mine, one)
        for n, state in enumerate(self.states):
            if start is None:
                state[:size].zero_()
            else:
                state[:size].copy_(start[n])
        if self.nudge is not None and nudge is not None:
            self.nudge.target[:size].copy_(nudge.target)
            for number, value in ((self.nudge.beta, nudge.beta), (self.nudge.bound, nudge.bound)):
                if isinstance(number, Tensor):
                    number.fill_(value)

    def _load_weights(self, network: Network) -> None:
        for own, theirs in zip(_parameters(self.network), _parameters(network), strict=True):
            own.copy_(theirs)
        for mine, weight in zip(self.turned, network.weights, strict=True):
            if mine is not None:
                mine.copy_(turned(weight))

    def _buffer(self, one: Pooled) -> Pooled:
        def like(tensor: Tensor) -> Tensor:
            shape = (self.count, *tensor.shape[1:])
            return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).contiguous(
                memory_format=torch.channels_last
            )

        return one.map(like)

    def _phase(self) -> Phase:
        return FusedPhase(
            self.network, self.pooled[0], self.states, self.nudge, self.pooled, self.turned
        )

    def _sweep(self, times: int) -> None:
        phase = self._phase()
        for _ in range(times):
            if self.kind == "red-black":
                phase.red_black(self.omega, None)
            else:
                phase.synchronous(None)
        for state, new in zip(self.states, phase.states, strict=True):
            state.copy_(new)
        for mine, one in zip(self.pooled[1:], phase.pooled[1:], strict=True):
            _copy(mine, one)

    def _measure(self) -> None:
        phase = self._phase()
        self.gap.copy_(phase.residual(phase.forces()))

    def _kept(self, work: Callable[[], None]) -> Callable[[], None]:
        """A recording of `work` that leaves the present tensors as they are."""
        held = [*self.states, *(one.value for one in self.pooled[1:])]
        held += [one.index for one in self.pooled[1:] if one.index is not None]
        before = [tensor.clone() for tensor in held]
        recorded = record(work, self.gap.device)
        for tensor, old in zip(held, before, strict=True):
            tensor.copy_(old)
        return recorded

    def sweep(self, times: int) -> None:
        """So many sweeps."""
        if times not in self._runs:
            self._runs[times] = self._kept(lambda: self._sweep(times))
        self._runs[times]()

    def residual(self, size: int) -> Tensor:
        """max |sigma(dPhi/ds) - s| of the first `size` images, (size,); overwritten by the next."""
        if self._look is None:
            self._look = self._kept(self._measure)
        self._look()
        return self.gap[:size]

    def taken(self, count: int, drive: Pooled) -> tuple[States, list[Pooled]]:
        """The states of the first `count` images, and P(u_1)..P(u_L) at them; copies."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor[:count].clone()

        pools = [one.map(copy) for one in self.pooled[1:]]
        return [copy(state) for state in self.states], [drive, *pools]


_recorded: OrderedDict[tuple[Any, ...], Recorded] = OrderedDict()


def recorded_for(network: Network, count: int, schedule: Schedule, nudge: Nudge | None) -> Recorded:
    """The recording for such a batch, made now or kept from before."""
    weight = network.weights[0]
    key = (
        network.architecture, rounded(count), schedule.kind, schedule.omega, weight.dtype,
        weight.device, None if nudge is None else bool(nudge.bound),
        # A recording keeps the convolutions that were chosen when it was made.
        torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    if key not in _recorded:
        while len(_recorded) >= KEPT:
            _recorded.popitem(last=False)
        _recorded[key] = Recorded(network, rounded(count), schedule.kind, schedule.omega, nudge)
    _recorded.move_to_end(key)
    return _recorded[key]


_allowed = True


@contextmanager
def unrecorded() -> Iterator[None]:
    """No replays while a `with` lasts: what watches single operations does not see theirs."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def allowed() -> bool:
    """Whether sweeps may be replayed now."""
    return _allowed


def forget() -> None:
    """Free all recordings and their memory."""
    _recorded.clear()


@torch.no_grad()
def relax_recorded(
    network: Network,
    drive: Pooled,
    schedule: Schedule,
    *,
    nudge: Nudge | None = None,
    start: States | None = None,
    pooled: list[Pooled] | None = None,
) -> Relaxed:
    """What `epdistill.teachers.relaxation.relax` does, replayed; precision is the weights' own.

    Args:
        network: The weights.
        drive: P(u_1) of the images.
        schedule: How, how far and for how long.
        nudge: None for a free phase.
        start: States to start from; zeros without it.
        pooled: P(u_1)..P(u_L) at `start` if they are at hand.
    """
    count, device = len(drive.value), drive.value.device
    if pooled is None:
        pooled = pools_at(network, start or zero_states(network, count), drive)
    own = recorded_for(network, count, schedule, nudge)
    own.load(network, start, pooled, nudge)
    sweeps = torch.full((count,), schedule.sweeps, dtype=torch.int64, device=device)
    if not schedule.tolerance:
        own.sweep(schedule.sweeps)
        gap = own.residual(count).clone()
        states, pools = own.taken(count, drive)
        return Relaxed(states, Certificate(gap, sweeps, gap <= 0), pools)
    final = [torch.zeros_like(state[:count]) for state in own.states]
    residual = torch.full_like(own.gap[:count], float("inf"))
    rows = None  # where each image of the recording sits in `final`; in order without it
    done = torch.zeros(count, dtype=torch.bool, device=device)
    spent = 0
    while True:
        step = min(schedule.check_every, schedule.sweeps - spent)
        own.sweep(step)
        spent += step
        size = len(done)
        gap, present = own.residual(size), [state[:size] for state in own.states]
        last = spent == schedule.sweeps
        write = ~done if last else (gap <= schedule.tolerance) & ~done
        done = done | write
        # To ask more often is to wait more often.
        left, whole = torch.stack([(~done).sum(), write.all().long()]).tolist()
        if whole and rows is None:
            states, pools = own.taken(count, drive)
            return Relaxed(states, _certificate(gap.clone(), sweeps.fill_(spent), schedule), pools)
        for target, value in (
            (residual, gap),
            (sweeps, torch.full_like(sweeps[:size], spent)),
            *zip(final, present, strict=True),
        ):
            _put(target, rows, write, value)
        if not left:
            return Relaxed(final, _certificate(residual, sweeps, schedule))
        if 2 * rounded(left) <= own.count:
            live = (~done).nonzero().squeeze(1)
            own, nudge = _smaller(own, live, network, schedule, nudge)
            rows = live if rows is None else rows[live]
            done = done[live]


def _certificate(residual: Tensor, sweeps: Tensor, schedule: Schedule) -> Certificate:
    return Certificate(residual, sweeps, residual <= schedule.tolerance)


def _put(target: Tensor, rows: Tensor | None, mask: Tensor, value: Tensor) -> None:
    """Write the images of `value` (N, ...) where `mask` (N,) says so into rows of `target`."""
    chosen = mask.view(-1, *[1] * (value.ndim - 1))
    if rows is None:
        target.copy_(torch.where(chosen, value, target))
    else:
        target[rows] = torch.where(chosen, value, target[rows])


def _smaller(
    own: Recorded, live: Tensor, network: Network, schedule: Schedule, nudge: Nudge | None
) -> tuple[Recorded, Nudge | None]:
    """The images still relaxing in a recording of their number; costs a copy of them."""
    if nudge is not None:
        nudge = replace(nudge, target=nudge.target[live])
    new = recorded_for(network, len(live), schedule, nudge)
    states = [rows_of(state, live) for state in own.states]
    new.load(network, states, [pooled_rows(one, live) for one in own.pooled], nudge)
    return new, nudge
