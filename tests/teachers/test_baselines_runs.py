"""`epdistill teach --model`: runs like any other, and mistakes that are told before training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epdistill.cli import main
from epdistill.data import to_float
from epdistill.errors import RunError
from epdistill.export.runtime import OnnxClassifier
from epdistill.loading import load_epcnn, load_teacher
from epdistill.recipes import MODELS
from epdistill.runs import Run, open_run
from epdistill.teachers.baselines.base import Baseline
from epdistill.teachers.baselines.registry import baseline_from
from epdistill.teachers.baselines.tasks import measure
from epdistill.teachers.model import EPCNN
from epdistill.workflows.context import Context
from epdistill.workflows.dynamics import dynamics
from epdistill.workflows.theorem import check

TINY = """
seed = 3
[data]
name = "digits"
[teacher]
channels = [6, 8]
init_scale = 2.0
epochs = 1
[baselines.adv_cnn]
steps = 2
[baselines.vit]
width = 16
depth = 2
heads = 2
hidden = 16
[baselines.wca]
width = 4
"""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def epd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["epdistill", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def taught(epd: Call, *args: str) -> tuple[Run, dict[str, Any]]:
    flags = ("--recipe", "tiny.toml", "--epochs", "1", "--quiet", "--json")
    code, out, err = epd("teach", *flags, *args)
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return open_run(Path(content["run"]), "teacher"), content


@pytest.mark.parametrize("name", MODELS)
def test_a_run_like_any_other(name: str, epd: Call, folder: Path) -> None:
    run, results = taught(epd, "--model", name)
    assert run.name == f"tiny-{name}-001"
    assert run.config["model"]["name"] == name
    assert run.config["recipe"]["model"] == name
    for file in ("config.json", "model.safetensors", "metrics.jsonl", "README.md"):
        assert (run.path / file).is_file(), file
    assert not (run.path / "state.safetensors").exists()
    card = (run.path / "README.md").read_text()
    assert f"{results['accuracy']:.4f}" in card and f"{results['parameters']:,}" in card
    assert results["flops"] > 0
    assert ("cifar10" in results["published"]) == (name != "wca")

    model = load_teacher(run)
    assert not model.training
    data = Context().data_of(run)
    assert (model.image_size, model.classes, model.in_channels) == (8, 10, 1)
    if name == "ep-cnn":
        assert isinstance(model, EPCNN)
        return
    assert isinstance(model, Baseline)
    found = measure(model, data.test, run.config["recipe"]["seed"])
    assert found.accuracy == results["accuracy"]
    assert (found.without_noise is None) == ("without_noise" not in results)


def test_loaded_is_saved(epd: Call, folder: Path) -> None:
    run, _ = taught(epd, "--model", "wca")
    model = load_teacher(run)
    assert isinstance(model, Baseline)
    again = baseline_from({"name": "wca", **model.describe()}, model.state_dict())
    images = to_float(Context().data_of(run).test.images[:8])
    assert torch.equal(again.targets(images).logits, model.targets(images).logits)
    answers = []
    for one in (model, again):
        torch.manual_seed(0)
        answers.append(one(images))
    assert torch.equal(*answers)


def test_weights_that_do_not_fit(epd: Call, folder: Path) -> None:
    run, _ = taught(epd, "--model", "vit")
    config = {**run.config, "model": {**run.config["model"], "name": "bp-cnn"}}
    with pytest.raises(RunError, match="do not fit together"):
        load_teacher(Run(run.path, config))


def test_what_needs_a_relaxation_refuses_a_baseline(epd: Call, folder: Path) -> None:
    run, _ = taught(epd, "--model", "bp-cnn")
    with pytest.raises(RunError, match=r"is a bp-cnn.*expected an ep-cnn"):
        load_epcnn(run)
    with pytest.raises(RunError, match="expected an ep-cnn"):
        check(Context(), run=run.path)
    with pytest.raises(RunError, match="expected an ep-cnn"):
        dynamics(Context(), run=run.path)


def test_a_file_of_a_baseline_answers_as_it_does(epd: Call, folder: Path) -> None:
    run, _ = taught(epd, "--model", "vit")
    code, out, err = epd("export", str(run.path), "--quiet", "--json")
    assert code == 0, err
    classifier = OnnxClassifier.open_checked(Path(json.loads(out)["onnx"]), threads=1)
    assert classifier.metadata["baseline_run"] == run.name
    model = load_teacher(run)
    images = to_float(Context().data_of(run).test.images[:8])
    logits = torch.from_numpy(classifier.run(images.numpy()))
    torch.testing.assert_close(logits, model.targets(images).logits, atol=1e-4, rtol=1e-4)


def test_a_random_network_is_not_exported(epd: Call, folder: Path) -> None:
    run, _ = taught(epd, "--model", "wca")
    code, out, err = epd("export", str(run.path))
    assert (code, out) == (2, "")
    assert "answers at random" in err and "distill a student" in err
    assert not list(run.path.glob("*.onnx"))


@pytest.mark.parametrize(("rule", "words"), [("bptt", "through time"), ("implicit", "implicit")])
def test_the_twins_say_how_they_learnt(rule: str, words: str, epd: Call, folder: Path) -> None:
    run, results = taught(epd, "--rule", rule)
    assert run.config["recipe"]["teacher"]["rule"] == rule
    assert words in (run.path / "README.md").read_text()
    assert results["published"] == {}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "vti"), ("unknown model 'vti'", "did you mean vit?", "bp-cnn")),
        (("--model", "vit", "--rule", "bptt"), ("--rule bptt for a vit", "ep-cnn")),
        (("--rule", "bp"), ("teacher.rule = 'bp'", "'ep', 'bptt' or 'implicit'")),
        (("--model", "vit", "--image-size", "9"), ("image size 9", "--image-size")),
        (("--model", "bp-cnn", "--image-size", "16"), ("2 channel counts", "expected 3")),
    ],
)
def test_mistakes_are_told_before_training(
    args: tuple[str, ...], words: tuple[str, ...], epd: Call, folder: Path
) -> None:
    code, out, err = epd("teach", "--recipe", "tiny.toml", *args)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "epdistill:" in line]
    for word in words:
        assert word in line
    assert not (folder / "runs").exists()


def test_the_whole_path_starts_at_an_ep_cnn(epd: Call, folder: Path) -> None:
    (folder / "vit.toml").write_text('model = "vit"\n' + TINY)
    code, out, err = epd("run", "--recipe", "vit.toml", "--quiet")
    assert (code, out) == (2, "")
    assert "model = 'vit'" in err and "ep-cnn" in err
    assert not (folder / "runs").exists()


def test_the_table_shows_size_cost_and_the_published_figure(epd: Call, folder: Path) -> None:
    code, out, _ = epd("teach", "--recipe", "tiny.toml", "--model", "adv-cnn", "--epochs", "1")
    assert code == 0
    for word in ("parameters", "FLOPs per image", "82 % (cifar10), 62 % (cifar100)"):
        assert word in out
