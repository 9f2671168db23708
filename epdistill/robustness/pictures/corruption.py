"""Accuracy by corruption and severity, one panel per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from epdistill.errors import EvaluationError
from epdistill.robustness.pictures.cells import heat_maps
from epdistill.robustness.pictures.inputs import (
    Array,
    Rows,
    check_models,
    check_names,
    count,
    share,
)
from epdistill.robustness.pictures.style import house_style, title_above

_GAP = 0.25  # cells

Cells = dict[tuple[str, int], float]


@house_style()
def corruption_heat_map(
    models: Mapping[str, Rows],
    *,
    clean: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw accuracy for each model, corruption and severity, with the means.

    A mean is over all corruptions shown and has a number only if the model was
    measured on every one of them; extras have a mean of their own. A cell that
    was not measured holds a dash.

    Args:
        models: By model's name, rows with `corruption` (text), `severity` (>= 1), `accuracy` in
            0..1 and, if true, `extra` (set apart below the others), each pair of the first two
            once; the rows `corruptions` of `results.json` fit, one family at a time.
        clean: Accuracy on clean images in 0..1 by model's name, shown under the name.
        title: Above the picture.

    Raises:
        EvaluationError: No model, no row, the same pair twice, or a value out of range.
    """
    check_models(models, "corruption accuracies")
    read = {name: _read(name, rows) for name, rows in models.items()}
    kinds = list(dict.fromkeys(kind for cells in read.values() for kind, _ in cells))
    severities = sorted({severity for cells in read.values() for _, severity in cells})
    extras = {
        row["corruption"] for rows in models.values() for row in rows if row.get("extra", False)
    }
    groups = {
        "mean": [kind for kind in kinds if kind not in extras],
        "mean of extras": [kind for kind in kinds if kind in extras],
    }
    labels: list[str] = []
    tops: list[float] = []
    top = 0.0
    for mean, group in groups.items():
        if group:
            labels += [*(kind.replace("_", " ") for kind in group), mean]
            tops += [*(top + row for row in range(len(group))), top + len(group) + _GAP]
            top = tops[-1] + 1 + 2 * _GAP
    columns = [*map(str, severities), "mean"]
    lefts = [*range(len(severities)), len(severities) + _GAP]
    figure, _ = heat_maps(
        {
            _head(name, clean or {}): _values(cells, list(groups.values()), severities)
            for name, cells in read.items()
        },
        labels,
        columns,
        cell=(0.42, 0.23),
        label="severity",
        across=4,
        starts=(tops, lefts),
    )
    title_above(figure, title)
    return figure


def _read(name: str, rows: Rows) -> Cells:
    where = f"corruptions of {name}"
    cells: Cells = {}
    for row in rows:
        kind = row.get("corruption")
        check_names([kind], "corruptions")
        key = (str(kind), count(row, "severity", where))
        if key in cells:
            raise EvaluationError(
                f"{where}: received {key[0]} at severity {key[1]} twice; expected each pair once"
            )
        cells[key] = share(row, "accuracy", where)
    if not cells:
        raise EvaluationError(f"{where}: received no rows; expected at least one corruption")
    return cells


def _values(cells: Cells, groups: Sequence[Sequence[str]], severities: Sequence[int]) -> Array:
    blocks = []
    for group in filter(None, groups):
        block = np.array([[cells.get((kind, s), np.nan) for s in severities] for kind in group])
        # A plain mean of NaN is NaN: a mean over fewer corruptions would not compare.
        block = np.vstack([block, block.mean(axis=0)])
        blocks.append(np.column_stack([block, block.mean(axis=1)]))
    return np.vstack(blocks)


def _head(name: str, clean: Mapping[str, float]) -> str:
    if name not in clean:
        return name
    return f"{name}\nclean {100 * share(clean, name, 'clean accuracy'):.1f} %"
