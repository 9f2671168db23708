"""Properties of energy, relaxation and gradients over random small networks, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from epdistill.errors import RecipeError
from epdistill.teachers.architecture import Architecture, LayerSpec
from epdistill.teachers.captured import relax_recorded
from epdistill.teachers.energy import Network, energy, phi, zero_states
from epdistill.teachers.learning import ep_step
from epdistill.teachers.model import EPCNN
from epdistill.teachers.phase import Phase
from epdistill.teachers.relaxation import relax, residuals, unrolled
from epdistill.teachers.schedule import Schedule, make_nudge

SETTLE = Schedule(omega=1.3, tolerance=1e-12, sweeps=5000)


@st.composite
def networks(draw: st.DrawFn) -> tuple[EPCNN, torch.Tensor, torch.Tensor]:
    """A random EP-CNN of one to four layers, with images and labels that fit it."""
    size = draw(st.integers(8, 13))
    depth = draw(st.integers(1, 4))
    layers, side = [], size
    for _ in range(depth):
        layer = LayerSpec(
            channels=draw(st.integers(1, 4)),
            kernel=draw(st.sampled_from([1, 2, 3])),
            stride=draw(st.sampled_from([1, 1, 2])),
            padding=draw(st.integers(0, 1)),
            pool=draw(st.sampled_from(["max", "average", "none"])),
        )
        if layer.padding >= layer.kernel or layer.out_size(side) < 1:
            layer = LayerSpec(channels=layer.channels, pool="none")
        layers.append(layer)
        side = layer.out_size(side)
    readout = draw(st.sampled_from(["cross-entropy", "mse"]))
    classes = draw(st.integers(2, 4))
    if readout == "mse":
        layers.append(LayerSpec(classes, kernel=side, padding=0, pool="none"))
    architecture = Architecture(
        draw(st.sampled_from([1, 3])), size, tuple(layers), classes,
        (0.4,) * 3, (0.3,) * 3, draw(st.sampled_from(["half", "unit"])), readout,
    )  # fmt: skip
    channels = architecture.in_channels
    architecture = Architecture(
        channels, size, architecture.layers, classes, (0.4,) * channels, (0.3,) * channels,
        architecture.activation, readout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**20)))
        model = EPCNN(architecture, SETTLE, init_scale=draw(st.floats(0.5, 3.0))).double()
        images = torch.rand(3, channels, size, size, dtype=torch.float64)
        labels = torch.randint(0, classes, (3,))
    return model, images, labels


@settings(max_examples=60, deadline=None)
@given(networks(), st.floats(0.05, 1.95), st.sampled_from([0.0, 0.5, -0.5, 2.0]))
def test_energy_never_rises(
    case: tuple[EPCNN, torch.Tensor, torch.Tensor], omega: float, beta: float
) -> None:
    model, images, labels = case
    network, x = model.network(), model.normalise(images)
    if network.readout_weight is None and beta < 0:
        # -beta times a square would leave the last layer's energy without a minimum
        # only where |beta| reaches the curvature; stay well inside.
        beta = -0.25 * model.architecture.curvature
    seen: list[torch.Tensor] = []
    relax(
        network, x, Schedule(omega=omega, tolerance=0.0, sweeps=25),
        nudge=make_nudge(network, labels, beta) if beta else None,
        watch=lambda _, states: seen.append(energy(network, x, states, beta=beta, labels=labels)),
    )  # fmt: skip
    energies = torch.stack(seen)
    assert energies.shape == (26, 3)
    rise = (energies[1:] - energies[:-1]).max()
    assert rise <= 1e-13 * (1 + energies.abs().max())


@settings(max_examples=40, deadline=None)
@given(networks())
def test_forces_are_the_autograd_of_phi(case: tuple[EPCNN, torch.Tensor, torch.Tensor]) -> None:
    model, images, _ = case
    network, x = model.network(), model.normalise(images)
    generator = torch.Generator().manual_seed(1)
    states = [
        torch.rand(s.shape, generator=generator, dtype=s.dtype).requires_grad_()
        for s in zero_states(network, 3)
    ]
    expected = torch.autograd.grad(phi(network, x, states).sum(), states)
    drive = network.pool(1, network.drive(1, x))
    with torch.no_grad():
        forces = Phase(network, drive, [s.detach() for s in states], None).forces()
    for force, wanted in zip(forces, expected, strict=True):
        torch.testing.assert_close(force, wanted, atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    networks(),
    st.sampled_from([
        Schedule(omega=1.3, tolerance=0.0, sweeps=7),
        Schedule(omega=1.0, tolerance=1e-3, sweeps=200, check_every=1),
        Schedule(omega=1.4, tolerance=1e-9, sweeps=25, check_every=10),
        Schedule(kind="synchronous", omega=1.0, tolerance=0.0, sweeps=9),
    ]),
    st.sampled_from([0.0, 0.5, -0.5]),
)  # fmt: skip
def test_replayed_sweeps_are_the_same_relaxation(
    case: tuple[EPCNN, torch.Tensor, torch.Tensor], schedule: Schedule, beta: float
) -> None:
    model, images, labels = case
    network, x = model.network(), model.normalise(images)
    nudge = make_nudge(network, labels, beta) if beta else None
    start = relax(network, x, schedule.with_(tolerance=0.0, sweeps=2)).states if beta else None
    expected = relax(network, x, schedule, nudge=nudge, start=start)
    drive = network.pool(1, network.drive(1, x))
    found = relax_recorded(network, drive, schedule, nudge=nudge, start=start)
    for state, other in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(state, other, rtol=0, atol=1e-12)
    ours, theirs = found.certificate, expected.certificate
    assert ours.sweeps.tolist() == theirs.sweeps.tolist()
    for one in (ours, theirs):
        assert torch.equal(one.converged, one.residual <= schedule.tolerance)
    # At a tolerance of 0 a residual of 0 or of one rounding decides; elsewhere both must agree.
    clear = (theirs.residual - schedule.tolerance).abs() > 1e-12
    assert torch.equal(ours.converged[clear], theirs.converged[clear])
    torch.testing.assert_close(ours.residual, theirs.residual, rtol=0, atol=1e-12)
    assert (found.pooled is None) == (expected.pooled is None)


def small_model(seed: int = 0) -> EPCNN:
    layers = (LayerSpec(6), LayerSpec(8), LayerSpec(8, padding=0))
    architecture = Architecture(1, 16, layers, 4, (0.5,), (0.25,))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EPCNN(architecture, SETTLE, init_scale=2.5).double()


def inputs(count: int = 12, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (count,), generator=generator)


def test_certificate_tells_the_truth() -> None:
    model = small_model()
    images, _ = inputs()
    relaxed = model.relax(images)
    assert bool(relaxed.certificate.converged.all())
    again = residuals(model.network(), model.normalise(images), relaxed.states)
    torch.testing.assert_close(again, relaxed.certificate.residual, atol=1e-14, rtol=0)
    short = model.relax(images, SETTLE.with_(sweeps=3))
    assert not bool(short.certificate.converged.any())
    assert bool((short.certificate.sweeps == 3).all())


def test_retiring_images_changes_nothing() -> None:
    model = small_model()
    images, _ = inputs()
    together = model.relax(images, SETTLE.with_(tolerance=1e-8))
    assert together.certificate.sweeps.unique().numel() > 1, "all retired at once: no test"
    for index in range(len(images)):
        alone = model.relax(images[index : index + 1], SETTLE.with_(tolerance=1e-8))
        assert int(alone.certificate.sweeps) == int(together.certificate.sweeps[index])
        for whole, single in zip(together.states, alone.states, strict=True):
            torch.testing.assert_close(whole[index : index + 1], single, atol=1e-10, rtol=0)


def test_a_warm_start_from_the_state_returns_it() -> None:
    model = small_model()
    images, _ = inputs()
    x = model.normalise(images)
    settled = model.relax(images)
    again = relax(model.network(), x, SETTLE, start=settled.states)
    assert bool((again.certificate.sweeps <= SETTLE.check_every).all())
    for before, after in zip(settled.states, again.states, strict=True):
        torch.testing.assert_close(before, after, atol=1e-10, rtol=0)


def test_the_curvature_bound_keeps_the_fixed_points() -> None:
    model = small_model()
    images, labels = inputs()
    network, x = model.network(), model.normalise(images)
    start = model.relax(images).states
    found = [
        relax(
            network, x, SETTLE, start=start,
            nudge=make_nudge(network, labels, 0.01, bounded=bounded),
        )
        for bounded in (True, False)
    ]  # fmt: skip
    assert make_nudge(network, labels, 0.01).bound > 0
    for one, other in zip(found[0].states, found[1].states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_input_gradients_agree() -> None:
    """Implicit, unrolled and finite differences: one gradient."""
    model = small_model()
    images, labels = inputs(4)

    def gradient(view: EPCNN) -> torch.Tensor:
        x = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(F.cross_entropy(view(x), labels, reduction="sum"), x)
        return found

    implicit = gradient(model)
    assert model.adjoint_residual is not None
    assert float(model.adjoint_residual.max()) <= 1e-10
    for kind in ("unrolled-last", "unrolled-first"):
        unrolled = gradient(model.with_gradient(kind, 400))  # type: ignore[arg-type]
        torch.testing.assert_close(unrolled, implicit, atol=1e-8, rtol=1e-6)
    estimated = gradient(model.with_gradient("ep", 400, beta=1e-4))
    torch.testing.assert_close(estimated, implicit, atol=1e-7, rtol=1e-5)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    step = 1e-6
    with torch.no_grad():
        up = F.cross_entropy(model(images + step * direction), labels, reduction="sum")
        down = F.cross_entropy(model(images - step * direction), labels, reduction="sum")
    slope = (up - down) / (2 * step)
    torch.testing.assert_close(slope, (implicit * direction).sum(), rtol=1e-4, atol=1e-7)


def test_input_gradients_agree_for_a_settling_output() -> None:
    """The mse readout sends its slope into two layers; EP and implicit agree there too."""
    layers = (LayerSpec(4), LayerSpec(6), LayerSpec(3, kernel=2, padding=0, pool="none"))
    architecture = Architecture(1, 8, layers, 3, (0.4,), (0.3,), "half", "mse")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = EPCNN(architecture, SETTLE, init_scale=2.0).double()
        images = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    found = []
    for view in (model, model.with_gradient("ep", 400, beta=1e-4)):
        x = images.clone().requires_grad_()
        found += torch.autograd.grad(view(x)[:, 0].sum(), x)
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)


def test_an_estimated_gradient_in_float32_points_where_the_implicit_one_does() -> None:
    """At the default force; an image that no loss pulls at has no gradient."""
    model = small_model().float()
    images = inputs(8)[0].float()
    found = []
    for view in (model, model.with_gradient("ep")):
        x = images.clone().requires_grad_()
        found += torch.autograd.grad(view(x)[1:, 0].sum(), x)
    assert not found[1][0].any()
    cosine = F.cosine_similarity(found[0][1:].flatten(1), found[1][1:].flatten(1))
    assert float(cosine.min()) > 0.9


def test_ep_gradient_is_the_gradient_through_the_equilibrium() -> None:
    """Property 3: the symmetric estimator at small beta against autograd through the unroll."""
    model = small_model()
    images, labels = inputs(6)
    x = model.normalise(images)
    network = model.network()
    step = ep_step(network, x, labels, beta=1e-4, free=SETTLE, nudged=SETTLE)
    weights = tuple(w.clone().requires_grad_() for w in network.weights)
    biases = tuple(b.clone().requires_grad_() for b in network.biases)
    assert network.readout_weight is not None
    readout = network.readout_weight.clone().requires_grad_()
    live = Network(model.architecture, weights, biases, readout, network.readout_bias)
    # The same schedule: another omega may reach another equilibrium.
    states = unrolled(live, x, SETTLE.with_(sweeps=300))
    mean_loss = F.cross_entropy(live.logits(states[-1]), labels)
    expected = torch.autograd.grad(mean_loss, [*weights, *biases, readout])
    found = [*step.gradients.weights, *step.gradients.biases, step.gradients.readout_weight]
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert float(other.norm()) > 0
        assert float((one - other).norm() / other.norm()) < 1e-4


def test_float32_images_and_batches_of_one() -> None:
    model = small_model().float()
    images, _ = inputs(1)
    assert model(images.float()).shape == (1, 4)


@pytest.mark.parametrize("change", [{"omega": 2.0}, {"omega": 0.0}, {"kind": "x"}, {"sweeps": 0}])
def test_impossible_schedules_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Schedule(**change)  # type: ignore[arg-type]
