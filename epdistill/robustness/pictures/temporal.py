"""The temporal sweep: how long the attack looks ahead against how long the model settles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from epdistill.robustness.pictures.cells import frame_cells, heat_maps
from epdistill.robustness.pictures.inputs import check_models, check_names, matrix
from epdistill.robustness.pictures.style import house_style, note_below, title_above

_ACROSS = 3


@house_style()
def temporal_heat_map(
    panels: Mapping[str, Any],
    attack_horizons: Sequence[int | str],
    prediction_horizons: Sequence[int | str],
    *,
    title: str | None = None,
) -> Figure:
    """Draw robust accuracy over attack horizon (rows) and prediction horizon (columns).

    A frame marks the lowest accuracy of each column: what an attacker who may
    choose the horizon leaves of each predictor, if one choice serves all images.

    Args:
        panels: By panel's title (a radius, a model), array-like (A,P): accuracy in 0..1, NaN
            where nothing was measured.
        attack_horizons: A labels: sweeps that the gradient goes through, or a word
            (`"implicit"`).
        prediction_horizons: P labels: sweeps after which the model answers, or a word
            (`"settled"`).
        title: Above the picture.

    Raises:
        EvaluationError: No panel, no horizon, a wrong shape, or a value out of range.
    """
    check_models(panels, "temporal sweeps")
    rows, columns = [str(h) for h in attack_horizons], [str(h) for h in prediction_horizons]
    check_names(rows, "attack horizons")
    check_names(columns, "prediction horizons")
    values = {
        name: matrix(given, len(rows), len(columns), f"accuracies of {name}")
        for name, given in panels.items()
    }
    figure, axes = heat_maps(
        values,
        rows,
        columns,
        cell=(0.56, 0.36),
        label="prediction horizon (sweeps)",
        across=_ACROSS,
    )
    for panel, found in zip(axes, values.values(), strict=True):
        # A column without any measurement has infinity here, which no cell equals.
        lowest = np.where(np.isnan(found), np.inf, found).min(axis=0)
        frame_cells(panel, list(zip(*np.nonzero(found == lowest), strict=True)))
    for panel in axes[::_ACROSS]:
        panel.set_ylabel("attack horizon (sweeps)")
    note_below(figure, "framed: the lowest of each column")
    title_above(figure, title)
    return figure
