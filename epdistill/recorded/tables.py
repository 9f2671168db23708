"""The tables of the results page, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from epdistill.recorded import published
from epdistill.recorded.models import Kin, has_teacher, published_key
from epdistill.recorded.pooled import pooled_gaps, pooled_rows
from epdistill.recorded.store import Record
from epdistill.robustness.guards import L2, LINF
from epdistill.robustness.paired import CLEAN
from epdistill.robustness.paper import CONSTANTS, TABLE_L2, TABLE_LINF
from epdistill.robustness.shares import ball, over, threat

NOTHING = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first column is text, the others are figures."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return ["", f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _measured(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table without the columns in which nobody measured anything."""
    kept = [place for place in range(len(head)) if any(row[place] != NOTHING for row in rows)]
    return table([head[k] for k in kept], [[row[k] for k in kept] for row in rows])


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def with_interval(found: Mapping[str, Any], digits: int = 0) -> str:
    """Accuracy, with its standard deviation over seeds if it has one, and its interval."""
    low, high = found["ci95"]
    spread = found.get("std")
    words = percent(found["accuracy"]) + (f" ±{100 * spread:.1f}" if spread is not None else "")
    return f"{words} ({100 * low:.{digits}f}-{100 * high:.{digits}f})"


def model_table(kins: Sequence[Kin], data: str) -> list[str]:
    """One line per kind of model: accuracy on all test images, size, cost, fidelity, int8."""
    rows = []
    for kin in kins:
        runs = [run.content for run in kin.runs]
        key = published_key(runs[0])
        results = [run["results"] for run in runs]
        beside = None if key is None else published.one(data, published.CLEAN, key)
        rows.append(
            [
                kin.title,
                ", ".join(map(str, kin.seeds)),
                _tested(results),
                percent(beside),
                _agreement(results),
                f"{results[0]['parameters']:,}" if "parameters" in results[0] else NOTHING,
                _flops(results),
                _int8(runs),
                ", ".join(f"{found['seconds'] / 60:.0f}" for found in results),
            ]
        )
    head = [
        "model", "seeds", "test accuracy, %", "published, full size", "teacher's label, %",
        "parameters", "MFLOPs", "int8: points lost", "minutes",
    ]  # fmt: skip
    return _measured(head, rows)


def _tested(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds on all test images; the interval is that of one share of these images."""
    shares, n = [found["accuracy"] for found in results], results[0]["test_images"]
    return f"{with_interval(over(shares, n), 1).removesuffix(')')}, n = {n:,})"


def _flops(results: Sequence[Mapping[str, Any]]) -> str:
    """Millions for an answer; those of a model that relaxes differ, as its sweeps do."""
    found = [f"{one['flops'] / 1e6:,.3g}" for one in results if "flops" in one]
    return ", ".join(dict.fromkeys(found)) or NOTHING


def _agreement(results: Sequence[Mapping[str, Any]]) -> str:
    found = [run["agreement"] for run in results if "agreement" in run]
    return f"{100 * fmean(found):.1f}" if found else NOTHING


def _int8(runs: Sequence[Mapping[str, Any]]) -> str:
    """On all test images: the run's accuracy less that of its int8 file."""
    lost = [
        run["results"]["accuracy"] - file["figures"]["test_accuracy"]
        for run in runs
        for file in run["files"]
        if file["precision"] == "int8" and "test_accuracy" in file["figures"]
    ]
    return ", ".join(f"{100 * points:+.2f}" for points in lost) or NOTHING


def ablation_tables(content: Mapping[str, Any]) -> list[str]:
    """Worst cases over seeds, and points above the references over the same images."""
    rows = [
        _Row(f"`{row['row']}`", str(len(row["seeds"])), row["mean"], percent(row["corrupted"]))
        for row in content["rows"]
    ]
    gaps: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for gap in content["differences"]:
        row, reference = f"`{gap['row']}`", f"`{gap['reference']}`"
        if (reference, row) not in gaps:  # each pair once
            gaps.setdefault((row, reference), []).append(gap)
    told = ["Points more than a reference on the same images (95 % interval; seeds):"]
    return [*_worst_cases("row", rows), *told, *_differences(gaps, lambda seeds: str(len(seeds)))]


def pooled_tables(records: Sequence[Record]) -> list[str]:
    """All ablations of one recipe and split together, and taught students beside the others."""
    rows = [
        _Row(title, _listed(cases[0]["seeds"]), cases)
        for title, cases in pooled_rows(records).items()
    ]
    gaps: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for gap in pooled_gaps(records):
        if has_teacher(gap["row"]):
            gaps.setdefault((gap["row"], gap["reference"]), []).append(gap)
    found = _differences(gaps, _listed)
    told = ["Points more than another, over the seeds that both have (95 % interval):"]
    return [*_worst_cases("model", rows), *(told if found else []), *found]


class _Row(NamedTuple):
    """A line of a table of worst cases: who, on which seeds, what remains at which radius."""

    name: str
    seeds: str
    cases: Sequence[Mapping[str, Any]]
    corrupted: str = NOTHING


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _worst_cases(what: str, rows: Sequence[_Row]) -> list[str]:
    """A table per norm; with the first one accuracy on corrupted images, where it is known."""
    lines: list[str] = []
    for norm in (L2, LINF):
        chosen = [[case for case in row.cases if case["norm"] in (CLEAN, norm)] for row in rows]
        head = [what, "seeds", "n", *map(threat, chosen[0])]
        body = [
            [row.name, row.seeds, str(cases[0]["n"]), *map(with_interval, cases)]
            for row, cases in zip(rows, chosen, strict=True)
        ]
        if norm == L2:
            head.append("corrupted")
            for cells, row in zip(body, rows, strict=True):
                cells.append(row.corrupted)
        lines += _measured(head, body)
    return lines


def _differences(
    found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    seeds: Callable[[Sequence[int]], str],
) -> list[str]:
    """One row against another, clean and at all L2 radii; `seeds` says which those are."""
    by_pair = {
        pair: {threat(gap): gap for gap in gaps if gap["norm"] in (CLEAN, L2)}
        for pair, gaps in found.items()
    }
    if not by_pair:
        return []
    threats = list(dict.fromkeys(name for gaps in by_pair.values() for name in gaps))
    body = [
        [f"{row} - {reference}", seeds(next(iter(gaps.values()))["seeds"])]
        + [_gap(gaps[name]) if name in gaps else NOTHING for name in threats]
        for (row, reference), gaps in by_pair.items()
    ]
    return table(["", "seeds", *threats], body)


def _gap(gap: Mapping[str, Any]) -> str:
    low, high = gap["ci95"]
    return f"{100 * gap['difference']:+.1f} ({100 * low:+.0f} to {100 * high:+.0f})"


def fidelity_table(content: Mapping[str, Any]) -> list[str]:
    """Students beside their teachers on clean, noisy and adversarial images."""
    body = []
    for row in content["rows"]:
        found = row["fidelity"]
        if found is None:
            continue
        cells = [f"`{row['row']}`"]
        for inputs in ("clean", "noise", "adversarial"):
            one = found[inputs]
            cells += [percent(one["agreement"]), _two(one["r2"]), percent(one["ece"])]
        body.append(cells)
    head = ["row"] + [
        f"{inputs}: {what}"
        for inputs in ("clean", "noisy", "adversarial")
        for what in ("teacher's label", "R²", "ECE")
    ]
    return table(head, body) if body else []


def radius_table(content: Mapping[str, Any]) -> list[str]:
    """What is lost where: student and teacher on the student's own adversarial images."""
    rows = [row for row in content["rows"] if row["fidelity"] and row["fidelity"].get("l2")]
    if not rows:
        return []
    body = []
    for row in rows:
        found = row["fidelity"]
        points = [found["clean"], *found["l2"]]
        cells = [
            f"{percent(one['agreement'])}, {_two(one['r2'])}, {percent(one['accuracy'])}, "
            f"{percent(one['teacher_accuracy'])}"
            for one in points
        ]
        body.append([f"`{row['row']}`", *cells])
    head = ["row", "clean", *(ball(L2, one["eps"]) for one in rows[0]["fidelity"]["l2"])]
    return table(head, body)


def _two(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def protocol_table(
    record: Record, titles: Mapping[str, str], runs: Mapping[str, Record], data: str
) -> list[str]:
    """The published cells, one line each: as published, under adaptive attacks, and in print."""
    models = [model for model in record.content["models"] if model.get("published")]
    head = ["attack"]
    for model in models:
        name = titles.get(model["name"], model["name"])
        head += [f"{name}: as published", "adaptive", "in print"]
    body = [
        [name, *(cell for model in models for cell in _cells(model, find, runs, data, beside))]
        for name, find, beside in _LINES
    ]
    body.append(
        ["average robust accuracy"]
        + [cell for model in models for cell in _average(model, runs, data)]
    )
    return table(head, [row for row in body if any(cell != NOTHING for cell in row[1:])])


def _named(model: Mapping[str, Any], runs: Mapping[str, Record]) -> str | None:
    return published_key(runs[model["name"]].content) if model["name"] in runs else None


def _cells(
    model: Mapping[str, Any],
    find: Mapping[str, Any],
    runs: Mapping[str, Record],
    data: str,
    beside: tuple[str, int | None],
) -> list[str]:
    cells = [
        cell
        for cell in model["published"]["cells"]
        if all(cell[key] == value for key, value in find.items())
    ]
    key, (what, place) = _named(model, runs), beside
    printed = None
    if key is not None and place is None:
        printed = published.one(data, what, key)
    elif key is not None and place is not None and (four := published.four(data, what, key)):
        printed = four[place]
    if not cells:
        return [NOTHING, NOTHING, percent(printed)]
    return [with_interval(cells[0]), with_interval(cells[0]["adaptive"]), percent(printed)]


def _average(model: Mapping[str, Any], runs: Mapping[str, Record], data: str) -> list[str]:
    key = _named(model, runs)
    found = model["published"]["average_robust_accuracy"]
    printed = None if key is None else published.one(data, published.AVERAGE, key)
    note = "" if found["complete"] else " (families missing)"
    return [percent(found["published"]) + note, percent(found["adaptive"]) + note, percent(printed)]


def _lines() -> list[tuple[str, Mapping[str, Any], tuple[str, int | None]]]:
    """What a line is called, which cell it shows, and which printed figure stands beside it."""
    lines: list[tuple[str, Mapping[str, Any], tuple[str, int | None]]] = [
        ("clean", {"attack": "clean"}, (published.CLEAN, None))
    ]
    lines += [
        (f"PGD {ball(L2, eps)}", {"attack": "pgd", "norm": L2, "eps": eps}, (published.PGD, place))
        for place, eps in enumerate(TABLE_L2)
    ]
    last = TABLE_LINF[-1]
    lines.append(
        (
            f"PGD {ball(LINF, last)}",
            {"attack": "pgd", "norm": LINF, "eps": last},
            (published.PGD_8, None),
        )
    )
    for name, title in ((published.AUTOATTACK, "AutoAttack"), (published.SQUARE, "Square")):
        lines += [
            (f"{title} {ball(LINF, eps)}", {"attack": name, "eps": eps}, (name, place))
            for place, eps in enumerate(TABLE_LINF)
        ]
    return lines + [
        (
            f"C&W c = {constant:g}",
            {"attack": "carlini-wagner", "constant": constant},
            (published.CARLINI_WAGNER, place),
        )
        for place, constant in enumerate(CONSTANTS)
    ]


_LINES = _lines()


def worst_table(record: Record, titles: Mapping[str, str]) -> list[str]:
    """The worst case of an evaluation at the radii of the tables, corruptions, and the verdict."""
    models = record.content["models"]
    grid = {(row["norm"], row["eps"]): None for model in models for row in model["worst_case"]}
    wanted = [(norm, eps) for norm, own in ((L2, TABLE_L2), (LINF, TABLE_LINF)) for eps in own]
    # A short grid is shown whole; of a long one, what the published tables show.
    short = len(grid) <= len(wanted)
    shown = sorted(grid) if short else [case for case in wanted if case in grid]
    body = []
    for model in models:
        worst = {(row["norm"], row["eps"]): row for row in model["worst_case"]}
        mean = model["corruption_mean"]
        body.append(
            [titles.get(model["name"], model["name"]), with_interval(model["clean"])]
            + [with_interval(worst[case]) if case in worst else NOTHING for case in shown]
            + [NOTHING if mean is None else percent(mean["accuracy"])]
            + [model["verdict"] or NOTHING, _exponents(model.get("basins"))]
        )
    head = ["model", "clean", *(ball(*case) for case in shown), "corrupted"]
    return _measured([*head, "masked gradients", "uncertainty exponent"], body)


def _exponents(basins: Mapping[str, Any] | None) -> str:
    """Of states and of labels, with intervals over images; where too few or too many perturbations
    change them there is none, and the shares at the smallest and the largest size tell which."""
    if basins is None:
        return NOTHING
    words = []
    for what in ("states", "labels"):
        law = basins[what]
        if law["alpha"] is None:
            ends = " to ".join(percent(share) for share in (law["f"][0], law["f"][-1]))
            words.append(f"{what} none ({ends} % change)")
        else:
            low, high = law["ci95"]
            words.append(f"{what} {law['alpha']:.2f} ({low:.2f}-{high:.2f})")
    return f"{', '.join(words)}, n = {basins['images']}"


def speed_table(content: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """Milliseconds per image and times the published teacher, by batch size."""

    def shown(contender: str) -> str:
        run, comma, how = contender.partition(", ")
        beside = run in content.get("beside", ())
        return f"{named.get(run, run)}{comma}{how}" if beside else contender

    ratios = {(row["name"], row["batch_size"]): row for row in content["ratios"]}
    body = []
    for row in content["rows"]:
        key = row["name"], row["batch_size"]
        seconds = {k: 1e3 * row["seconds_per_batch"][k] / key[1] for k in ("median", "q25", "q75")}
        times = ratios.get(key)
        body.append(
            [
                shown(row["name"]),
                str(key[1]),
                f"{seconds['median']:.3g} ({seconds['q25']:.3g}-{seconds['q75']:.3g})",
                NOTHING if times is None else _times(times),
            ]
        )
    head = ["", "batch", "ms per image (quartiles)", f"times {content['reference']}"]
    return table(head, body)


def _times(row: Mapping[str, Any]) -> str:
    return f"{row['speedup']:.3g} ({row['low']:.3g}-{row['high']:.3g})"
