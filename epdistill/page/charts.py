"""Line charts as inline SVG: no script, colours from the page's style, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 24, 36
LOOKS = 7
DASHES = ("", "6 3", "2 3", "8 3 2 3")
MARKED = 40  # points up to which each has a dot
TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: In the legend.
        points: (x, y) in the order in which they are joined; what is not finite is left out.
        band: (low, high) for each point: an interval around the line; or nothing.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()


def chart(
    title: str, series: Sequence[Series], *, x: str, percent: bool = False, log: bool = False
) -> str:
    """A figure with its legend; empty text where there is nothing to draw.

    Args:
        title: Above it, with the unit of what is drawn.
        series: The lines.
        x: What runs along the horizontal axis.
        percent: The values are shares, shown in percent between 0 and 100.
        log: The vertical axis counts powers of ten; what is not above 0 is left out.
    """
    drawn = [_finite(line, log) for line in series]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    across = [point[0] for line in drawn for point in line.points]
    up = [value for line in drawn for value in _heights(line)]
    x_low, x_high = min(across), max(across)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = (0.0, 1.0) if percent else _span(min(up), max(up), log)
    if percent and min(up) > 0.5:
        y_low = math.floor(10 * min(up) - 1e-9) / 10

    def place(point: tuple[float, float]) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return (
            LEFT + wide * (point[0] - x_low) / (x_high - x_low),
            TOP + high * (1 - (point[1] - y_low) / (y_high - y_low)),
        )

    parts = [f'<text class="title" x="2" y="13">{escape(title)}</text>']
    for value in powers(y_low, y_high) if log else ticks(y_low, y_high):
        _, y = place((x_low, value))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        text = f"{100 * value:.0f}" if percent else f"{10**value:.0e}" if log else f"{value:.4g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    bottom = HEIGHT - BOTTOM
    for value in ticks(x_low, x_high):
        at, _ = place((value, y_low))
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{value:.4g}</text>'
        )
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    for number, line in enumerate(drawn):
        parts.append(_line(line, number, place, percent, log))
    words = "; ".join(f"{line.name}: {_shown(line.points[-1][1], percent, log)}" for line in drawn)
    label = escape(f"{title} over {x}; last values: {words}")
    return (
        f'<figure><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>{legend(drawn)}</figure>'
    )


def legend(series: Sequence[Series]) -> str:
    """What the lines are; nothing for a single one, whose title says it."""
    if len(series) < 2:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 30 12" class="s{number % LOOKS}" aria-hidden="true">'
        f'<path class="curve"{_dash(number)} d="M1 6H29"/></svg> {escape(line.name)}</li>'
        for number, line in enumerate(series)
    )
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, about five of them."""
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = []
    while first * step <= high + 1e-9 * step:
        found.append(round(first * step, 12))
        first += 1
    return found


def powers(low: float, high: float) -> list[float]:
    """Logarithms of round numbers between two ends: powers of ten, with 2 and 5 where few."""
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    whole = range(math.floor(low), math.ceil(high) + 1)
    found = [power + math.log10(factor) for power in whole for factor in factors]
    return [value for value in found if low - 1e-9 <= value <= high + 1e-9]


def _line(line: Series, number: int, place: object, percent: bool, log: bool) -> str:
    at = [place(point) for point in line.points]  # type: ignore[operator]
    parts = [f'<g class="s{number % LOOKS}">']
    if line.band:
        ends = list(zip(line.points, line.band, strict=True))
        over = [place((point[0], high)) for point, (_, high) in ends]  # type: ignore[operator]
        under = [place((point[0], low)) for point, (low, _) in reversed(ends)]  # type: ignore[operator]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*over, *under])
        parts.append(f'<polygon class="band" points="{corners}"/>')
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    parts.append(f'<path class="curve"{_dash(number)} d="M{path}"/>')
    if len(at) <= MARKED:
        for (x, y), point in zip(at, line.points, strict=True):
            tip = f"{line.name}: {_shown(point[1], percent, log)} at {point[0]:.4g}"
            parts.append(
                f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
                f"<title>{escape(tip)}</title></circle>"
            )
    return "".join([*parts, "</g>"])


def _dash(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _shown(value: float, percent: bool, log: bool) -> str:
    if percent:
        return f"{100 * value:.1f} %"
    return f"{10**value:.2g}" if log else f"{value:.4g}"


def _finite(line: Series, log: bool) -> Series:
    kept = [
        place
        for place, (x, y) in enumerate(line.points)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    ]
    points = [line.points[place] for place in kept]
    if log:
        points = [(x, math.log10(y)) for x, y in points]
    return Series(line.name, points, [line.band[place] for place in kept] if line.band else ())


def _heights(line: Series) -> list[float]:
    return [point[1] for point in line.points] + [end for ends in line.band for end in ends]


def _span(low: float, high: float, log: bool) -> tuple[float, float]:
    """The ends of the vertical axis: from 0 where that is near, else with a little room."""
    if log:
        return math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return (low if low == 0 else low - room), high + room
