"""Accuracy with its intervals, over the radius of the attack and over sweeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from epdistill.errors import EvaluationError
from epdistill.robustness.guards import LINF, NORMS
from epdistill.robustness.pictures.inputs import Rows, accuracy, check_models, points
from epdistill.robustness.pictures.style import (
    house_style,
    legend_below,
    look,
    panels,
    title_above,
)

_SIGNS = 12  # about so many markers on a long curve


def accuracy_curves(
    curves: Mapping[str, Rows], norm: str, *, title: str | None = None, what: str = "accuracy"
) -> Figure:
    """Draw accuracy over eps with Wilson's 95 % intervals.

    Args:
        curves: By model's name, one row per radius: `eps` (on pixels in [0,1], >= 0, each once),
            `accuracy` in 0..1 and `n` (images). The rows `worst_case` of `results.json` of one
            norm fit as they are; clean accuracy is the row with `eps` 0.
        norm: `"linf"` (drawn in grey levels of 255) or `"l2"`.
        title: Above the picture.
        what: Which share of the images it is.

    Raises:
        EvaluationError: No model, no row, an unknown norm, or a value out of range.
    """
    if norm not in NORMS:
        raise EvaluationError(f"received norm {norm!r}; expected one of {', '.join(NORMS)}")
    if norm == LINF:
        label = "radius of the Linf ball (grey levels of 255)"
        return _draw(curves, "eps", 255, label, title, what)
    return _draw(curves, "eps", 1, "radius of the L2 ball (on pixels in [0,1])", title, what)


def sweep_curves(curves: Mapping[str, Rows], *, title: str | None = None) -> Figure:
    """Draw accuracy over sweeps with Wilson's 95 % intervals.

    Args:
        curves: By what is drawn (`"clean"`, `"Linf 8/255"`), one row per number of sweeps:
            `sweeps` (>= 0, each once), `accuracy` in 0..1 and `n` (images).
        title: Above the picture.

    Raises:
        EvaluationError: No curve, no row, the same sweeps twice, or a value out of range.
    """
    figure = _draw(curves, "sweeps", 1, "sweeps", title)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@house_style()
def _draw(
    curves: Mapping[str, Rows],
    key: str,
    scale: float,
    label: str,
    title: str | None,
    what: str = "accuracy",
) -> Figure:
    check_models(curves, "accuracy curves")
    figure, (axes,) = panels(1, 5.6, 3.4, across=1)
    handles = []
    for place, (name, rows) in enumerate(curves.items()):
        where = f"accuracy curve of {name}"
        found = points(rows, key, where)
        share, low, high = 100 * np.array([accuracy(row, where) for row in found.values()]).T
        style = look(place)
        every = max(1, len(found) // _SIGNS)
        # Bars and no bands: the bands of several models would hide each other.
        line = axes.errorbar(
            scale * np.array(list(found)),
            share,
            yerr=(share - low, high - share),
            errorevery=every,
            markevery=every,
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            markersize=6.5,
            markerfacecolor="none",  # equal curves (a model and its export) both show
            elinewidth=0.8,
            capsize=2.5,
        )
        handles.append(line[0])
    axes.set_xlabel(label)
    axes.set_ylabel(f"{what} (%), 95 % interval")
    axes.set_ylim(-2, 102)
    axes.grid(visible=True)
    legend_below(figure, handles, list(curves))
    title_above(figure, title)
    return figure
