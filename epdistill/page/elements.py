"""Pieces of the page: everything that comes from outside is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: As shown.
        value: What it is sorted by, where the text is not.
        kind: Its CSS classes.
    """

    text: str
    value: float | None = None
    kind: str = ""


def share(found: Mapping[str, Any]) -> Cell:
    """Accuracy in percent with its 95 % interval, from a row of results.json."""
    low, high = (100 * float(end) for end in found["ci95"])
    accuracy = float(found["accuracy"])
    return Cell(f"{100 * accuracy:.1f} ({low:.1f}\N{EN DASH}{high:.1f})", accuracy)


def percent(value: float, digits: int = 1) -> Cell:
    """A share in percent."""
    return Cell(f"{100 * value:.{digits}f} %", value)


def number(value: float, shown: str) -> Cell:
    """A number, written as `shown`."""
    return Cell(shown, value)


def table(
    name: str, head: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, stack: bool = False
) -> str:
    """A table that sorts by a click on a head, and scrolls by itself where it is too wide.

    Args:
        name: What it shows, for those who do not see it.
        head: The columns' names.
        rows: As many cells each.
        stack: On a phone each row becomes a block: for tables of words.
    """
    words = [any(_of_words(row[place]) for row in rows) for place in range(len(head))]
    top = "".join(
        f'<th scope="col"{_kind("words" if left else "")}>{escape(text)}</th>'
        for text, left in zip(head, words, strict=True)
    )
    labels = list(head) if stack else [""] * len(head)
    body = "".join(f"<tr>{''.join(map(_cell, row, labels))}</tr>" for row in rows)
    kind = "sortable stack" if stack else "sortable"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
        f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _of_words(cell: Cell | str) -> bool:
    return isinstance(cell, str) or bool(cell.kind)


def _cell(cell: Cell | str, label: str) -> str:
    if isinstance(cell, str):
        cell = Cell(cell, kind="words")
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    told = f' data-l="{escape(label)}"' if label else ""
    return f"<td{_kind(cell.kind)}{value}{told}>{escape(cell.text)}</td>"


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def section(anchor: str, title: str, *parts: str) -> str:
    """A part of the page with a heading that can be linked to."""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_kind(kind)}>{escape(text)}</p>"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def commands(lines: Sequence[str]) -> str:
    """Commands to be typed, one below the other."""
    # Lines break between words only: half a flag is no flag.
    shown = (" ".join(f"<span>{escape(word)}</span>" for word in line.split(" ")) for line in lines)
    return f"<pre><code>{chr(10).join(shown)}</code></pre>"


def picture(image: Tensor, text: str) -> str:
    """An image (C,H,W) in [0,1] as an inline PNG; `text` says what it shows."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    code = base64.b64encode(file.getvalue()).decode()
    _, height, width = image.shape
    return (
        f'<img class="pixels" width="{width}" height="{height}" alt="{escape(text)}" '
        f'src="data:image/png;base64,{code}">'
    )


def letters(names: Sequence[str]) -> dict[str, str]:
    """A letter for every name: A, B, ..., Z, A2, ..."""
    marks = (f"{chr(65 + place % 26)}{'' if place < 26 else place // 26 + 1}" for place in count())
    return dict(zip(names, marks, strict=False))
