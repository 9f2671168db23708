"""`export` and `bench` as commands: files, manifests, cards, keys as documented."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from epdistill.cli import main
from epdistill.console import SILENT
from epdistill.data import load, to_float
from epdistill.errors import RunError
from epdistill.export import quantise
from epdistill.export.manifest import manifest_path, read_manifest
from epdistill.export.reduced import Reduced
from epdistill.export.runtime import OnnxClassifier
from epdistill.loading import load_epcnn, load_student
from epdistill.runs import open_run, write_json
from epdistill.sealed import read_sealed
from epdistill.workflows.benchmark import bench
from epdistill.workflows.context import Context
from epdistill.workflows.measured import newest_robustness

RECIPE = """
name = "tiny"
seed = 3
[teacher]
channels = [8, 8]
epochs = 2
[student]
name = "cnn"
width = 8
epochs = 2
[evaluate]
limit = 16
linf = [0.1]
l2 = []
steps = 2
queries = 5
"""

Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a teacher and a student on real digits."""
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            ["teach", "--recipe", "tiny.toml"],
            ["distill", "--recipe", "tiny.toml"],
            ["teach", "--recipe", "tiny.toml", "--model", "bp-cnn", "--epochs", "1"],
        ):
            patch.setattr(sys, "argv", ["epdistill", *command, "--quiet"])
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code in (0, None)
        yield folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def epd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def call(*args: str, code: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["epdistill", *args, "--quiet", "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert (stop.value.code or 0) == code, printed.err
        found: dict[str, Any] = json.loads(printed.out) if code == 0 else {"error": printed.err}
        return found

    return call


def test_all_precisions_of_a_student(work: Path, epd: Call, document: Any) -> None:
    done = epd("export", "--int8", "--fp16", "--max-drop", "3", "--robustness", "16")
    run = open_run(work / "runs/tiny-cnn-001")
    data = load("digits", seed=3)
    images = to_float(data.test.images)
    expected = load_student(run)(images).argmax(1)
    files = [done, *done["reduced"]]
    assert [Path(file["onnx"]).name for file in files] == [
        "model.onnx", "model-int8.onnx", "model-float16.onnx",
    ]  # fmt: skip
    assert [file["precision"] for file in files] == ["float32", "int8", "float16"]
    for file in files:
        path = Path(file["onnx"])
        labels = OnnxClassifier.open_checked(path)(images).argmax(1)
        assert (labels == expected).double().mean() > 0.95
        accuracy = float((labels == data.test.labels).double().mean())
        assert file["figures"]["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert file["size_bytes"] == path.stat().st_size
        # Square, transfer and corruptions hit the very file.
        found = file["figures"]["robustness"]
        assert found["measured_on"] == f"tiny-cnn-001/{path.name} (onnx)"
        assert {"square", "transfer"} <= set(found["attacks"])
        threats = {row["threat"]: row for row in found["threats"]}
        assert {"clean", "linf", "corruptions"} <= threats.keys()
        assert threats["linf"]["n"] == 16
        assert threats["linf"]["accuracy"] <= threats["clean"]["accuracy"]
        card = Path(file["card"]).read_text()
        assert "## Robustness" in card and file["sha256"] in card
        assert str(work) not in card + Path(file["manifest"]).read_text()
    assert Path(done["results"]).is_file()

    described = document("export.md", "The manifest")
    known = described.keys
    for file in files:
        manifest = json.loads(Path(file["manifest"]).read_text())
        assert not described.unknown(manifest)
        assert file["figures"] == manifest["figures"]
    aside = {"metadata", "format_version", "files_sha256", "self_sha256"}
    top = {key for key in known if "." not in key} - aside
    assert top - {"classes", "image_shape"} <= done.keys()
    printed = document("export.md", "`epdistill export --json`").keys
    assert done.keys() == {key for key in printed if "." not in key}
    assert {f"reduced[].{key}" for key in done["reduced"][0]} <= printed

    # The same run once more: figures of evaluations since then are in the file, so twice.
    again = [epd("export", "--out", f"{name}.onnx")["sha256"] for name in ("a", "b")]
    assert again[0] == again[1]
    inside = OnnxClassifier.open_checked(work / "a.onnx").metadata
    assert json.loads(inside["epdistill.robustness"])["measured_on"] == "tiny-cnn-001 (student)"


def test_a_triton_repository_of_all_precisions(work: Path, epd: Call, document: Any) -> None:
    done = epd("export", "--int8", "--max-drop", "5", "--format", "triton", "--out", "a/net.onnx")
    assert [model["name"] for model in done["triton"]] == ["net", "net-int8"]
    for model, file in zip(done["triton"], [done, *done["reduced"]], strict=True):
        assert model["config"] == f"a/triton/{model['name']}/config.pbtxt"
        assert model["onnx"] == f"a/triton/{model['name']}/1/model.onnx"
        assert model["validated"] is True
        assert model["sha256"] == file["sha256"]
        assert Path(model["onnx"]).read_bytes() == Path(file["onnx"]).read_bytes()
    printed = document("export.md", "`epdistill export --json`").keys
    assert {f"triton[].{key}" for key in done["triton"][0]} <= printed
    assert "onnx or triton" in epd("export", "--format", "tflite", code=2)["error"]


def test_a_teacher_s_loop_and_a_file_that_takes_bytes(work: Path, epd: Call) -> None:
    done = epd("export", "runs/tiny-ep-cnn-001", "--sweeps", "40", "--uint8-input")
    assert done["kind"] == "teacher" and done["figures"]["sweeps"] == 40
    assert read_manifest(manifest_path(Path(done["onnx"]))).kind == "teacher"
    classifier = OnnxClassifier.open_checked(Path(done["onnx"]))
    assert classifier.signature.pixels
    assert classifier.metadata["epdistill.input_layout"] == "NHWC"
    images = to_float(load("digits", seed=3).test.images[:64])
    teacher = load_epcnn(open_run(work / "runs/tiny-ep-cnn-001"))
    assert (classifier(images).argmax(1) == teacher(images).argmax(1)).double().mean() > 0.95
    shown = epd("evaluate", done["onnx"], "--limit", "8")
    assert shown["models"][0]["kind"] == "onnx"


def test_a_baseline(work: Path, epd: Call) -> None:
    done = epd("export", "runs/tiny-bp-cnn-001")
    assert done["kind"] == "baseline"
    metadata = read_manifest(Path(done["manifest"])).metadata
    assert metadata["baseline"] == "bp-cnn" and metadata["baseline_run"] == "tiny-bp-cnn-001"
    assert "teacher_run" not in metadata


def test_too_large_a_drop_writes_no_int8_file(
    work: Path, epd: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = quantise.quantise

    def worse(*args: Any, **given: Any) -> Reduced:
        found = honest(*args, **given)
        judged = replace(found.judged, accuracy=found.judged.float_accuracy - 0.03)
        return replace(found, judged=judged)

    monkeypatch.setattr(quantise, "quantise", worse)
    found = epd("export", "--int8", "--max-drop", "2.9", code=2)
    assert "3.00 points" in found["error"] and "--max-drop" in found["error"]
    assert not list((work / "runs/tiny-cnn-001").glob("model-*"))
    epd("export", "--int8", "--max-drop", "3.1")


def test_robustness_of_an_earlier_run_of_the_same_name_is_not_claimed(
    work: Path, epd: Call
) -> None:
    epd("evaluate", "runs/tiny-cnn-001", "--limit", "4")
    run = open_run(work / "runs/tiny-cnn-001")
    assert newest_robustness(work / "runs", run) is not None
    config = {**run.config, "finished": "2999-01-01T00:00:00+00:00"}
    write_json(run.path / "config.json", config)
    assert newest_robustness(work / "runs", open_run(run.path)) is None


def test_bench_times_everybody_under_documented_keys(work: Path, epd: Call, document: Any) -> None:
    done = epd("export", "--int8", "--max-drop", "5")
    content = epd("bench", "--rounds", "3", "--threads", "1", "--no-compile")
    folder = Path(content.pop("bench")).parent
    assert content == read_sealed(folder / "bench.json")
    assert content["hardware"]["torch_threads"] == 1
    assert {row["name"] for row in content["rows"]} == {
        "teacher, published 250 sweeps", "teacher, relaxed to tolerance", "student, torch",
        "student, onnxruntime", "student, onnxruntime int8",
    } == content["contenders"].keys()  # fmt: skip
    assert content["skipped"] == [{"what": "student, torch.compile", "why": "not asked for"}]
    facts = content["contenders"]
    assert facts["student, onnxruntime int8"]["size_bytes"] == done["reduced"][0]["size_bytes"]
    assert facts["student, onnxruntime"]["size_bytes"] == done["size_bytes"]
    # 250 sweeps through autograd against some tens without: this is arithmetic, not timing.
    assert (
        facts["teacher, published 250 sweeps"]["flops_per_image"]
        > 3 * facts["teacher, relaxed to tolerance"]["flops_per_image"]
        > 0
    )
    rate = max(row["flops_per_second"] for row in content["matrix"])
    for row in content["rows"]:
        flops = row["images_per_second"] * facts[row["name"]]["flops_per_image"]
        assert row["matrix_share"] == pytest.approx(flops / rate)
    assert (folder / "bench.png").stat().st_size > 10_000 and (folder / "bench.svg").is_file()
    described = document("bench-schema.md", "bench.json")
    assert content["beside"] == []
    assert not described.unknown(content) and not described.missing(content)
    medians = {
        (row["name"], row["batch_size"]): row["seconds_per_batch"]["median"]
        for row in content["rows"]
    }
    pairs = {("student, onnxruntime", "student, torch"),
             ("student, onnxruntime int8", "student, onnxruntime")}  # fmt: skip
    assert {(row["name"], row["to"]) for row in content["comparisons"]} == pairs
    assert len(content["comparisons"]) == 4
    for row in content["comparisons"]:
        size = row["batch_size"]
        ratio = medians[row["to"], size] / medians[row["name"], size]
        assert row["speedup"] == pytest.approx(ratio)


def test_bench_times_other_exported_runs_beside(work: Path, epd: Call) -> None:
    student, rival = "runs/tiny-cnn-001", "runs/tiny-bp-cnn-001"
    epd("export", student)
    done = epd("export", rival, "--int8", "--max-drop", "100")
    content = epd("bench", student, rival, "--rounds", "3", "--threads", "1", "--no-compile")
    assert content["models"] == "tiny-cnn-001" and content["beside"] == ["tiny-bp-cnn-001"]
    facts = {name: content["contenders"][f"tiny-bp-cnn-001, {name}"] for name in
             ("onnxruntime", "onnxruntime int8")}  # fmt: skip
    assert {row["name"] for row in content["rows"]} == content["contenders"].keys()
    assert facts["onnxruntime"]["size_bytes"] == done["size_bytes"]
    assert facts["onnxruntime int8"]["size_bytes"] == done["reduced"][0]["size_bytes"]
    assert (
        facts["onnxruntime"]["flops_per_image"] == open_run(Path(rival)).config["results"]["flops"]
    )


def test_what_cannot_be_timed_beside_is_refused(work: Path, epd: Call) -> None:
    context = Context(reporter=SILENT)
    student, rival = work / "runs/tiny-cnn-001", work / "runs/tiny-bp-cnn-001"
    epd("export", str(student))
    with pytest.raises(RunError, match=r"tiny-bp-cnn-001 has no model\.onnx"):
        bench(context, run=student, beside=[rival])
    with pytest.raises(RunError, match="two runs are called tiny-cnn-001"):
        bench(context, run=student, beside=[student])
    epd("export", str(rival))
    config = json.loads((rival / "config.json").read_text())
    del config["self_sha256"]
    config["data"]["channels"] = 3
    write_json(rival / "config.json", config)
    with pytest.raises(RunError, match="images of 3 channels and 8 pixels; expected 1 and 8"):
        bench(context, run=student, beside=[rival])


def test_the_price_of_a_teacher_under_documented_keys(
    work: Path, epd: Call, document: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPDISTILL__STUDENT__TEACHER_TOLERANCE", "0.05")
    teacher = "runs/tiny-ep-cnn-001"
    content = epd("bench", "distill", teacher, "--recipe", "tiny.toml", "--rounds", "3")
    assert read_sealed(Path(content.pop("distill"))) == content
    described = document("bench-schema.md", "distill.json")
    assert not described.unknown(content) and not described.missing(content)
    medians = {row["name"]: row["seconds_per_batch"]["median"] for row in content["rows"]}
    assert content["reference"] == "labels alone"
    by_name = {row["name"]: row for row in content["costs"]}
    assert medians.keys() == {"labels alone", *by_name}
    for name, row in by_name.items():
        assert row["times"] == pytest.approx(medians[name] / medians["labels alone"])
        assert row["low"] <= row["times"] <= row["high"] and row["settled"] == 1
    # The tolerance of the recipe is asked of one of the two alone.
    early, late = by_name["distilled"], by_name["distilled, teacher fully settled"]
    assert 0 < early["sweeps"] < late["sweeps"]
