"""EP, BPTT and the implicit gradient agree; tipped images; health."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epdistill.augment import Augmentation
from epdistill.data import DataSet, load
from epdistill.errors import DivergedError, RecipeError
from epdistill.recipes import load_recipe
from epdistill.teachers.architecture import Architecture, LayerSpec
from epdistill.teachers.health import Watch, collapsed_layers
from epdistill.teachers.learning import ep_step, tipped_images, tipped_weights
from epdistill.teachers.model import EPCNN
from epdistill.teachers.rules import bptt_step, implicit_step
from epdistill.teachers.schedule import Schedule
from epdistill.teachers.teach import TeachTask, build_teacher
from epdistill.teachers.theorem import check_theorem
from epdistill.training import fit

SETTLE = Schedule(omega=1.3, tolerance=1e-12, sweeps=5000)


def small(readout: str = "cross-entropy") -> EPCNN:
    layers = [LayerSpec(6), LayerSpec(8, pool="average"), LayerSpec(8, padding=0)]
    if readout == "mse":
        layers.append(LayerSpec(4, kernel=1, padding=0, pool="none"))
    architecture = Architecture(1, 16, tuple(layers), 4, (0.5,), (0.25,), readout=readout)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EPCNN(architecture, SETTLE, init_scale=2.5).double()


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 1, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (count,), generator=generator)


@pytest.mark.parametrize("readout", ["cross-entropy", "mse"])
def test_three_rules_one_gradient(readout: str) -> None:
    model = small(readout)
    images, labels = inputs(6)
    network, x = model.network(), model.normalise(images)
    ep = ep_step(network, x, labels, beta=1e-4, free=SETTLE, nudged=SETTLE)
    implicit = implicit_step(network, x, labels, free=SETTLE)
    bptt = bptt_step(network, x, labels, free=SETTLE, sweeps=300)
    assert implicit.adjoint_residual is not None
    assert float(implicit.adjoint_residual.max()) <= 1e-10
    truth = implicit.gradients
    for other, bound in ((ep.gradients, 1e-5), (bptt.gradients, 1e-8)):
        pairs = [*zip(other.weights, truth.weights, strict=True)]
        pairs += zip(other.biases, truth.biases, strict=True)
        if readout == "cross-entropy":
            assert other.readout_weight is not None
            assert truth.readout_weight is not None
            pairs.append((other.readout_weight, truth.readout_weight))
        for found, wanted in pairs:
            assert float(wanted.norm()) > 0
            assert float((found - wanted).norm() / wanted.norm()) < bound


def test_check_theorem() -> None:
    model = small()
    images, labels = inputs(8)
    found = check_theorem(model, images, labels, betas=(0.5, 1e-3), time=6)
    assert found.images == 8
    assert found.synchronous_images > 0
    assert len(found.moments) == 6
    for moment in found.moments:
        assert max(moment.relative_error) < 1e-6
    # Information climbs down one layer per sweep: after one, only the top has a gradient.
    assert found.moments[0].bptt[:2] == (0.0, 0.0)
    assert found.moments[0].bptt[2] > 0
    errors = {
        (row.beta, row.parameter): row.relative_error
        for row in found.comparisons
        if row.estimator == "ep"
    }
    for name in ("weight 1", "weight 2", "weight 3", "readout"):
        assert errors[(1e-3, name)] < 1e-4 < errors[(0.5, name)]


def test_tipped_images_are_those_that_bend() -> None:
    generator = torch.Generator().manual_seed(0)
    free = [torch.rand(3, 2, 4, 4, generator=generator)]
    move = 0.01 * torch.rand(3, 2, 4, 4, generator=generator)
    plus, minus = [free[0] + move], [free[0] - move]
    tipped, span = tipped_images(free, plus, minus)
    assert tipped.tolist() == [False] * 3
    torch.testing.assert_close(span, 2 * move.flatten(1).norm(dim=1))
    plus[0][1] += 0.5
    assert tipped_images(free, plus, minus)[0].tolist() == [False, True, False]


def test_what_a_tipped_image_counts() -> None:
    tipped = torch.tensor([False, True, False, True])
    span = torch.tensor([1.0, 8.0, 2.0, 0.5])
    assert tipped_weights(tipped, span, "keep") is None
    found = [tipped_weights(tipped, span, how) for how in ("exclude", "clip")]  # type: ignore[arg-type]
    assert found[0] is not None and found[0].tolist() == [2.0, 0.0, 2.0, 0.0]
    assert found[1] is not None and found[1].tolist() == [1.0, 0.25, 1.0, 1.0]
    for every in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        assert tipped_weights(every, span, "exclude") is None


def test_excluding_tipped_images_is_leaving_them_out() -> None:
    """With one image tipped, the gradient is the mean over the others."""
    model = small()
    images, labels = inputs(24)
    network, x = model.network(), model.normalise(images)
    both = {"beta": 8.0, "free": SETTLE, "nudged": SETTLE}
    step = ep_step(network, x, labels, **both, treat_tipped="exclude")  # type: ignore[arg-type]
    assert step.tipped is not None
    keep = ~step.tipped
    assert 0 < int(keep.sum()) < 24, "the case has tipped images and others"
    rest = ep_step(network, x[keep], labels[keep], **both)  # type: ignore[arg-type]
    for found, wanted in zip(step.gradients.weights, rest.gradients.weights, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_clipping_changes_only_what_tipped_images_add() -> None:
    """The clipped gradient is linear in the images' weights."""
    model = small()
    images, labels = inputs(24)
    network, x = model.network(), model.normalise(images)
    both = {"beta": 8.0, "free": SETTLE, "nudged": SETTLE}
    kept, clipped, excluded = (
        ep_step(network, x, labels, **both, treat_tipped=how)  # type: ignore[arg-type]
        for how in ("keep", "clip", "exclude")
    )
    assert kept.tipped is not None and kept.plus is not None and kept.minus is not None
    share = int((~kept.tipped).sum()) / 24
    longest = max(g.norm() for g in kept.gradients.weights)
    for all_in, some, none in zip(
        kept.gradients.weights, clipped.gradients.weights, excluded.gradients.weights, strict=True
    ):
        others = share * none  # what the untipped images add in each of the three
        assert float((some - others).norm()) <= float((all_in - others).norm()) + 1e-12
    assert float(longest) > 0
    assert any(
        not torch.equal(a, b)
        for a, b in zip(kept.gradients.weights, clipped.gradients.weights, strict=True)
    )


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load("digits", limit=192)


def task(data: DataSet, told: list[str], **changes: object) -> TeachTask:
    recipe = load_recipe("digits", {"teacher.channels": [4, 6], **changes}, {})
    return TeachTask(build_teacher(recipe, data), recipe, data.validation, told.append)


def train(taught: TeachTask, data: DataSet, folder: Path) -> dict[str, float]:
    return fit(
        taught, data.train, folder, title="t", epochs=2, batch_size=32,
        augmentation=Augmentation(), seed=1, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["ep", "bptt", "implicit"])
def test_every_rule_teaches(rule: str, data: DataSet, tmp_path: Path) -> None:
    taught = task(data, [], **{"teacher.rule": rule, "teacher.channels": [8, 16]})
    before = taught.validate()["accuracy"]
    assert fit(
        taught, data.train, tmp_path, title="t", epochs=12, batch_size=16,
        augmentation=Augmentation(), seed=1, device=torch.device("cpu"),
    )["validation.accuracy"] > max(0.5, before)  # fmt: skip


def test_a_recipe_can_spell_out_layers_and_a_settling_output(data: DataSet, tmp_path: Path) -> None:
    layers = [
        {"channels": 8, "pool": "average"},
        {"channels": 16, "kernel": 4, "padding": 0, "pool": "none"},
        {"channels": 12, "kernel": 1, "padding": 0, "pool": "none"},
    ]
    taught = task(
        data, [],
        **{
            "teacher.layers": layers, "teacher.readout": "mse", "teacher.activation": "unit",
            "teacher.channels": None, "teacher.init_scale": 1.0, "teacher.epochs": 12,
        },
    )  # fmt: skip
    assert taught.model.architecture.shapes == [(8, 4, 4), (16, 1, 1), (12, 1, 1), (10, 1, 1)]
    assert taught.model.readout is None
    before = taught.validate()["accuracy"]
    fit(
        taught, data.train, tmp_path, title="t", epochs=25, batch_size=16,
        augmentation=Augmentation(), seed=1, device=torch.device("cpu"),
    )  # fmt: skip
    # Chance is 0.1; the squared error learns slowly on 173 images.
    assert taught.validate()["accuracy"] > max(0.3, before)


def poison(taught: TeachTask, at: int) -> None:
    """Make the parameters not finite before step `at`, once."""
    learn = taught._learn
    done = []

    def bad(batch):  # type: ignore[no-untyped-def]
        if batch.step == at and not done:
            done.append(1)
            with torch.no_grad():
                taught.model.layers[0].weight.fill_(float("nan"))  # type: ignore[operator]
        return learn(batch)

    taught._learn = bad  # type: ignore[method-assign]


def test_without_back_off_divergence_stops(data: DataSet, tmp_path: Path) -> None:
    told: list[str] = []
    taught = task(data, told)
    poison(taught, 3)
    with pytest.raises(DivergedError, match="step 4"):
        train(taught, data, tmp_path)
    assert "non-finite" in told[0]


def test_back_off_returns_to_the_last_good_state(data: DataSet, tmp_path: Path) -> None:
    told: list[str] = []
    taught = task(data, told, **{"teacher.back_off": 1})
    poison(taught, 3)
    train(taught, data, tmp_path)
    assert int(taught.backed_off) == 1
    assert any("learning rates now 0.5" in line for line in told)
    assert all(bool(torch.isfinite(p).all()) for p in taught.model.parameters())


def test_collapse_is_seen_and_told_once(data: DataSet, tmp_path: Path) -> None:
    told: list[str] = []
    taught = task(data, told, **{"teacher.init_scale": 0.01})
    with torch.no_grad():
        taught.model.layers[0].bias.fill_(-3.0)  # type: ignore[operator]
    train(taught, data, tmp_path)
    collapsed = [line for line in told if "collapsed" in line]
    assert len(collapsed) == 1
    assert "layer 1" in collapsed[0]
    healthy = [torch.rand(4, 2, 3, 3)]
    assert collapsed_layers(healthy) == []


def test_a_falling_share_of_settled_images_is_told() -> None:
    model = small()
    images, labels = inputs(4)
    network, x = model.network(), model.normalise(images)
    watch = Watch()
    good = implicit_step(network, x, labels, free=SETTLE)
    bad = implicit_step(network, x, labels, free=SETTLE.with_(sweeps=2))
    told = [trouble.name for _ in range(60) for trouble in watch.look(good)]
    assert told == []
    told = [trouble.name for _ in range(60) for trouble in watch.look(bad)]
    assert told == ["unsettled"]


def test_initial_factors_per_layer() -> None:
    architecture = small().architecture

    def weights(scale: float | list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = EPCNN(architecture, SETTLE, init_scale=scale)
        return [m.weight.detach() for m in (*model.layers, model.readout)]

    plain, depth = weights(1.0), len(architecture.layers)
    assert all(torch.equal(3 * a, b) for a, b in zip(plain[:-1], weights(3.0)[:-1], strict=True))
    assert torch.equal(plain[-1], weights(3.0)[-1])
    factors = [float(n + 2) for n in range(depth + 1)]
    for factor, a, b in zip(factors, plain, weights(factors), strict=True):
        assert torch.equal(factor * a, b)
    with pytest.raises(RecipeError, match=f"{depth} factors in init_scale for {depth + 1} layers"):
        weights(factors[:-1])
