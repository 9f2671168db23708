"""The picture of a benchmark: milliseconds per image, one bar per contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epdistill.robustness.pictures.style import (
    COLOURS,
    GREY,
    SMALL,
    house_style,
    note_below,
    panels,
    save,
    title_above,
)

_WIDTH, _BAR = 4.2, 0.34  # inches: of a panel, and of a bar's row


def draw(content: dict[str, Any], stem: Path) -> None:
    """Write `<stem>.png` and `<stem>.svg`.

    Args:
        content: The content of bench.json.
        stem: Their path without ending.
    """
    sizes = sorted({row["batch_size"] for row in content["rows"]})
    hardware = content["hardware"]
    with house_style():
        height = _BAR * len(content["contenders"]) + 0.2
        figure, axes = panels(len(sizes), _WIDTH, height, across=2, gap=(0.7, 0.6))
        for place, (panel, size) in enumerate(zip(axes, sizes, strict=True)):
            rows = [row for row in content["rows"] if row["batch_size"] == size]
            names = [row["name"] for row in rows]
            low, middle, high = (
                [1e3 * row["seconds_per_batch"][key] / size for row in rows]
                for key in ("q25", "median", "q75")
            )
            spread = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            heights = range(len(rows))
            colours = [COLOURS[number % len(COLOURS)] for number in heights]
            panel.barh(heights, middle, 0.62, xerr=spread, color=colours, ecolor=GREY)
            for number, value, end in zip(heights, middle, high, strict=True):
                panel.text(end * 1.12, number, f"{value:.3g}", va="center", fontsize=SMALL)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_minor_formatter(lambda value, _: "")
            panel.set_xlim(min(low) / 2, max(high) * 3)
            panel.set_yticks(heights, names if place % 2 == 0 else [""] * len(names))
            panel.invert_yaxis()
            panel.set_title(f"batch {size}")
            panel.set_xlabel("ms per image (median, quartiles)")
            panel.grid(axis="x")
        title_above(figure, str(content["models"]))
        note_below(
            figure,
            f"{hardware['cpu']}, {hardware['torch_threads']} thread(s), torch "
            f"{hardware['torch']}, onnxruntime {hardware['onnxruntime']}",
        )
    save(figure, stem)
