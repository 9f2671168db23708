"""Heat maps whose cells hold readable numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from epdistill.robustness.pictures.inputs import Array
from epdistill.robustness.pictures.style import HIGHLIGHT, SMALL, panels, wrap

# Cividis is even for colour-blind eyes and orders by lightness (Nunez et al., 2018).
# Dark is always where the attacker wins.
_COLOURS = "cividis"
_UNKNOWN = "#EDEDED"
_PITCH = 2.1  # inches between two panels' left edges at least: room for head and axis label


def heat_maps(
    values: Mapping[str, Array],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    cell: tuple[float, float],
    label: str,
    across: int = 1,
    starts: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Draw accuracies as coloured cells with their percentage, one panel per matrix.

    Args:
        values: By panel's title, (R,C) in 0..1, first row on top; a NaN cell is grey and holds
            a dash.
        rows: R tick labels at the left.
        columns: C tick labels below.
        cell: Width and height of a cell in inches.
        label: Of the horizontal axis.
        across: Panels in a row.
        starts: Where each row and each column starts, ascending, in cells, when there are gaps
            between them; by default they follow each other at 0, 1, 2, ...
    """
    tops, lefts = starts or (range(len(rows)), range(len(columns)))
    width, height = cell[0] * (lefts[-1] + 1), cell[1] * (tops[-1] + 1)
    pitch = max(width + 0.35, _PITCH)
    heads = [wrap(name, pitch - 0.2) for name in values]
    lines = max(head.count("\n") + 1 for head in heads)
    gap = (pitch - width, 0.6 + 0.17 * lines)
    figure, axes = panels(len(values), width, height, across=across, gap=gap)
    for place, (panel, found) in enumerate(zip(axes, values.values(), strict=True)):
        _draw(panel, found, tops, lefts)
        panel.set_title(heads[place])
        panel.set_xlabel(label)
        panel.set_xticks([left + 0.5 for left in lefts], list(columns))
        if place % across == 0:
            panel.set_yticks([top + 0.5 for top in tops], list(rows))
        else:
            panel.set_yticks([])
    last = axes[min(across, len(axes)) - 1].get_position()
    inch = 1 / figure.get_size_inches()[0]
    bar = figure.add_axes((last.x1 + 0.15 * inch, last.y0, 0.12 * inch, last.height))
    figure.colorbar(ScalarMappable(Normalize(0, 100), _COLOURS), cax=bar, label="accuracy (%)")
    return figure, axes


def frame_cells(axes: Axes, cells: Collection[tuple[int, int]]) -> None:
    """Put heavy frames around cells, given as (row, column)."""
    for row, column in cells:
        corner = (column + 0.04, row + 0.04)
        axes.add_patch(
            Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=HIGHLIGHT, linewidth=2.2)
        )


def percent(value: float) -> str:
    """A share as a short percentage: `97.3`, `100`, and a dash for NaN."""
    if np.isnan(value):
        return "\N{EN DASH}"
    text = f"{100 * value:.1f}"
    return "100" if text == "100.0" else "0" if value == 0 else text


def _draw(axes: Axes, values: Array, tops: Sequence[float], lefts: Sequence[float]) -> None:
    scale = matplotlib.colormaps[_COLOURS]
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            value = float(values[row, column])
            face: Any = _UNKNOWN if np.isnan(value) else scale(value)
            axes.add_patch(
                Rectangle((left, top), 1, 1, facecolor=face, edgecolor="white", linewidth=1)
            )
            axes.text(
                left + 0.5,
                top + 0.5,
                percent(value),
                color="black" if np.isnan(value) else _ink(face),
                fontsize=SMALL,
                ha="center",
                va="center",
            )
    axes.set_xlim(0, lefts[-1] + 1)
    axes.set_ylim(tops[-1] + 1, 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _ink(face: tuple[float, float, float, float]) -> str:
    # Relative luminance of WCAG 2.1; at 0.18 black and white contrast about equally.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in face[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.18 else "white"
