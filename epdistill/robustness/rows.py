"""results.csv: one row per example, model and attack."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from epdistill.robustness.outcomes import Evaluation, SubjectOutcome

COLUMNS = (
    "example",
    "model",
    "attack",
    "view",
    "norm",
    "eps",
    "success",
    "queries",
    "perturbation_norm",
    "attacked",
)
Row = tuple[Any, ...]


def csv_text(evaluation: Evaluation) -> str:
    """The whole file.

    Rows begin with the attack `clean`. Those of an attack that was run on some images
    only are left out for the others. Cells of the published protocol have attacks named
    `published-...` (with Carlini and Wagner's constant, or the corruption, in `view`), and
    `adaptive-carlini-wagner` beside it; corruptions have the attack `corruption`, with
    family, type and severity in `view`. None of the last three counts in the worst case.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for subject in evaluation.subjects:
        writer.writerows(_rows(evaluation.examples, subject))
    return text.getvalue()


def _rows(examples: Tensor, subject: SubjectOutcome) -> Iterator[Row]:
    numbers = examples.tolist()
    for example, wrong in zip(numbers, subject.clean_wrong.tolist(), strict=True):
        yield example, subject.name, "clean", "", "", 0.0, int(wrong), 1.0, 0.0, 1
    for row in subject.attacks:
        cells = zip(
            numbers,
            row.success.tolist(),
            row.queries.tolist(),
            row.perturbation.tolist(),
            row.attacked.tolist(),
            row.scope.tolist(),
            strict=True,
        )
        for example, success, queries, reach, attacked, inside in cells:
            if inside:
                case = (row.attack, row.view, row.norm, row.eps)
                yield example, subject.name, *case, int(success), queries, reach, int(attacked)
    yield from _published_rows(numbers, subject)
    for bad in subject.corruptions:
        view = f"{bad.family}/{bad.corruption}/{bad.severity}"
        for example, wrong in zip(numbers, bad.wrong.tolist(), strict=True):
            yield example, subject.name, "corruption", view, "", "", int(wrong), 1.0, "", 1


def _published_rows(numbers: list[int], subject: SubjectOutcome) -> Iterator[Row]:
    for cell in subject.published:
        view = cell.condition if cell.constant is None else f"c={cell.constant:g}"
        eps: float | str = "" if cell.eps is None else cell.eps
        cells = zip(
            numbers,
            cell.wrong.tolist(),
            cell.perturbation.tolist(),
            cell.adaptive.tolist(),
            cell.scope.tolist(),
            strict=True,
        )
        for example, wrong, reach, adaptive, inside in cells:
            if not inside:
                continue
            case = (view, cell.norm, eps)
            name = f"published-{cell.attack}"
            yield example, subject.name, name, *case, int(wrong), "", reach, 1
            if cell.constant is not None:
                name = f"adaptive-{cell.attack}"
                yield example, subject.name, name, *case, int(adaptive), "", "", 1
