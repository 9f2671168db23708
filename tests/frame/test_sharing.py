"""Model cards from recorded numbers, loading in one line, and commands that make a run again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import epdistill
from epdistill.console import SILENT
from epdistill.errors import EpdistillError, RecipeError, RunError
from epdistill.loading import load_student, load_teacher
from epdistill.recipes import load_recipe
from epdistill.runs import CARD, Run, open_run
from epdistill.sealed import KEY, read_sealed
from epdistill.teachers.pretrained import shipped_folder
from epdistill.workflows.cards import card, refresh
from epdistill.workflows.checking import INTACT, check
from epdistill.workflows.commands import ablation_command, training_command
from epdistill.workflows.context import Context
from epdistill.workflows.evidence import evidence_of, newest_bench

TINY = {
    "teacher.channels": [8, 16],
    "teacher.epochs": 1,
    "student.name": "cnn",
    "student.width": None,
    "student.epochs": 1,
    "evaluate.limit": 12,
    "evaluate.linf": [0.05],
    "evaluate.l2": [0.5],
    "evaluate.steps": 2,
    "evaluate.queries": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, its files, an evaluation and timings, all under one folder."""
    from epdistill.workflows.benchmark import bench
    from epdistill.workflows.deployment import Wanted, export
    from epdistill.workflows.evaluation import evaluate
    from epdistill.workflows.training import distill, teach

    folder = tmp_path_factory.mktemp("sharing")
    context = Context(runs=folder / "runs", reporter=SILENT)
    teacher = teach(load_recipe("digits", TINY), context).run
    student = distill(None, context, overrides={"student.name": "cnn", "student.epochs": 2}).run
    done = export(context, wanted=Wanted(int8=True, max_drop=100.0))
    evaluate([teacher.path, student.path, done.result.path], context)
    bench(context, rounds=3, max_seconds=0.1)
    return folder / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(made, tmp_path / "runs", copy_function=shutil.copy2)
    return tmp_path / "runs"


def run_of(runs: Path, kind: str) -> Run:
    return open_run(runs / ("digits-ep-cnn-001" if kind == "teacher" else "digits-cnn-001"))


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(head)
    return content


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_front_matter_is_what_the_hub_reads(made: Path, kind: str) -> None:
    run = run_of(made, kind)
    head = front((run.path / CARD).read_text())
    assert head["license"] == "unknown"
    assert head["library_name"] == "epdistill"
    assert head["pipeline_tag"] == "image-classification"
    assert {"epdistill", kind} <= set(head["tags"])
    assert ("equilibrium-propagation" in head["tags"]) == (kind == "teacher")
    (entry,) = head["model-index"]
    assert entry["name"] == run.name
    (result,) = entry["results"]
    assert result["task"]["type"] == "image-classification"
    figures = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert figures["test accuracy"] == run.config["results"]["accuracy"]
    found = json.loads((made / "evaluate-001/results.json").read_text())
    (model,) = (model for model in found["models"] if model["name"] == run.name)
    assert figures["worst case, L2 0.5"] == model["worst_case"][-1]["accuracy"]


def test_the_card_tells_everything_that_was_recorded(made: Path) -> None:
    run = run_of(made, "student")
    text = (run.path / CARD).read_text()
    results = json.loads((made / "evaluate-001/results.json").read_text())
    (model,) = (model for model in results["models"] if model["name"] == run.name)
    for row in model["worst_case"]:
        low, high = row["ci95"]
        assert f"| {row['accuracy']:.4f} | {low:.4f}-{high:.4f} | {row['n']} |" in text
    manifest = json.loads((run.path / "model.json").read_text())
    assert f"{manifest['parity']['max_abs_error']:.2g} (allowed" in text
    lost = json.loads((run.path / "model-int8.json").read_text())["figures"]["quantisation"]
    assert f"{lost['drop_points']:.2f} points of top-1 lost" in text
    bench = json.loads((made / "bench-001/bench.json").read_text())
    assert bench["hardware"]["cpu"] in text
    assert all(f"| {row['name']} | {row['batch_size']} |" in text for row in bench["rows"])
    assert "epdistill export digits-cnn-001 --int8" in text
    assert "## Limits" in text and "Not measured" not in text
    assert str(made) not in text  # nobody's folders
    assert "More information needed" not in text


def test_what_was_not_measured_is_left_out_in_one_line(made: Path) -> None:
    text = card(run_of(made, "student"))
    assert "## Robustness" not in text and "## Speed" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("Not measured"))
    for command in ("evaluate", "export", "bench"):
        assert f"`epdistill {command} digits-cnn-001" in line


def test_an_edited_card_stays_and_a_licence_is_kept(runs: Path) -> None:
    path = run_of(runs, "student").path / CARD
    written = path.read_text()
    (runs / "bench-001/bench.json").unlink()
    path.write_text(written.replace("license: unknown", "license: apache-2.0"))
    refresh(path.parent, runs)
    assert "license: apache-2.0" in path.read_text()
    assert "Not measured: speed" in path.read_text()
    assert {one.state for one in check([path.parent])} == {INTACT}
    path.write_text(path.read_text() + "\nMy own words.\n")
    before = path.read_text()
    refresh(path.parent, runs)
    assert path.read_text() == before
    path.unlink()
    refresh(path.parent, runs)
    assert "license: unknown" in path.read_text()


def test_the_teacher_of_the_package_is_left_as_it_came(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in shipped_folder().iterdir()}
    refresh(shipped_folder(), tmp_path)
    assert {path: path.read_bytes() for path in shipped_folder().iterdir()} == before


def test_damaged_timings_do_not_count(runs: Path) -> None:
    run, path = run_of(runs, "student"), runs / "bench-001/bench.json"
    found = newest_bench(runs, run)
    assert found is not None and KEY not in found
    path.write_bytes(path.read_bytes().replace(b'"batch_size": 64', b'"batch_size": 65', 1))
    assert newest_bench(runs, run) is None


def test_evaluations_of_an_older_run_of_the_name_do_not_count(runs: Path) -> None:
    run = run_of(runs, "student")
    late = {**run.config, "finished": "2999-01-01T00:00:00+00:00"}
    found = evidence_of(Run(run.path, late), runs)
    assert found.robustness is None and found.bench is None
    other = {**run.config, "weights_sha256": "0" * 64}
    assert evidence_of(Run(run.path, other), runs).exports == ()


def test_validation_figures_do_not_get_into_the_index(made: Path) -> None:
    run = run_of(made, "student")
    found = evidence_of(run, made)
    assert found.robustness is not None
    found.robustness["split"] = "validation"
    text = card(run, found)
    assert len(front(text)["model-index"][0]["results"][0]["metrics"]) == 1
    assert "on validation images" in text


def test_one_line_gives_the_model_back(runs: Path, tmp_path: Path) -> None:
    images = torch.rand(3, 1, 8, 8)
    for kind, old in (("teacher", load_teacher), ("student", load_student)):
        run = run_of(runs, kind)
        moved = tmp_path / f"elsewhere-{kind}"
        shutil.copytree(run.path, moved)
        model = epdistill.load(str(moved))
        assert isinstance(model, torch.nn.Module) and not model.training
        with torch.no_grad():
            assert torch.equal(model(images), old(run)(images))
    student = run_of(runs, "student").path
    file = epdistill.load(student / "model.onnx")
    with torch.no_grad():
        expected = epdistill.load(student)(images)  # type: ignore[arg-type]
    assert np.allclose(file(images.numpy()), expected.numpy(), atol=1e-4)  # type: ignore[operator]
    (tmp_path / "file").mkdir()
    for name in ("model.onnx", "model.json"):
        shutil.copy(student / name, tmp_path / "file" / name)
    alone = epdistill.load(tmp_path / "file")
    assert torch.allclose(alone(images), expected, atol=1e-4)  # type: ignore[arg-type]


def test_what_cannot_be_loaded_is_told(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        epdistill.load(tmp_path / "nothing")
    path = run_of(runs, "teacher").path / "config.json"
    path.write_text(json.dumps({**read_sealed(path), "finished": None}))
    with pytest.raises(RunError, match="epdistill teach --resume"):
        epdistill.load(path.parent)
    damaged = run_of(runs, "student").path / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(EpdistillError, match="damaged or was replaced"):
        epdistill.load(damaged)


def recipe_after(command: str) -> dict[str, Any]:
    """The recipe that a training command resolves to, without training."""
    from typer.main import get_command

    from epdistill.cli import app as place
    from epdistill.workflows import training

    seen: dict[str, Any] = {}

    def teach(recipe: Any, context: Any, **rest: Any) -> Any:
        seen["recipe"] = recipe.model_dump(mode="json")
        raise RunError("seen")

    def distill(recipe: Any, context: Any, *, teacher: Path, overrides: Any, **rest: Any) -> Any:
        if recipe is None:
            base = open_run(teacher, "teacher").config["recipe"]
            found = training.inherit(base, overrides, "")
        else:
            found = training.inherit(recipe.model_dump(exclude_unset=True), overrides, "")
        seen["recipe"] = found.model_dump(mode="json")
        raise RunError("seen")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RunError, match="seen"):
        patched.setattr(training, "teach", teach)
        patched.setattr(training, "distill", distill)
        words = shlex.split(command)
        assert words[0] == "epdistill"
        get_command(place.app).main(words[1:], standalone_mode=False)
    content: dict[str, Any] = seen["recipe"]
    return content


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_commands_resolve_to_the_recorded_recipe(made: Path, kind: str) -> None:
    run = run_of(made, kind)
    command = training_command(run)
    # A teacher whose channels were changed has no short form, the student has one.
    assert ("--recipe" in command) == (kind == "teacher")
    assert recipe_after(command) == run.config["recipe"]
    plain = load_recipe("digits", {"teacher.epochs": 3, "seed": 7}, {}).model_dump(mode="json")
    if kind == "teacher":
        short = training_command(Run(run.path, {**run.config, "recipe": plain}))
        assert short == "epdistill teach --recipe digits --seed 7 --epochs 3"
        assert recipe_after(short) == plain


def test_a_baselines_command(made: Path) -> None:
    recipe = load_recipe("digits", {"model": "vit", "baselines.vit.epochs": 2}, {})
    config = {**run_of(made, "teacher").config, "recipe": recipe.model_dump(mode="json")}
    config["model"] = {"name": "vit"}
    command = training_command(Run(made / "digits-ep-cnn-001", config))
    assert command == "epdistill teach --recipe digits --model vit --epochs 2"
    assert recipe_after(command) == config["recipe"]


@pytest.mark.parametrize("counts", [(1, 1), (2, 1)])
def test_an_ablations_command_says_what_its_recipe_does_not(counts: tuple[int, int]) -> None:
    changes = {
        "ablate.teacher_seed": 0, "ablate.deciding": ["ce"], "ablate.limit": 7, "seed": 2,
        "student.noise_std": 0.3, "data.flip": False, "student.inputs": "noise",
    }  # fmt: skip
    recipe = load_recipe("cifar10-small", changes, {}).model_dump(mode="json")
    rows = [{"row": row, "seeds": [{}] * n} for row, n in zip(("ce", "kd"), counts, strict=True)]
    command = ablation_command({"recipe": recipe, "split": "test", "rows": rows})
    words = shlex.split(command)
    start = words.index("epdistill")
    flags = ["ablate", "--recipe", "cifar10-small", "--rows", "ce,kd"]
    flags += ["--seeds", "1"] if counts == (1, 1) else []
    flags += ["--split", "test", "--seed", "2", "--data-root", "DIR"]
    assert words[start + 1 :] == flags
    variables = dict(word.split("=", 1) for word in words[:start])
    # Where every row has as many seeds, it is of no account which ones decide.
    assert ("EPDISTILL__ABLATE__DECIDING" in variables) == (counts == (2, 1))
    again = load_recipe("cifar10-small", {"seed": 2}, variables).model_dump(mode="json")
    if counts == (1, 1):
        again["ablate"]["deciding"] = ["ce"]
    assert again == recipe


def test_a_runs_folder_is_a_recipe(runs: Path) -> None:
    run = run_of(runs, "teacher")
    for source in (run.path, run.path / "config.json"):
        assert load_recipe(str(source), {}, {}).model_dump(mode="json") == run.config["recipe"]
    (run.path / "config.json").write_text('{"recipe": 3}')
    with pytest.raises(RecipeError, match="expected a run's resolved recipe"):
        load_recipe(str(run.path))
    (run.path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match="holds no recipe"):
        load_recipe(str(run.path))


@pytest.mark.slow
def test_the_commands_make_the_same_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.main import get_command

    from epdistill.cli.app import app

    monkeypatch.chdir(tmp_path)
    for kind in ("teacher", "student"):
        run = run_of(made, kind)
        words = [*shlex.split(training_command(run))[1:], "--out", kind, "--quiet"]
        get_command(app).main(words, standalone_mode=False)
        again = open_run(tmp_path / kind)
        assert again.config["weights_sha256"] == run.config["weights_sha256"]
