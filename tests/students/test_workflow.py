"""From a teacher's run to a student's: what is written, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epdistill.console import SILENT
from epdistill.errors import EpdistillError, RecipeError
from epdistill.loading import load_student
from epdistill.recipes import load_recipe
from epdistill.runs import CARD, CONFIG, Run, open_run, read_metrics
from epdistill.students import distill as room
from epdistill.students.cache import VIEWS
from epdistill.training import Batch
from epdistill.workflows.context import Context
from epdistill.workflows.training import distill, inherit, teach


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = load_recipe(
        "digits",
        {
            "teacher.channels": [4, 8], "teacher.epochs": 1, "student.name": "cnn",
            "student.width": 4, "student.epochs": 1,
        },
        {},
    )  # fmt: skip
    runs = tmp_path_factory.mktemp("runs")
    return teach(recipe, Context(runs, reporter=SILENT), out=runs / "teacher").run


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, reporter=SILENT)


def student(taught: Run, context: Context, **changes: Any) -> Run:
    overrides = {f"student.{key}": value for key, value in changes.items()}
    return distill(None, context, teacher=taught.path, overrides=overrides).run


def test_results_and_card(taught: Run, context: Context) -> None:
    run = student(taught, context)
    results = open_run(run.path).config["results"]
    clean, noise, adversarial = (
        results["fidelity"][name] for name in ("clean", "noise", "adversarial")
    )
    for key in ("accuracy", "agreement", "ece", "r2"):
        assert results[key] == clean[key]
    assert results["teacher_accuracy"] == clean["teacher_accuracy"]
    assert len(clean["r2"]) == len(clean["cosine"]) == 2
    assert (noise["std"], adversarial["images"]) == (0.1, 200)
    folded = load_student(run).folded()
    assert results["parameters"] == sum(p.numel() for p in folded.parameters())
    # Two operations per multiply-add: 8x8 and 2x2 positions of 3x3 kernels, and the head.
    assert results["flops"] == 2 * (64 * 9 * 4 + 4 * 9 * 4 * 8 + 8 * 10)
    text = (run.path / CARD).read_text()
    assert "student of the teacher `teacher` on digits, matched to its states on `mix`" in text
    assert f"{results['ece']:.4f}" in text
    assert f"{adversarial['agreement']:.4f}" in text
    assert "not inherited" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": "adversarial", "adversarial_steps": 1}, "Trained on adversarial inputs (linf"),
        ({"inputs": "corruption", "corruptions": ["brightness"]}, "corrupted inputs (brightness)"),
        ({"loss": "ce", "label_smoothing": 0.1}, "labels alone, 0.1 of them smoothed"),
        ({"match": "logits"}, "matched to its logits alone"),
        ({"match": "last"}, "| -, "),
    ],
)
def test_the_card_says_how_it_was_trained(
    changes: dict[str, Any], words: str, taught: Run, context: Context
) -> None:
    text = (student(taught, context, **changes).path / CARD).read_text()
    assert words in text
    trained_for = changes.get("inputs") in ("adversarial", "corruption")
    assert ("not inherited from the teacher" in text) is trained_for


class KilledError(Exception):
    """Stands for SIGKILL between two epochs."""


def test_cached_views_resume_and_leave_no_file(
    taught: Run, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"cached_views": 1, "epochs": 2}
    whole = student(taught, context, **changes)
    assert not (whole.path / VIEWS).exists()
    step = room.DistillTask.step

    def dying(task: room.DistillTask, batch: Batch) -> dict[str, float]:
        if batch.epoch == 1:
            raise KilledError
        return step(task, batch)

    monkeypatch.setattr(room.DistillTask, "step", dying)
    with pytest.raises(KilledError):
        student(taught, context, **changes)
    monkeypatch.undo()
    (left,) = (path.parent for path in tmp_path.glob(f"*/{VIEWS}"))
    resumed = distill(None, context, resume=True).run
    assert resumed.path == left
    assert not (left / VIEWS).exists()
    assert resumed.config["weights_sha256"] == whole.config["weights_sha256"]
    sweeps = [row["train.sweeps"] for row in read_metrics(left)]
    assert sweeps[0] > 1
    assert sweeps[1] < 1


@pytest.mark.slow
def test_the_run_folder_of_a_torchvision_student(
    taught: Run, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.DistillTask, "step", lambda task, batch: {"loss": 0.0})
    run = student(taught, context, name="torchvision:squeezenet1_1", loss="ce")
    assert run.name == "digits-torchvision-squeezenet1_1-001"
    spec = load_student(run).spec
    assert (spec.name, spec.width) == ("torchvision:squeezenet1_1", None)


def test_another_student_takes_neither_width_nor_stages() -> None:
    content = {"student": {"name": "cnn", "width": 4, "stages": ["stage1"], "epochs": 7}}
    same = inherit(content, {"student.name": "cnn", "student.epochs": None}, "x").student
    assert (same.width, same.stages, same.epochs) == (4, ("stage1",), 7)
    other = inherit(content, {"student.name": "vit_tiny", "seed": 3}, "x")
    assert (other.student.name, other.student.width, other.student.stages) == (
        "vit_tiny",
        None,
        None,
    )
    assert (other.student.epochs, other.seed) == (7, 3)
    wide = inherit(content, {"student.name": "resnet18", "student.width": 8}, "x").student
    assert wide.width == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet81"}, "did you mean resnet18"),
        ({"stages": ["stage7"]}, "unknown stage 'stage7'"),
        ({"name": "torchvision:resnet18", "width": 8}, "which has none"),
        ({"pretrained": "none.safetensors"}, "none.safetensors cannot be read"),
        ({"corruptions": ["rain"]}, "received corruption 'rain'"),
        ({"cached_views": 1, "inputs": "adversarial"}, "cached_views = 1"),
        ({"inputs": "dirty"}, "student.inputs"),
    ],
)
def test_refused_before_a_folder_is_made(
    changes: dict[str, Any], words: str, taught: Run, context: Context, tmp_path: Path
) -> None:
    with pytest.raises(EpdistillError, match=words):
        student(taught, context, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("name", "cifar10"), ("image_size", 16)])
def test_other_data_than_the_teachers(
    key: str, value: object, taught: Run, context: Context, tmp_path: Path
) -> None:
    recipe = load_recipe("default", {f"data.{key}": value}, {})
    with pytest.raises(RecipeError, match=rf"data\.{key} = {value!r}.* was taught on"):
        distill(recipe, context, teacher=taught.path)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_data_takes_the_teachers(
    taught: Run, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.DistillTask, "step", lambda task, batch: {"loss": 0.0})
    content = json.loads((taught.path / CONFIG).read_text())
    recipe = load_recipe("default", {"student.epochs": 1, "student.width": 2}, {})
    run = distill(recipe, context, teacher=taught.path).run
    assert run.config["recipe"]["data"]["name"] == content["data"]["name"]
    assert run.config["recipe"]["name"] == "default"


def test_the_flags_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from epdistill.cli.app import app
    from epdistill.workflows import training

    seen: dict[str, Any] = {}

    def watch(recipe: object, context: object, **rest: Any) -> None:
        seen.update(rest["overrides"])
        raise KilledError

    monkeypatch.setattr(training, "distill", watch)
    flags = {
        "student": "vit_tiny", "width": 24, "loss": "ce", "match": "last", "distance": "cosine",
        "readout": "learned", "inputs": "noise", "cached-views": 2, "epochs": 3, "seed": 4,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--stream", "--workers", "5"]
    result = CliRunner().invoke(app, ["distill", "--pretrained", "weights.pth", *words])
    assert isinstance(result.exception, KilledError)
    weights = seen.pop("student.pretrained")
    assert Path(weights) == Path.cwd() / "weights.pth"
    flags["name"] = flags.pop("student")
    expected = {f"student.{name.replace('-', '_')}": value for name, value in flags.items()}
    expected["seed"] = expected.pop("student.seed")
    expected |= {"data.stream": True, "data.workers": 5}
    assert seen == expected
    assert inherit({}, seen, "flags").student.match == "last"
