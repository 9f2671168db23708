"""`epdistill bench`: teacher, student and exported files timed side by side, in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epdistill.errors import RecipeError
from epdistill.recipes import Recipe
from epdistill.runs import new_run_folder, write_json
from epdistill.workflows.bench_models import (
    BATCH_SIZES,
    COMPILED,
    INT8,
    ONNX,
    PUBLISHED,
    SETTLED,
    STUDENT,
    Timed,
    settling,
    teacher_contenders,
    trained,
    untrained,
)
from epdistill.workflows.cards import refresh as refresh_card
from epdistill.workflows.context import Context

if TYPE_CHECKING:
    from epdistill.export.bench import BenchRow, Contender
    from epdistill.export.runtime import OnnxClassifier

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Benched:
    """Where the timings were written, and what they say.

    Attributes:
        folder: Holds bench.json and the picture.
        content: The content of bench.json (docs/bench-schema.md).
    """

    folder: Path
    content: dict[str, Any]


def bench(
    context: Context,
    *,
    run: Path | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    rounds: int = 20,
    max_seconds: float = 20.0,
    threads: int | None = None,
    compiled: bool = False,
    beside: Sequence[Path] = (),
) -> Benched:
    """Time teacher, student and exported student per image, interleaved, in one run.

    Args:
        context: Folders, device, reporter.
        run: A student's run; the newest one without it.
        recipe: Time freshly initialised networks of this recipe instead of a run.
        out: Folder for bench.json; numbered automatically without it.
        rounds: Most rounds of measurement.
        max_seconds: Time spent per contender and batch size, roughly.
        threads: Of torch and of onnxruntime; torch's present number without it.
        compiled: Also time the student under torch.compile.
        beside: Exported runs, of students or baselines, that are timed in the same rounds.

    Raises:
        RecipeError: Both a recipe and runs are given.
        RunError: A run is unfinished or was not exported, two have one name, or they take
            images of different sizes.
    """
    from epdistill.export.bench import bench as run_bench
    from epdistill.export.bench import to_json

    if recipe and (run or beside):
        raise RecipeError("a recipe's untrained networks are timed alone; expected no runs")
    with _pinned(threads or torch.get_num_threads()) as pinned:
        models = untrained(recipe, pinned) if recipe else trained(context, run, pinned, beside)
        contenders, skipped = _contenders(models, compiled)
        with context.reporter.bar("bench", 1):
            rows = run_bench(
                contenders,
                models.images,
                batch_sizes=BATCH_SIZES,
                rounds=rounds,
                max_seconds=max_seconds,
            )
        facts = _facts(models, contenders)
        content = {
            "schema_version": SCHEMA_VERSION,
            "models": models.label,
            "beside": list(dict.fromkeys(rival.run for rival in models.rivals)),
            "settling": _settling_facts(models),
            "parameters": {
                "teacher": sum(p.numel() for p in models.teacher.parameters()),
                "student": sum(p.numel() for p in models.student.parameters()),
            },
            "contenders": facts,
            "skipped": skipped,
            **_with_rates(rows, facts, to_json),
        }
    folder = new_run_folder(out, context.runs, "bench")
    from epdistill.workflows.bench_plot import draw

    draw(content, folder / "bench")
    write_json(folder / "bench.json", content)
    if models.path is not None:
        refresh_card(models.path, context.runs, folder)
    return Benched(folder, content)


@contextmanager
def _pinned(threads: int) -> Iterator[int]:
    """So many threads for torch within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _contenders(models: Timed, compiled: bool) -> tuple[list[Contender], list[dict[str, str]]]:
    """Who is timed, and who is not and why."""
    from epdistill.export.bench import Contender, torch_contender
    from epdistill.export.costs import compiled_contender, matrix_contender

    def on_runtime(classifier: OnnxClassifier, name: str) -> Contender:
        return Contender(name, lambda batch: classifier.run(batch.numpy()))

    contenders = [
        *teacher_contenders(models.teacher),
        torch_contender(models.student, STUDENT),
        on_runtime(models.onnx, ONNX),
    ]
    optional: dict[str, Contender | str] = {
        COMPILED: compiled_contender(models.student, COMPILED, models.images, BATCH_SIZES)
        if compiled
        else "not asked for",
        INT8: models.int8 if isinstance(models.int8, str) else on_runtime(models.int8, INT8),
    }
    skipped = []
    for name, found in optional.items():
        if isinstance(found, str):
            skipped.append({"what": name, "why": found})
        else:
            contenders.append(found)
    contenders += [on_runtime(rival.onnx, rival.contender) for rival in models.rivals]
    return [*contenders, matrix_contender()], skipped


def _facts(models: Timed, contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """What each contender is: operations per image, parameters, bytes."""
    from epdistill.export.costs import MATRIX, flops_per_image

    teachers = {contender.name: contender for contender in teacher_contenders(models.teacher)}
    with torch.no_grad():
        student = flops_per_image(models.student, models.images[:1])
        settled = flops_per_image(settling(models.teacher), models.images)
        # Every image gets the same sweeps: one is enough to count them.
        published = flops_per_image(teachers[PUBLISHED].run, models.images[:1])
    flops = {PUBLISHED: published, SETTLED: settled}

    def fact(name: str) -> dict[str, Any]:
        model = models.teacher if name in teachers else models.student
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        return {
            "flops_per_image": flops.get(name, student),
            "parameters": sum(p.numel() for p in model.parameters()),
            "size_bytes": models.sizes.get(name, weights),
        }

    rivals = {rival.contender: rival.facts for rival in models.rivals}
    return {
        item.name: rivals.get(item.name) or fact(item.name)
        for item in contenders
        if item.name != MATRIX
    }


def _with_rates(rows: Sequence[BenchRow], facts: dict[str, Any], to_json: Any) -> dict[str, Any]:
    """The rows as JSON, with operations per second as a share of the matrix product's."""
    from epdistill.export.costs import MATRIX, MATRIX_FLOPS, MATRIX_SIDE

    whole: dict[str, Any] = to_json([row for row in rows if row.name != MATRIX], PUBLISHED)
    products = [row for row in to_json(rows)["rows"] if row["name"] == MATRIX]
    matrix = [
        {
            "side": MATRIX_SIDE,
            "batch_size": row["batch_size"],
            "seconds": row["seconds_per_batch"],
            # The lower quartile: what the machine can do where it is left alone.
            "flops_per_second": MATRIX_FLOPS / row["seconds_per_batch"]["q25"],
        }
        for row in products
    ]
    rate = max(row["flops_per_second"] for row in matrix)
    for row in whole["rows"]:
        row["flops_per_second"] = row["images_per_second"] * facts[row["name"]]["flops_per_image"]
        row["matrix_share"] = row["flops_per_second"] / rate
    return {**whole, "comparisons": _comparisons(rows), "matrix": matrix}


def _comparisons(rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    """Ratios that decide what to deploy: the file against torch, int8 against the file."""
    from epdistill.export.bench import ratios

    found = []
    for name, to in ((ONNX, STUDENT), (INT8, ONNX)):
        pair = [row for row in rows if row.name in (name, to)]
        if any(row.name == name for row in pair):
            found += [{**asdict(ratio), "to": to} for ratio in ratios(pair, to)]
    return found


def _settling_facts(models: Timed) -> dict[str, Any]:
    relaxing = settling(models.teacher)
    with torch.no_grad():
        settled = relaxing.relax(models.images).certificate
    return {
        "sweeps_mean": float(settled.sweeps.double().mean()),
        "converged": float(settled.converged.double().mean()),
        "tolerance": relaxing.schedule.tolerance,
        "schedule": relaxing.schedule.to_dict(),
    }


def speed_rows(content: dict[str, Any]) -> list[list[str]]:
    """bench.json as text: what, batch, ms per image, times the published teacher (quartiles)."""
    rows = []
    for row in content["rows"]:
        shown = _speedup(content, row)
        rows.append(
            [row["name"], str(row["batch_size"]), f"{1e3 * row['seconds_per_image']:.3f}", shown]
        )
    return rows


def bench_rows(content: dict[str, Any], batch_size: int) -> list[list[str]]:
    """One batch size as text: ms per batch (quartiles), p99, images/s, matrix share, speedup."""
    rows = []
    for row in content["rows"]:
        if row["batch_size"] == batch_size:
            ms = {key: 1e3 * value for key, value in row["seconds_per_batch"].items()}
            rows.append(
                [
                    row["name"],
                    f"{_short(ms['median'])} ({_short(ms['q25'])}-{_short(ms['q75'])})",
                    _short(ms["p99"]),
                    f"{row['images_per_second']:.4g}",
                    f"{100 * row['matrix_share']:.0f} %",
                    _speedup(content, row),
                ]
            )
    return rows


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def contender_rows(content: dict[str, Any]) -> list[list[str]]:
    """What each contender is, and why some were not timed."""
    rows = [
        [
            name,
            f"{fact['flops_per_image'] / 1e6:,.1f}",
            f"{fact['parameters']:,}",
            f"{fact['size_bytes'] / 2**20:.2f}",
            "",
        ]
        for name, fact in content["contenders"].items()
    ]
    return rows + [
        [skip["what"], "", "", "", f"not timed: {skip['why']}"] for skip in content["skipped"]
    ]


def _speedup(content: dict[str, Any], row: dict[str, Any]) -> str:
    for ratio in content["ratios"]:
        if (ratio["name"], ratio["batch_size"]) == (row["name"], row["batch_size"]):
            return f"{ratio['speedup']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})"
    return "1"
