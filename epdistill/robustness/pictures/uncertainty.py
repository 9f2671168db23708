"""The uncertainty exponent: how fast doubt about the basin vanishes with the perturbation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from epdistill.errors import EvaluationError
from epdistill.robustness.intervals import wilson
from epdistill.robustness.pictures.inputs import Array, array, check_models, count, number
from epdistill.robustness.pictures.style import house_style, legend_below, look, panels, title_above


@dataclass(frozen=True)
class _Fit:
    eps: Array  # (E,) ascending
    fraction: Array  # (E,)
    low: Array  # (E,)
    high: Array  # (E,)
    line: tuple[float, float] | None  # alpha and intercept
    words: str


@house_style()
def uncertainty_plot(
    series: Mapping[str, Mapping[str, Any]], *, title: str | None = None
) -> Figure:
    """Draw the uncertain fraction f over eps on log-log with the fitted power law.

    f(eps) ~ eps^alpha (McDonald, Grebogi, Ott, Yorke, Physica D 17, 1985). A
    fraction of 0 has no place on a logarithmic axis: it is drawn as Wilson's upper
    bound with an arrow down, or left out where no `n` tells the bound.

    Args:
        series: By model's name:
            `eps` (E,) > 0, each once;
            `f` (E,) in 0..1, the share of perturbed inputs that end elsewhere;
            `n` (optional), over how many inputs each share was taken: gives Wilson's bars;
            `alpha` (optional, None where there is no exponent), the fitted slope;
            `intercept` (with `alpha`), natural logarithm of f at eps = 1 by the fit;
            `ci95` (optional), alpha's 95 % interval (low, high), shown in the legend.
        title: Above the picture.

    Raises:
        EvaluationError: No model, lengths that differ, or a value out of range.
    """
    check_models(series, "uncertain fractions")
    fits = {name: _read(name, row) for name, row in series.items()}
    figure, (axes,) = panels(1, 5.6, 3.4, across=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    handles = [_draw(axes, fit, place) for place, fit in enumerate(fits.values())]
    shown = np.concatenate([np.append(fit.fraction, fit.high) for fit in fits.values()])
    shown = shown[shown > 0]
    # All zero and nothing known about n: an empty panel still says so in the legend.
    lowest, highest = (float(shown.min()), float(shown.max())) if len(shown) else (0.1, 1.0)
    axes.set_ylim(0.4 * lowest, min(1.3, 2.5 * highest))
    radii = np.concatenate([fit.eps for fit in fits.values()])
    axes.set_xlim(0.8 * radii.min(), 1.25 * radii.max())
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        # Within two decades the powers of ten alone would leave an axis almost without numbers.
        subs = (1.0,) if math.log10(high / low) > 2 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.grid(visible=True)
    axes.set_xlabel("size of the perturbation, eps")
    axes.set_ylabel("uncertain fraction f")
    legend_below(figure, handles, [f"{name}: {fit.words}" for name, fit in fits.items()])
    title_above(figure, title)
    return figure


def _draw(axes: Axes, fit: _Fit, place: int) -> Line2D:
    style = look(place)
    middle = np.where(fit.fraction > 0, fit.fraction, np.nan)
    axes.errorbar(
        fit.eps,
        middle,
        yerr=np.stack([middle - fit.low, fit.high - middle]),
        linestyle="none",
        marker=style.marker,
        color=style.colour,
        markersize=6.5,
        markerfacecolor="none",
        elinewidth=0.8,
        capsize=2.5,
    )
    bound = (fit.fraction == 0) & (fit.high > 0)
    axes.errorbar(
        fit.eps[bound],
        fit.high[bound],
        yerr=0.35 * fit.high[bound],
        uplims=True,
        fmt="_",
        markersize=9,
        color=style.colour,
    )
    if fit.line is not None:
        x = np.geomspace(fit.eps.min(), fit.eps.max(), 60)
        y = math.exp(fit.line[1]) * x ** fit.line[0]
        axes.plot(x, y, color=style.colour, linestyle=style.dash)
    # The legend shows marker and line as one.
    return Line2D(
        [],
        [],
        color=style.colour,
        linestyle=style.dash if fit.line else "none",
        marker=style.marker,
        markersize=6.5,
        markerfacecolor="none",
    )


def _read(name: str, row: Mapping[str, Any]) -> _Fit:
    where = f"uncertain fractions of {name}"
    for key in ("eps", "f"):
        if key not in row:
            raise EvaluationError(f"{where}: received no {key!r}; expected a list of numbers")
    eps, fraction = array(row["eps"], f"{where}: eps"), array(row["f"], f"{where}: f")
    if eps.ndim != 1 or not len(eps) or eps.shape != fraction.shape:
        raise EvaluationError(
            f"{where}: received eps of shape {eps.shape} and f of shape {fraction.shape}; expected "
            "two lists of one length, at least 1"
        )
    sound = np.isfinite(eps).all() and eps.min() > 0 and len(set(eps.tolist())) == len(eps)
    if not sound or not ((fraction >= 0) & (fraction <= 1)).all():
        raise EvaluationError(
            f"{where}: received eps = {eps.tolist()} and f = {fraction.tolist()}; expected each "
            "eps once and above 0, and f in 0..1"
        )
    order = np.argsort(eps)
    eps, fraction = eps[order], fraction[order]
    low = high = fraction
    if row.get("n") is not None:
        n = count(row, "n", where)
        low, high = np.array([wilson(round(float(f) * n), n) for f in fraction]).T
    if row.get("alpha") is None:
        return _Fit(eps, fraction, low, high, None, "no exponent")
    alpha, intercept = number(row, "alpha", where), number(row, "intercept", where)
    words = f"alpha = {alpha:.2f}"
    if row.get("ci95") is not None:
        ends = array(row["ci95"], f"{where}: ci95")
        if ends.shape != (2,) or not np.isfinite(ends).all() or ends[0] > ends[1]:
            raise EvaluationError(
                f"{where}: received ci95 = {row['ci95']!r}; expected two finite numbers, "
                "low <= high"
            )
        words += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    return _Fit(eps, fraction, low, high, (alpha, intercept), words)
