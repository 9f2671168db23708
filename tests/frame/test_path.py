"""`epdistill run --resume`: the whole path goes on wherever it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epdistill.console import SILENT
from epdistill.errors import RunError
from epdistill.recipes import Recipe, load_recipe
from epdistill.workflows import path as whole
from epdistill.workflows.context import Context
from epdistill.workflows.path import Finished, run_path

TINY = """
name = "tiny"
[data]
name = "digits"
[teacher]
channels = [4, 6]
sweeps = 20
teach_sweeps = 4
nudged_sweeps = 2
batch_size = 256
epochs = 1
[student]
name = "cnn"
width = 4
batch_size = 256
epochs = 1
[evaluate]
limit = 5
steps = 1
queries = 1
linf = [0.05]
l2 = [0.3]
"""
PARTS = ("teach", "distill", "export", "evaluate", "bench")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "tiny.toml").write_text(TINY)
    return load_recipe(str(tmp_path / "tiny.toml"), environment={})


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the real benchmark writes, without its minute."""
    from epdistill.export.bench import hardware
    from epdistill.workflows.bench_models import ONNX, PUBLISHED, SETTLED

    def bench(context: Context, *, run: Path) -> Any:
        names = (PUBLISHED, SETTLED, ONNX)
        rows = [
            {
                "name": name,
                "batch_size": size,
                "seconds_per_batch": {"median": 1.0, "q25": 1.0, "q75": 1.0, "p99": 1.0},
                "seconds_per_image": 1.0,
                "images_per_second": 1.0,
                "flops_per_second": 1.0,
                "matrix_share": 1.0,
            }
            for name in names
            for size in (1, 64)
        ]
        ratios = [
            {"name": name, "batch_size": size, "speedup": 2.0, "low": 1.0, "high": 3.0}
            for name in names
            for size in (1, 64)
        ]
        content = {
            "models": run.name, "hardware": hardware(), "rows": rows, "ratios": ratios,
            "reference": PUBLISHED, "skipped": [], "comparisons": [], "matrix": [],
            "contenders": {name: {"flops_per_image": 1.0, "parameters": 1, "size_bytes": 1}
                           for name in names},
        }  # fmt: skip
        return whole.Benched(run.parent, content)

    monkeypatch.setattr(whole, "bench", bench)


def quiet(runs: Path) -> Context:
    return Context(runs=runs, reporter=SILENT)


def figures(finished: Finished) -> dict[str, Any]:
    """What was found, without times and places."""
    kept = json.loads(json.dumps(finished.summary))
    for model in ("teacher", "student"):
        kept[model].pop("seconds")
    return {key: value for key, value in kept.items() if key != "paths"}


def test_it_goes_on_wherever_it_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_path(recipe, quiet(tmp_path / "straight"))
    runs = tmp_path / "stopped"
    asked: Recipe | None = recipe
    done: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            done.append(name)
            return function(*args, **more)

        return call

    originals = {name: getattr(whole, name) for name in PARTS}
    for stopped in PARTS:
        for name in PARTS:
            monkeypatch.setattr(whole, name, noted(name, originals[name]))

        def stop(*args: Any, **more: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(whole, stopped, stop)
        with pytest.raises(KeyboardInterrupt):
            run_path(asked, quiet(runs))
        asked = None
    for name in PARTS:
        monkeypatch.setattr(whole, name, noted(name, originals[name]))
    finished = run_path(None, quiet(runs))
    assert figures(finished) == figures(straight)
    # What was done was not done again, but for the export, whose bytes are the same.
    assert [done.count(name) for name in ("teach", "distill", "evaluate", "bench")] == [1, 1, 1, 1]
    assert sorted(path.name for path in runs.iterdir()) == sorted(
        path.name for path in (tmp_path / "straight").iterdir()
    )
    with pytest.raises(RunError, match="no unfinished run of the whole path"):
        run_path(None, quiet(runs))
    with pytest.raises(RunError, match="is finished"):
        run_path(None, quiet(runs), out=runs / "report-001")


def test_a_training_that_was_cut_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epdistill.workflows import training

    runs = tmp_path / "runs"

    def cut(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_finish", cut)
    with pytest.raises(KeyboardInterrupt):
        run_path(recipe, quiet(runs))
    monkeypatch.undo()
    said: list[str] = []
    context = Context(runs=runs, reporter=SILENT)
    monkeypatch.setattr(type(context.reporter), "line", lambda _, text: said.append(text))
    monkeypatch.setattr(whole, "distill", cut)
    with pytest.raises(KeyboardInterrupt):
        run_path(None, context)
    assert f"continuing {runs / 'tiny-ep-cnn-001'}" in said
    # A new path says that there is an old one.
    with pytest.raises(KeyboardInterrupt):
        run_path(recipe, context)
    assert any(f"epdistill run --resume --out {runs / 'report-001'}" in line for line in said)


def test_nothing_is_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/path.json").write_text("{}")
    with pytest.raises(RunError, match="already holds a run of the whole path"):
        run_path(recipe, quiet(tmp_path / "runs"), out=tmp_path / "out")
    with pytest.raises(RunError, match="no unfinished run"):
        run_path(None, quiet(tmp_path / "runs"), out=tmp_path / "nowhere")
