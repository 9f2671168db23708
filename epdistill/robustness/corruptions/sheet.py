"""One picture of all corruptions of one image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions.blocks import corrupt
from epdistill.robustness.corruptions.registry import EXTRA, MAIN, SEVERITIES
from epdistill.runs import atomic_write

_TILE = 96  # the least side of an enlarged image, in pixels
_GAP = 6
_TEXT = 18
_LABELS = 190  # room for the names at the left
_HEAD = 34


def contact_sheet(image: Tensor, path: Path, *, seed: int) -> None:
    """Draw the clean image and its 19 corruptions at 5 severities, and write a PNG file.

    One row per type, the clean image first in each for comparison; the four extras
    stand below a line. Images are enlarged by whole factors, without smoothing.

    Args:
        image: (C,H,W) uint8, C of 1 or 3, H and W at least 8.
        path: The PNG file to write, atomically.
        seed: Of the noise.

    Raises:
        EvaluationError: The image does not fit.
    """
    if image.ndim != 3:
        raise EvaluationError(
            f"received an image of shape {tuple(image.shape)}; expected (C,H,W) uint8"
        )
    names = (*MAIN, *EXTRA)
    rows = [
        [image, *(corrupt(image[None], name, s, seed=seed)[0] for s in SEVERITIES)]
        for name in names
    ]
    factor = max(1, -(-_TILE // max(image.shape[1:])))
    high, wide = (factor * side + _GAP for side in image.shape[1:])
    size = (_LABELS + wide * (1 + len(SEVERITIES)), _HEAD + high * len(rows) + 2 * _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_TEXT)
    for column, head in enumerate(("clean", *(f"severity {s}" for s in SEVERITIES))):
        middle = _LABELS + column * wide + (wide - _GAP) // 2
        draw.text((middle, _HEAD // 2), head, fill="black", font=font, anchor="mm")
    for number, (name, tiles) in enumerate(zip(names, rows, strict=True)):
        top = _HEAD + number * high + (_GAP if number >= len(MAIN) else 0)
        draw.text(
            (_LABELS - 10, top + (high - _GAP) // 2),
            name.replace("_", " "),
            fill="black",
            font=font,
            anchor="rm",
        )
        for column, tile in enumerate(tiles):
            sheet.paste(_enlarged(tile, factor), (_LABELS + column * wide, top))
    line = _HEAD + len(MAIN) * high
    draw.line((10, line, size[0] - 10, line), fill="grey", width=1)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    atomic_write(path, file.getvalue())


def _enlarged(image: Tensor, factor: int) -> Image.Image:
    """(C,H,W) uint8 as an RGB picture, each pixel repeated `factor` times along both axes."""
    colour = image.cpu().expand(3, -1, -1).movedim(0, 2).to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(colour.repeat(factor, 0).repeat(factor, 1)))
