"""The pictures of the results page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epdistill.recorded.store import ABLATION, BENCH, EVALUATION, RUN, Record, of_kind
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.pictures import accuracy_curves, save, sweep_curves
from epdistill.robustness.pictures.style import (
    house_style,
    legend_below,
    look,
    note_below,
    panels,
    title_above,
)
from epdistill.robustness.shares import ball
from epdistill.workflows.bench_models import INT8, ONNX, PUBLISHED, SETTLED
from epdistill.workflows.evaluation import TEST

# The radius at which speed is set against robustness.
FRONT = 0.308503
# How the contenders of bench.json ran that are worth a point.
_HOW = {name.partition(", ")[2] for name in (PUBLISHED, SETTLED, ONNX, INT8)}
_INT8 = INT8.partition(", ")[2]


def draw_all(records: Sequence[Record], titles: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Draw what the records hold into a folder.

    Returns:
        By file stem: what the picture shows.
    """
    drawn: dict[str, str] = {}
    for record in of_kind(records, ABLATION):
        drawn |= _curves(record, folder)
        if record.content["split"] == TEST:
            drawn |= _front(record, records, titles, folder)
    for record in of_kind(records, EVALUATION):
        drawn |= _front(record, records, titles, folder)
        drawn |= _horizons(record, titles, folder)
        drawn |= {
            picture.stem: "adversarial images of each model, and what the models answer"
            for picture in sorted(folder.glob(f"{record.stem}-examples-*.png"))
        }
    return drawn


def _curves(record: Record, folder: Path) -> dict[str, str]:
    """Accuracy over the radius of the rows that were trained on every seed."""
    content, drawn = record.content, {}
    most = max(len(row["seeds"]) for row in content["rows"])
    rows = [row for row in content["rows"] if len(row["seeds"]) == most or row["kind"] == "teacher"]
    for norm in (L2, LINF):
        curves = {
            row["row"]: [case for case in row["mean"] if case["norm"] in ("clean", norm)]
            for row in rows
        }
        stem = f"{record.stem}-{norm}"
        n = rows[0]["mean"][0]["n"]
        seeds = f"{most} seed{'s' * (most > 1)}"
        title = f"Under the worst attack: {content['split']} images, n = {n}, {seeds}"
        save(accuracy_curves(curves, norm, title=title), folder / stem)
        drawn[stem] = (
            f"accuracy over the {'L2' if norm == L2 else 'Linf'} radius, {content['split']} images"
        )
    return drawn | _fidelity(record, folder)


def _fidelity(record: Record, folder: Path) -> dict[str, str]:
    """How often a student still gives its teacher's label, over the radius of an attack on it."""
    curves = {}
    for row in record.content["rows"]:
        found = row["fidelity"]
        if found and found.get("l2") and row["row"].startswith(("distilled", "kd")):
            images = row["seeds"][0]["fidelity"]["l2"][0]["images"]
            points = [{"eps": 0.0, **found["clean"]}, *found["l2"]]
            curves[row["row"]] = [
                {"eps": one["eps"], "accuracy": one["agreement"], "n": images} for one in points
            ]
    if not curves:
        return {}
    stem = f"{record.stem}-fidelity"
    title = "Images of PGD-10 on the student: does its teacher answer the same?"
    figure = accuracy_curves(curves, L2, title=title, what="same label as the teacher")
    save(figure, folder / stem)
    return {stem: f"students and teachers on the students' adversarial images, {record.name}"}


def _horizons(record: Record, titles: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Models that relax: accuracy over sweeps, and over the horizon of the attack."""
    drawn = {}
    for model in record.content["models"]:
        temporal = model["temporal"]
        if temporal is None:
            continue
        base = f"{record.stem}-{model['name']}"
        title = titles.get(model["name"], model["name"])
        clean = [
            {**cell, "sweeps": cell["prediction_sweeps"]}
            for cell in temporal["cells"]
            if cell["gradient"] == "clean" and cell["prediction_sweeps"] is not None
        ]
        hit: dict[str, list[dict[str, Any]]] = {}
        for row in temporal["worst"]:
            if row["prediction_sweeps"] is not None:
                key = f"worst attack, {ball(row['norm'], row['eps'])}"
                hit.setdefault(key, []).append({**row, "sweeps": row["prediction_sweeps"]})
        if clean:
            figure = sweep_curves({"clean": clean, **hit}, title=f"{title}: answer after so many")
            save(figure, folder / f"{base}-sweeps")
            drawn[f"{base}-sweeps"] = f"{title}: accuracy over the sweeps before the answer"
        curves: dict[str, list[dict[str, Any]]] = {}
        for cell in temporal["cells"]:
            if cell["attack_sweeps"] is not None and cell["prediction_sweeps"] is None:
                key = ball(cell["norm"], cell["eps"])
                curves.setdefault(key, []).append({**cell, "sweeps": cell["attack_sweeps"]})
        if curves:
            figure = sweep_curves(curves, title=f"{title}: PGD through so many sweeps alone")
            save(figure, folder / f"{base}-horizon")
            drawn[f"{base}-horizon"] = f"{title}: accuracy over the horizon of the attack"
    return drawn


def _by_run(record: Record) -> dict[str, Mapping[str, Any]]:
    """The rows of an ablation by the runs of their seeds."""
    rows = record.content["rows"]
    return {Path(seed["run"]).name: row for row in rows for seed in row["seeds"]}


def _at_front(record: Record) -> tuple[float, dict[str, Mapping[str, Any]]]:
    """The L2 radius nearest to the front's, and there by model the worst case."""
    if record.kind == ABLATION:
        found = [(name, case) for name, row in _by_run(record).items() for case in row["mean"]]
    else:
        found = [
            (model["name"], case)
            for model in record.content["models"]
            for case in model["worst_case"]
        ]
    rows = [(name, case) for name, case in found if case["norm"] == L2]
    if not rows:
        return FRONT, {}
    eps = min((case["eps"] for _, case in rows), key=lambda radius: abs(radius - FRONT))
    return float(eps), {name: case for name, case in rows if case["eps"] == eps}


def _machine(record: Record) -> str:
    """What timings must share to be compared."""
    hardware = record.hardware or {}
    return f"{hardware.get('cpu', '')}, {hardware.get('torch_threads', '')} thread(s)"


def _latencies(benches: Sequence[Record], runs: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Milliseconds at batch 1 by the model's name and how it ran."""
    taught_by = {
        run.name: run.content["teacher"]["name"] for run in runs if "teacher" in run.content
    }
    found: dict[tuple[str, str], float] = {}
    for record in benches:
        beside = {run: run for run in record.content.get("beside", ())}
        runs_of = {"teacher": taught_by.get(record.name), "student": record.name, **beside}
        for row in record.content["rows"]:
            who, _, how = row["name"].partition(", ")
            run = runs_of.get(who)
            if row["batch_size"] == 1 and how in _HOW and run is not None:
                name = f"{run}/model-int8.onnx" if how == _INT8 else run
                # A teacher is timed again beside every student of it.
                found.setdefault((name, how), 1e3 * row["seconds_per_batch"]["median"])
    return found


@house_style()
def _front(
    record: Record, records: Sequence[Record], titles: Mapping[str, str], folder: Path
) -> dict[str, str]:
    """Milliseconds per image at batch 1 against the worst case: one point per contender.

    All on one machine: that on which most of them were timed. What was timed more than once
    there stands as in the benchmark that timed most of them, beside each other.
    """
    eps, robust = _at_front(record)
    if record.kind == ABLATION:
        titles = {name: row["row"] for name, row in _by_run(record).items()} | dict(titles)
    timed: dict[str, list[Record]] = {}
    for bench in of_kind(records, BENCH):
        timed.setdefault(_machine(bench), []).append(bench)
    runs = of_kind(records, RUN)

    def shown(benches: Sequence[Record]) -> list[tuple[str, float, Mapping[str, Any]]]:
        found = [one for one in _latencies(benches, runs).items() if one[0][0] in robust]
        if len({name for (name, _), _ in found}) < 2:
            return []  # one model has nothing to stand against
        return [
            (f"{titles.get(name, name)} ({how})", ms, robust[name]) for (name, how), ms in found
        ]

    by_machine = {
        machine: shown(sorted(benches, key=lambda one: -len(shown([one]))))
        for machine, benches in timed.items()
    }
    machine, points = max(by_machine.items(), key=lambda item: len(item[1]), default=("", []))
    times = [ms for _, ms, _ in points]
    # Where all are about as fast there is no speed to pay with.
    if not times or max(times) < 2 * min(times):
        return {}
    figure, (axes,) = panels(1, 5.6, 3.6, across=1)
    handles = []
    for place, (_, ms, case) in enumerate(points):
        style, share = look(place), case["accuracy"]
        low, high = case["ci95"]
        line = axes.errorbar(
            [ms],
            [100 * share],
            yerr=[[100 * (share - low)], [100 * (high - share)]],
            color=style.colour,
            marker=style.marker,
            linestyle="",
            markersize=8,
            elinewidth=0.8,
            capsize=2.5,
        )
        handles.append(line[0])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    # Whole decades: two of the labelled ticks at least.
    ends = math.log10(min(times)) - 0.05, math.log10(max(times)) + 0.05
    axes.set_xlim(10 ** math.floor(ends[0]), 10 ** math.ceil(ends[1]))
    axes.set_xlabel("ms per image at batch 1 (median)")
    axes.set_ylabel(f"accuracy (%) under the worst attack, {ball(L2, eps)}")
    axes.set_ylim(bottom=-2)
    axes.grid(visible=True)
    legend_below(figure, handles, [title for title, _, _ in points])
    note_below(figure, f"{machine}; {points[0][2]['n']} images")
    title_above(figure, "Speed against robustness")
    stem = f"{record.stem}-front"
    save(figure, folder / stem)
    return {stem: "speed against robustness: the upper left corner is best"}
