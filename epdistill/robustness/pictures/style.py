"""The house style of pictures, and the one way to write them.

Everything is drawn under matplotlib's own defaults with a few changes: a user's
matplotlibrc changes nothing, nothing of ours stays behind, and equal input gives
equal bytes. No pyplot: it keeps global state.

Panels have a size in inches; their texts spill over the figure's edges, and `save`
writes whatever was drawn. So nothing is cut off, however long the names are.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epdistill.errors import EvaluationError
from epdistill.runs import atomic_write

DPI = 150
SMALL, NORMAL, LARGE = 8.0, 9.5, 11.0  # points
GREY = "#666666"

# Okabe and Ito's palette (Color Universal Design, 2008) without its yellow, which
# is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HIGHLIGHT = COLOURS[1]
# Seven colours, eight markers and five dashes: two models share a whole look only after 280.
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (6, 2, 1.5, 2)),
    (0, (1.5, 1.5)),
    (0, (9, 2.5)),
)

# Keys are Any: newer matplotlibs type them as literals, older ones as text.
_OURS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.labelsize": NORMAL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": NORMAL,
    # matplotlib brings the first along; the others are for readers of an SVG who lack it.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "font.size": NORMAL,
    "grid.alpha": 0.3,
    "legend.fontsize": NORMAL,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "epdistill",  # otherwise element ids are random
    "text.parse_math": False,  # a dollar sign in a model's name is a dollar sign
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}


@dataclass(frozen=True)
class Look:
    """How one model is drawn in every picture: told apart without colour too."""

    colour: str
    marker: str
    dash: Any


def look(number: int) -> Look:
    """The look of the model with this number, counted from 0."""
    return Look(
        COLOURS[number % len(COLOURS)],
        MARKERS[number % len(MARKERS)],
        DASHES[number % len(DASHES)],
    )


@contextmanager
def house_style() -> Iterator[None]:
    """The house's matplotlib configuration, for as long as the block lasts."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", _OURS]):
        # Names in a script that the font lacks are drawn as boxes, which is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def panels(
    count: int,
    width: float,
    height: float,
    *,
    across: int,
    gap: tuple[float, float] = (0.0, 0.0),
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` empty panels, row by row.

    Args:
        count: At least 1.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        across: Panels in a row.
        gap: Inches between two panels of a row, and between two rows.
    """
    pitch = width + gap[0], height + gap[1]
    down = math.ceil(count / across)
    whole = min(across, count) * pitch[0] - gap[0], down * pitch[1] - gap[1]
    figure = Figure(figsize=whole)
    axes = []
    for place in range(count):
        row, column = divmod(place, across)
        left, bottom = column * pitch[0], whole[1] - height - row * pitch[1]
        box = (left / whole[0], bottom / whole[1], width / whole[0], height / whole[1])
        axes.append(figure.add_axes(box))
    return figure, axes


def wrap(text: str, inches: float, size: float = NORMAL) -> str:
    """Break each line of a text into lines of about `inches`; only spaces get lost."""
    letters = max(1, int(inches / (0.0085 * size)))  # 0.6 em, DejaVu's mean
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, letters))


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend below all that is drawn.

    Args:
        figure: With everything but title and legend.
        handles: What matplotlib draws beside each name.
        names: As many.
    """
    width, height = figure.get_size_inches()
    texts = [wrap(name, width - 1) for name in names]
    widest = max(len(line) for text in texts for line in text.split("\n"))
    # matplotlib leaves out names that begin with an underscore: they are put in afterwards.
    legend = figure.legend(
        list(handles),
        [f"model {number}" for number in range(len(texts))],
        loc="upper center",
        bbox_to_anchor=(0.5, (figure.get_tightbbox().y0 - 0.05) / height),
        ncols=min(len(texts), max(1, int(width / (0.0085 * NORMAL * widest + 0.8)))),
        handlelength=3.2,
        columnspacing=1.5,
    )
    for drawn, text in zip(legend.get_texts(), texts, strict=True):
        drawn.set_text(text)


def note_below(figure: Figure, text: str) -> None:
    """Write a small remark below all that is drawn."""
    bottom = (figure.get_tightbbox().y0 - 0.1) / figure.get_size_inches()[1]
    figure.text(0, bottom, text, fontsize=SMALL, color=GREY, va="top")


def title_above(figure: Figure, title: str | None) -> None:
    """Write a title above all that is drawn; None writes nothing."""
    if title:
        width, height = figure.get_size_inches()
        top = (figure.get_tightbbox().y1 + 0.12) / height
        text = wrap(title, max(width, 3), LARGE)
        figure.text(0.5, top, text, fontsize=LARGE, ha="center", va="bottom")


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write a figure as `<stem>.png` (150 dots per inch) and `<stem>.svg`, each atomically.

    The files hold no date and no version, so the same figure gives the same bytes.
    In the SVG, text is text.

    Args:
        figure: What one of the picture functions returned.
        stem: The files' path without ending; its folder is made if missing.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        EvaluationError: The files cannot be written there.
    """
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    paths = []
    for ending, metadata in (("png", {"Software": None}), ("svg", nothing)):
        content = io.BytesIO()
        with house_style():
            figure.savefig(
                content,
                format=ending,
                dpi=DPI,
                bbox_inches="tight",
                pad_inches=0.1,
                metadata=metadata,
            )
        path = stem.with_name(f"{stem.name}.{ending}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content.getvalue())
        except OSError as error:
            raise EvaluationError(
                f"the picture {path} cannot be written ({error}); expected a folder that can be "
                "written to: name another one"
            ) from error
        paths.append(path)
    return paths[0], paths[1]
