"""Transfer: adversarial images made on one model, tried on another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from epdistill.errors import EvaluationError
from epdistill.robustness.pictures.cells import frame_cells, heat_maps
from epdistill.robustness.pictures.inputs import check_names, matrix
from epdistill.robustness.pictures.style import house_style, title_above, wrap

_NAME = 2.3  # inches, about the widest line of a name
_LEVEL = 7  # letters that fit under a cell


@house_style()
def transfer_matrix(
    values: Any,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    title: str | None = None,
) -> Figure:
    """Draw the accuracies of each target under each source's images; dark is low.

    A frame marks the cells in which source and target are the same model.

    Args:
        values: Array-like (S,T) in 0..1, NaN where nothing was measured.
        sources: S names, different: the models on which the images were made.
        targets: T names, different: the models that judge them.
        title: Above the picture.

    Raises:
        EvaluationError: Bad names, a wrong shape, or a value out of range.
    """
    for names, what in ((sources, "sources"), (targets, "targets")):
        check_names(names, what)
        if not names or len(set(names)) < len(names):
            raise EvaluationError(
                f"received {what} named {list(names)}; expected at least one, with different names"
            )
    found = matrix(values, len(sources), len(targets), "transfers")
    rows, columns = ([wrap(name, _NAME) for name in names] for names in (sources, targets))
    figure, (axes,) = heat_maps(
        {"": found}, rows, columns, cell=(0.62, 0.42), label="tried on (target)"
    )
    if max(map(len, columns)) > _LEVEL:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", va="top", rotation_mode="anchor")
    same = [(sources.index(name), targets.index(name)) for name in sources if name in targets]
    frame_cells(axes, same)
    axes.set_ylabel("made on (source)")
    title_above(figure, title)
    return figure
