"""What the pictures refuse: checked before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epdistill.errors import EvaluationError
from epdistill.robustness.intervals import wilson

Rows = Sequence[Mapping[str, Any]]
Array = NDArray[np.float64]


def check_models(models: Mapping[str, Any], what: str) -> None:
    """Refuse an empty mapping, and names that cannot be shown.

    Raises:
        EvaluationError: No entry, or a name that is not a non-empty line of text.
    """
    if not isinstance(models, Mapping) or not models:
        raise EvaluationError(
            f"received no {what} to draw; expected a mapping from each model's name to its "
            "results, with at least one model"
        )
    check_names(list(models), "models")


def check_names(names: Sequence[Any], what: str) -> None:
    """Refuse names that are empty, not text, or of several lines.

    Raises:
        EvaluationError: One of the names cannot be shown.
    """
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise EvaluationError(
                f"received the name {name!r} among the {what}; expected one line of text: rename it"
            )


def number(row: Mapping[str, Any], key: str, where: str) -> float:
    """The finite number `row[key]`.

    Raises:
        EvaluationError: It is missing, not a number, or not finite.
    """
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{where}: received {_shown(row)} without a number {key!r}; expected one in each row"
        ) from error
    if not math.isfinite(value):
        raise EvaluationError(f"{where}: received {key} = {value}; expected a finite number")
    return value


def share(row: Mapping[str, Any], key: str, where: str) -> float:
    """The number `row[key]` in 0..1.

    Raises:
        EvaluationError: It is missing, not a number, or outside 0..1.
    """
    value = number(row, key, where)
    if not 0 <= value <= 1:
        raise EvaluationError(
            f"{where}: received {key} = {value:g}; expected a share in 0..1: divide percentages "
            "by 100"
        )
    return value


def count(row: Mapping[str, Any], key: str, where: str) -> int:
    """The whole number `row[key]`, at least 1.

    Raises:
        EvaluationError: It is missing, not whole, or too small.
    """
    value = number(row, key, where)
    if value != int(value) or value < 1:
        raise EvaluationError(
            f"{where}: received {key} = {value:g}; expected a whole number of at least 1"
        )
    return int(value)


def points(rows: Rows, key: str, where: str) -> dict[float, Mapping[str, Any]]:
    """The rows by their number `row[key]`, ascending.

    Raises:
        EvaluationError: No row, a number below 0, or the same one twice.
    """
    found: dict[float, Mapping[str, Any]] = {}
    for row in rows:
        value = number(row, key, where)
        if value < 0 or value in found:
            raise EvaluationError(
                f"{where}: received {key} = {value:g} {'twice' if value in found else ''}; "
                "expected each once, and none below 0"
            )
        found[value] = row
    if not found:
        raise EvaluationError(f"{where}: received no rows; expected at least one")
    return dict(sorted(found.items()))


def accuracy(row: Mapping[str, Any], where: str) -> tuple[float, float, float]:
    """The row's `accuracy` and the ends of Wilson's 95 % interval on its `n` images.

    Raises:
        EvaluationError: One of the two is missing or out of range.
    """
    value, n = share(row, "accuracy", where), count(row, "n", where)
    return value, *wilson(round(value * n), n)


def matrix(values: Any, rows: int, columns: int, what: str) -> Array:
    """Shares as an array (rows, columns) float64; NaN where nothing was measured.

    Raises:
        EvaluationError: Another shape, no number at all, or a number outside 0..1.
    """
    found = array(values, what)
    if found.shape != (rows, columns):
        raise EvaluationError(
            f"received {what} of shape {found.shape}; expected ({rows}, {columns}): one row and "
            "one column for each label"
        )
    known = found[~np.isnan(found)]
    if not len(known):
        raise EvaluationError(f"received {what} without any number; expected at least one cell")
    if known.min() < 0 or known.max() > 1:
        raise EvaluationError(
            f"received {what} in {known.min():g}..{known.max():g}; expected shares in 0..1 (NaN "
            "for what was not measured): divide percentages by 100"
        )
    return found


def array(values: Any, what: str) -> Array:
    """Anything array-like as float64.

    Raises:
        EvaluationError: It cannot be read as numbers.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"received {what} that are not an array of numbers ({type(values).__name__}); "
            "expected lists, a NumPy array or a CPU tensor without gradient"
        ) from error


def images(values: Any, what: str, shape: tuple[int, ...] | None = None) -> Array:
    """Images (N,C,H,W) in [0,1] with C of 1 or 3, as float64.

    Args:
        values: Array-like.
        what: How the message calls them.
        shape: The only shape allowed, if there is one.

    Raises:
        EvaluationError: Wrong shape or range, or NaN.
    """
    found = array(values, what)
    if found.ndim != 4 or 0 in found.shape or found.shape[1] not in (1, 3):
        raise EvaluationError(
            f"received {what} of shape {found.shape}; expected (N,1,H,W) or (N,3,H,W) with N >= 1"
        )
    if shape is not None and found.shape != shape:
        raise EvaluationError(
            f"received {what} of shape {found.shape}; expected {shape}, as the clean images"
        )
    # Attacks may leave [0,1] by float32's rounding; NaN fails both comparisons.
    if not (found.min() >= -1e-6 and found.max() <= 1 + 1e-6):
        raise EvaluationError(
            f"received {what} with pixels in {found.min():g}..{found.max():g}; expected 0..1: "
            "divide 8-bit images by 255"
        )
    return found.clip(0, 1)


def _shown(row: object) -> str:
    text = repr(row)
    return text if len(text) <= 80 else text[:77] + "..."
