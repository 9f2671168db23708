"""Energy, residual, accuracy and a few units over sweeps, one curve per schedule."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from epdistill.runs import atomic_write

if TYPE_CHECKING:
    from epdistill.teachers.model import EPCNN
    from epdistill.teachers.schedule import Schedule

SWEEPS = 100
UNITS = 6


def trace(model: EPCNN, images: Tensor, labels: Tensor, schedule: Schedule) -> dict[str, Any]:
    """Follow a free phase sweep by sweep, in float64.

    Returns:
        Arrays over sweeps 0..T: `energy` per image (T+1, N), `residual` (T+1, N),
        `accuracy` (T+1,), and `units` (T+1, layers, `UNITS`) of the first image.
    """
    import copy

    from epdistill.teachers.energy import energy
    from epdistill.teachers.relaxation import relax, residuals

    double = copy.deepcopy(model).double()
    network, x = double.network(), double.normalise(images.double())
    seen: dict[str, list[Any]] = {"energy": [], "residual": [], "accuracy": [], "units": []}

    def watch(_: int, states: list[Tensor]) -> None:
        seen["energy"].append(energy(network, x, states).numpy())
        seen["residual"].append(residuals(network, x, states).numpy())
        right = network.answer(x, states).argmax(1) == labels
        seen["accuracy"].append(float(right.double().mean()))
        picks = []
        for state in states:
            flat = state[0].flatten()
            step = max(1, len(flat) // UNITS)
            picks.append(flat[::step][:UNITS].numpy())
        seen["units"].append(np.stack([np.resize(pick, UNITS) for pick in picks]))

    relax(network, x, schedule.with_(tolerance=0.0, precision="full"), watch=watch)
    return {name: np.stack(values) for name, values in seen.items()}


@torch.no_grad()
def draw(model: EPCNN, images: Tensor, labels: Tensor, path: Path) -> None:
    """Write the picture.

    Args:
        model: A teacher.
        images: (N, C, H, W) in [0,1].
        labels: (N,) int64.
        path: The PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from epdistill.teachers.schedule import Schedule

    schedules = {
        "synchronous (published)": Schedule("synchronous", 1.0, 0.0, SWEEPS),
        "red-black": Schedule("red-black", 1.0, 0.0, SWEEPS),
        "red-black, omega 1.3": Schedule("red-black", 1.3, 0.0, SWEEPS),
        "red-black, omega 1.5": Schedule("red-black", 1.5, 0.0, SWEEPS),
    }
    traces = {name: trace(model, images, labels, how) for name, how in schedules.items()}
    figure = Figure(figsize=(13, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    sweeps = np.arange(SWEEPS + 1)
    lowest = np.min([found["energy"].min(0) for found in traces.values()], axis=0)
    styles = ["--", "-", "-", "-."]
    for style, (name, found) in zip(styles, traces.items(), strict=True):
        above = np.median(found["energy"] - lowest, axis=1)
        axes[0, 0].semilogy(sweeps, np.maximum(above, 1e-14), style, label=name)
        axes[0, 1].semilogy(
            sweeps, np.maximum(np.median(found["residual"], axis=1), 1e-16), style, label=name
        )
        axes[0, 2].semilogy(sweeps, np.maximum(found["residual"].max(1), 1e-16), style, label=name)
        axes[1, 0].plot(sweeps, 100 * found["accuracy"], style, label=name)
    axes[0, 0].set_title("energy above the lowest seen, median image")
    axes[0, 1].set_title("residual, median image")
    axes[0, 2].set_title("residual, worst image")
    axes[1, 0].set_title("accuracy (%)")
    shown = {
        "states, synchronous": traces["synchronous (published)"],
        "states, red-black omega 1.3": traces["red-black, omega 1.3"],
    }
    for panel, (title, found) in zip((axes[1, 1], axes[1, 2]), shown.items(), strict=True):
        for layer in range(found["units"].shape[1]):
            for unit in range(UNITS):
                panel.plot(
                    sweeps, found["units"][:, layer, unit], color=f"C{layer}", linewidth=0.9,
                    label=f"layer {layer + 1}" if unit == 0 else None,
                )  # fmt: skip
        panel.set_title(title)
        panel.set_ylim(-0.02, 1.02)
    for panel in axes.flat:
        panel.set_xlabel("sweeps")
        panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    axes[1, 2].legend(fontsize=8)
    figure.suptitle(f"{len(images)} images")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    atomic_write(path, picture.getvalue())
