"""Relaxing in bfloat16 by differences, and where that is done."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from epdistill.data import load
from epdistill.recipes import load_recipe
from epdistill.teachers import relaxation
from epdistill.teachers.architecture import Architecture, layers_for
from epdistill.teachers.learning import ep_step
from epdistill.teachers.mixed import DifferencePhase, computes_low, lowered, make_base
from epdistill.teachers.model import EPCNN
from epdistill.teachers.phase import Phase
from epdistill.teachers.relaxation import relax
from epdistill.teachers.schedule import Schedule, make_nudge
from epdistill.workflows import lessons
from epdistill.workflows.dynamics import FLOAT32, variants

SETTLE = Schedule(omega=1.3, tolerance=1e-12, sweeps=5000)
CPU = torch.device("cpu")


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on any machine: slowly where it is imitated, and with the same errors."""
    monkeypatch.setattr(relaxation, "computes_low", lambda device: True)


def float_model() -> tuple[EPCNN, torch.Tensor, torch.Tensor]:
    architecture = Architecture(3, 32, layers_for(32, width=8), 10, (0.5,) * 3, (0.25,) * 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EPCNN(architecture, Schedule(omega=1.3), init_scale=2.5)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 32, 32, generator=generator)
    return model, images, torch.randint(0, 10, (16,), generator=generator)


def test_differences_are_exact_where_nothing_changed_and_close_where_little_did() -> None:
    model, images, _ = float_model()
    network, x = model.network(), model.normalise(images)
    states = model.relax(images, Schedule(omega=1.3, tolerance=0.0, sweeps=12)).states
    drive = network.pool(1, network.drive(1, x))
    base = make_base(network, drive, states)
    generator = torch.Generator().manual_seed(2)
    for size in (0.0, 1e-3, 0.3):
        moved = [
            (s + size * (torch.rand(s.shape, generator=generator) - 0.5)).clamp(0, 1)
            for s in states
        ]
        exact = Phase(network, drive, moved, None).forces()
        phase = DifferencePhase(network, lowered(network), base, moved, None)
        with torch.no_grad():
            close = phase.forces()
        for one, other in zip(close, exact, strict=True):
            # bfloat16 keeps 8 bits of the difference. Where two maxima almost tie, the
            # rounding may pick the other one; that moves single feedbacks, not the mean.
            gap = (one - other).abs()
            assert float(gap.mean()) <= 2e-3 * size + 1e-6
        phase.refresh()
        for one, other in zip(phase.forces(), exact, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not computes_low(CPU), reason="bfloat16 is imitated here, where sums are rounded as well"
)
def test_mixed_precision_settles_and_keeps_the_gradient() -> None:
    model, images, labels = float_model()
    network, x = model.network(), model.normalise(images)
    mixed = Schedule(
        omega=1.3, tolerance=1e-5, sweeps=400, precision="mixed", check_every=10, coarse=10
    )
    nudged = mixed.with_(tolerance=0.0, sweeps=60)
    step = ep_step(network, x, labels, beta=0.5, free=mixed, nudged=nudged)
    assert bool(step.free.certificate.converged.all())
    assert float(step.free.certificate.residual.max()) <= 1e-5
    double = model.double()
    exact = SETTLE.with_(tolerance=1e-11)
    network, x = double.network(), x.double()
    rest = relax(network, x, exact, start=[s.double() for s in step.free.states])
    nudges = [
        relax(network, x, exact, start=rest.states, nudge=make_nudge(network, labels, b))
        for b in (0.5, -0.5)
    ]
    truth = ep_step(network, x, labels, beta=0.5, free=exact, nudged=exact)
    same = all(
        float((a - b).abs().max()) < 1e-6
        for a, b in zip(rest.states, truth.free.states, strict=True)
    )
    if not same:  # another equilibrium: compare with the gradient at our own
        from epdistill.teachers.learning import phi_difference
        from epdistill.teachers.phase import pools_at

        drive = network.pool(1, network.drive(1, x))
        ends = [end.states for end in nudges]
        pools = [pools_at(network, end, drive) for end in ends]
        weights, _ = phi_difference(network, x, *ends, *pools)
        wanted = [-w / (2 * 0.5 * len(x)) for w in weights]
    else:
        wanted = list(truth.gradients.weights)
    for found, goal in zip(step.gradients.weights, wanted, strict=True):
        cosine = float((found.double() * goal).sum() / (found.double().norm() * goal.norm()))
        assert cosine > 0.99


@pytest.mark.usefixtures("low")
def test_mixed_precision_retires_without_harm() -> None:
    model, images, _ = float_model()
    mixed = Schedule(
        omega=1.3, tolerance=1e-5, sweeps=400, precision="mixed", check_every=5, coarse=5
    )
    relaxed = model.relax(images, mixed)
    assert bool(relaxed.certificate.converged.all())
    assert relaxed.certificate.sweeps.unique().numel() > 1
    from epdistill.teachers.relaxation import residuals

    again = residuals(model.network(), model.normalise(images), relaxed.states)
    assert float(again.max()) <= 2e-5


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(),
    reason="reads the flags of an x86 processor under Linux",
)
def test_it_is_done_where_the_processor_says_that_it_can() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert computes_low(CPU) == bool(flags & {"avx512_bf16", "amx_tile"})


@pytest.mark.parametrize(
    ("machine", "flag"),
    [
        ("x86_64", "_is_avx512_bf16_supported"),
        ("AMD64", "_is_amx_tile_supported"),
        ("aarch64", "_is_mkldnn_bf16_supported"),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_each_kind_of_processor_is_asked_in_its_own_way(
    machine: str, flag: str, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: says and name == flag)
    asked = "_is_mkldnn_bf16_supported"
    # AVX-512 alone is enough for oneDNN to say yes; on x86 that must not count.
    monkeypatch.setattr(torch.ops.mkldnn, asked, lambda: says or flag != asked)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert computes_low.__wrapped__(CPU) is says
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert computes_low.__wrapped__(CPU) is False


def test_elsewhere_it_is_float32_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = float_model()
    network, x = model.network(), model.normalise(images)
    full = Schedule(omega=1.3, tolerance=1e-5, sweeps=100)

    def gradients(schedule: Schedule) -> tuple[torch.Tensor, ...]:
        nudged = schedule.with_(tolerance=0.0, sweeps=10)
        return ep_step(network, x, labels, beta=0.5, free=schedule, nudged=nudged).gradients.weights

    wanted = gradients(full)
    by_differences = full.with_(precision="mixed")
    for can, same in ((False, True), (True, False)):
        monkeypatch.setattr(relaxation, "computes_low", lambda device, can=can: can)
        found = gradients(by_differences)
        assert all(map(torch.equal, found, wanted)) is same


@pytest.mark.parametrize("can", [True, False])
def test_teaching_says_so_and_the_bench_leaves_it_out(
    can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaxation, "computes_low", lambda device: can)
    recipe = load_recipe("digits", {"teacher.channels": [4, 6], "precision": "bfloat16"}, {})
    told: list[str] = []
    lessons.lesson_for(recipe, load("digits", limit=96), CPU, torch.float32, told.append)
    assert len(told) == (0 if can else 1)
    assert all("relaxing in float32" in line for line in told)
    model, _, _ = float_model()
    names = [variant.name for variant in variants(model.network(), 1e-4)]
    assert (names == [FLOAT32]) is not can
