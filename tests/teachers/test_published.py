"""The synchronous dynamics are the published ones: states and gradients to 1e-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from epdistill.teachers.architecture import Architecture, LayerSpec, layers_for
from epdistill.teachers.energy import Network
from epdistill.teachers.learning import ep_step
from epdistill.teachers.reference import reference_relax
from epdistill.teachers.relaxation import relax
from epdistill.teachers.schedule import Schedule

VECTORS = Path(__file__).parent / "ep_vectors.npz"
TOLERANCE = 1e-10


def synchronous(sweeps: int) -> Schedule:
    return Schedule("synchronous", 1.0, 0.0, sweeps)


def load_family(family: str) -> tuple[Network, dict[str, torch.Tensor]]:
    with np.load(VECTORS) as archive:
        arrays = {
            key.removeprefix(f"{family}."): torch.from_numpy(archive[key])
            for key in archive
            if key.startswith(f"{family}.")
        }
    layers = layers_for(32, channels=[4, 5, 6, 7])
    weights = [arrays[f"W{n}"] for n in range(1, 5)]
    biases = [arrays[f"b{n}"] for n in range(1, 5)]
    if family == "mse":
        layers = (*layers, LayerSpec(10, kernel=1, padding=0, pool="none"))
        weights.append(arrays["W5"].view(10, 7, 1, 1))
        biases.append(arrays["b5"])
        readout = (None, None)
    else:
        readout = (arrays["W5"], arrays["b5"])
    architecture = Architecture(
        3, 32, layers, 10, (0.0,) * 3, (1.0,) * 3,
        readout="mse" if family == "mse" else "cross-entropy",
    )  # fmt: skip
    return Network(architecture, tuple(weights), tuple(biases), *readout), arrays


def same(states: list[torch.Tensor], arrays: dict[str, torch.Tensor], prefix: str) -> None:
    for n, state in enumerate(states, start=1):
        expected = arrays[f"{prefix}.s{n}"].flatten(1)
        torch.testing.assert_close(state.flatten(1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["ce", "mse"])
@pytest.mark.parametrize("sweeps", [1, 2, 5, 40])
def test_free_phase(family: str, sweeps: int) -> None:
    network, arrays = load_family(family)
    same(relax(network, arrays["x"], synchronous(sweeps)).states, arrays, f"free{sweeps}")


@pytest.mark.parametrize("family", ["ce", "mse"])
def test_reference_is_the_published_code_too(family: str) -> None:
    network, arrays = load_family(family)
    states = reference_relax(network, arrays["x"], 40)
    same(states, arrays, "free40")
    beta = float(arrays["beta"])
    nudged = reference_relax(network, arrays["x"], 8, beta=beta, labels=arrays["y"], start=states)
    same(nudged, arrays, "plus8")


@pytest.mark.parametrize("family", ["ce", "mse"])
@pytest.mark.parametrize("estimator", ["symmetric", "one-sided"])
def test_nudged_phases_and_estimators(family: str, estimator: str) -> None:
    network, arrays = load_family(family)
    step = ep_step(
        network,
        arrays["x"],
        arrays["y"],
        beta=float(arrays["beta"]),
        free=synchronous(40),
        nudged=synchronous(8),
        estimator=estimator,  # type: ignore[arg-type]
        bounded=False,
    )
    assert step.plus is not None
    same(step.plus.states, arrays, "plus8")
    if estimator == "symmetric":
        assert step.minus is not None
        same(step.minus.states, arrays, "minus8")
    key = {"symmetric": "symmetric", "one-sided": "onesided"}[estimator]
    weights, biases = list(step.gradients.weights), list(step.gradients.biases)
    if family == "ce":
        assert step.gradients.readout_weight is not None
        assert step.gradients.readout_bias is not None
        weights.append(step.gradients.readout_weight)
        biases.append(step.gradients.readout_bias)
    assert len(weights) == 5
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        for name, found in (("W", weight), ("b", bias)):
            expected = arrays[f"grad.{key}.{name}{n}"]
            torch.testing.assert_close(found.flatten(), expected.flatten(), atol=TOLERANCE, rtol=0)
