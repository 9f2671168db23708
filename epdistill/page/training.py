"""Curves of the trainings, drawn from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epdistill.page.charts import Series, chart
from epdistill.page.elements import heading, paragraph, section
from epdistill.runs import Run, read_metrics


@dataclass(frozen=True)
class _Plot:
    title: str
    lines: Mapping[str, str]  # key of a row: name in the legend
    percent: bool = False
    log: bool = False


_PLOTS = (
    _Plot("loss", {"train.loss": "training"}),
    _Plot("accuracy, %", {"train.accuracy": "training", "validation.accuracy": "validation"}, True),
    _Plot("sweeps per image", {"train.sweeps": "training", "validation.sweeps": "validation"}),
    _Plot("largest residual of a batch", {"train.residual": "training"}, log=True),
    _Plot(
        "settled, %", {"train.converged": "training", "train.settled": "teacher, training"}, True
    ),
    _Plot("same label as the teacher, %", {"validation.agreement": "validation"}, True),
    _Plot("R² of the states", {"validation.r2": "validation"}),
)


def training(runs: Sequence[Run]) -> str:
    """Curves over epochs, for every run."""
    parts = []
    for run in runs:
        rows = read_metrics(run.path)
        charts = "".join(_draw(plot, rows) for plot in _PLOTS)
        parts.append(heading(run.name))
        if charts:
            parts.append(f'<div class="charts">{charts}</div>')
        else:
            parts.append(paragraph("metrics.jsonl holds no epoch.", "soft"))
    return section("training", "Training", *parts)


def _draw(plot: _Plot, rows: Sequence[Mapping[str, Any]]) -> str:
    series = [
        Series(name, [(row["epoch"], row[key]) for row in rows if key in row])
        for key, name in plot.lines.items()
    ]
    # Training figures are means over an epoch, validation is measured at its end.
    return chart(plot.title, series, x="epoch", percent=plot.percent, log=plot.log)
