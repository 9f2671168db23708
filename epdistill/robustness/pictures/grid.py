"""Adversarial images of several models beside their originals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from epdistill.errors import EvaluationError
from epdistill.robustness.pictures.inputs import Array, check_models, images
from epdistill.robustness.pictures.style import (
    GREY,
    HIGHLIGHT,
    NORMAL,
    SMALL,
    house_style,
    note_below,
    panels,
    title_above,
    wrap,
)

# Inches.
_IMAGE = 0.95
_GAP = 0.08
_MODEL_GAP = 0.25
_TITLE = 0.2
_LETTERS = 12  # of a label that fit above an image

Labels = Sequence[int | str]


@house_style()
def adversarial_grid(
    clean: Any,
    labels: Labels,
    adversarial: Mapping[str, Any],
    predictions: Mapping[str, Labels],
    *,
    title: str | None = None,
) -> Figure:
    """Draw one row per image: the original, then for each model the attacked image and its change.

    Above the original stands the true label, above each attacked image what the
    model answers (bold and orange where it is wrong). Changes are drawn as
    0.5 + factor * change: grey is no change. All models share the factor, the
    largest number of two digits that clips nothing; it is stated.

    Args:
        clean: Array-like (N,C,H,W) in [0,1], C of 1 or 3.
        labels: N true labels, numbers or names.
        adversarial: By model's name, array-like (N,C,H,W) in [0,1].
        predictions: By the same names, N answers to the adversarial images, written like
            `labels`.
        title: Above the picture.

    Raises:
        EvaluationError: No model, shapes or names that do not fit, or pixels out of range.
    """
    check_models(adversarial, "adversarial images")
    originals = images(clean, "clean images")
    attacked = {
        name: images(given, f"adversarial images of {name}", originals.shape)
        for name, given in adversarial.items()
    }
    if set(predictions) != set(attacked):
        raise EvaluationError(
            f"received predictions of {sorted(predictions)}; expected those of {sorted(attacked)}: "
            "the models of the adversarial images"
        )
    truth = _texts(labels, len(originals), "labels")
    answers = {
        name: _texts(predictions[name], len(originals), f"predictions of {name}")
        for name in attacked
    }
    factor = change_factor(max(float(abs(found - originals).max()) for found in attacked.values()))
    pair = 2 * _IMAGE + _GAP
    pitch = _IMAGE + _TITLE + _GAP
    width = _IMAGE + len(attacked) * (_MODEL_GAP + pair)
    height = len(originals) * pitch
    # One panel in inches, from the top: hundreds of panels would take seconds to lay out.
    figure, (axes,) = panels(1, width, height, across=1)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    _head(axes, 0, "clean")
    _column(axes, originals, 0, truth, truth)
    for place, (name, found) in enumerate(attacked.items()):
        left = _IMAGE + _MODEL_GAP + place * (pair + _MODEL_GAP)
        axes.text(left + pair / 2, -0.22, wrap(name, pair), ha="center")
        _head(axes, left, "attacked")
        _column(axes, found, left, answers[name], truth)
        _head(axes, left + _IMAGE + _GAP, f"change x {factor:g}")
        change = (0.5 + factor * (found - originals)).clip(0, 1)
        _column(axes, change, left + _IMAGE + _GAP, None, truth)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    note_below(
        figure,
        "above the images: the true label, then each model's answer, bold if wrong\n"
        f"change x {factor:g}: grey is none",
    )
    title_above(figure, title)
    return figure


def _head(axes: Axes, left: float, text: str) -> None:
    axes.text(left + _IMAGE / 2, -0.06, text, fontsize=SMALL, ha="center")


def _column(
    axes: Axes, found: Array, left: float, texts: Sequence[str] | None, truth: Sequence[str]
) -> None:
    """Images below each other, each with its text above; what differs from the truth is marked."""
    # The longer side fills the square.
    high, wide = (_IMAGE * side / max(found.shape[2:]) for side in found.shape[2:])
    left += (_IMAGE - wide) / 2
    for place, image in enumerate(found):
        top = place * (_IMAGE + _TITLE + _GAP) + _TITLE + (_IMAGE - high) / 2
        axes.imshow(
            image.transpose(1, 2, 0) if len(image) == 3 else image[0],
            cmap="gray",
            vmin=0,
            vmax=1,
            extent=(left, left + wide, top + high, top),
            aspect="auto",
            interpolation="nearest",
        )
        axes.add_patch(
            Rectangle(
                (left, top), wide, high, fill=False, edgecolor=GREY, linewidth=0.5, clip_on=False
            )
        )
        if texts is None:
            continue
        text, wrong = texts[place], texts[place] != truth[place]
        axes.text(
            left + wide / 2,
            top - 0.05,
            text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…",
            fontsize=NORMAL,
            ha="center",
            color=HIGHLIGHT if wrong else "black",
            weight="bold" if wrong else "normal",
        )


def change_factor(largest: float) -> float:
    """The largest number of two digits by which a change of `largest` stays within 0.5."""
    if largest < 1e-9:
        return 1.0
    exact = 0.5 / largest
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    # A change of 8/255 in float32 must not cost a step of the last digit.
    return float(f"{math.floor(exact / unit + 1e-4) * unit:.2g}")


def _texts(values: Labels, n: int, what: str) -> list[str]:
    # A list of numbers, an array and a tensor all give the same texts.
    texts = [str(value) for value in np.asarray(values).tolist()]
    if len(texts) != n or not all(text.strip() for text in texts):
        raise EvaluationError(
            f"received {len(texts)} {what}; expected {n}, one number or name for each image"
        )
    return texts
