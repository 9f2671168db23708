"""The command line end to end, in process, on a tiny recipe of real digits."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epdistill.cli import main
from epdistill.errors import RunError

TINY = """
[data]
name = "digits"
[teacher]
channels = [8, 16]
init_scale = 2.0
batch_size = 32
epochs = 4
[student]
name = "cnn"
epochs = 4
batch_size = 32
[evaluate]
limit = 16
linf = [0.05, 0.1]
l2 = [0.5]
steps = 3
queries = 5
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.out)
        return content


Call = Callable[..., Outcome]


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> Outcome:
    monkeypatch.setattr(sys, "argv", ["epdistill", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    code = stop.value.code
    return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)


@pytest.fixture
def epd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return lambda *args: call(capsys, monkeypatch, *args)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the three commands of the mission were typed, with no other argument."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.toml").write_text(TINY)
    for command in (
        ["teach", "--recipe", "tiny.toml", "--quiet"],
        ["distill", "--student", "cnn", "--quiet"],
        ["export", "--quiet"],
    ):
        result = subprocess.run(
            [sys.executable, "-P", "-m", "epdistill", *command],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "next: epdistill" in result.stdout
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of `made`, as the current folder."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refused(outcome: Outcome, *words: str) -> None:
    """One line on standard error, exit code 2, no traceback."""
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    lines = [line for line in outcome.err.splitlines() if "epdistill:" in line]
    assert len(lines) == 1, outcome.err
    for word in words:
        assert word in lines[0], lines[0]


def test_what_the_three_commands_leave_behind(made: Path) -> None:
    teacher, student = made / "runs/tiny-ep-cnn-001", made / "runs/tiny-cnn-001"
    for run in (teacher, student):
        for name in ("config.json", "model.safetensors", "metrics.jsonl", "README.md"):
            assert (run / name).is_file(), name
        assert not (run / "state.safetensors").exists()
        config = json.loads((run / "config.json").read_text())
        assert config["finished"]
        assert f"{config['results']['accuracy']:.4f}" in (run / "README.md").read_text()
    assert json.loads((teacher / "config.json").read_text())["results"]["accuracy"] > 0.5


def test_the_file_gives_the_students_answers_in_plain_onnxruntime(work: Path) -> None:
    import onnxruntime

    from epdistill.data import load, to_float
    from epdistill.loading import load_student
    from epdistill.runs import open_run

    images = to_float(load("digits").test.images[:32])
    session = onnxruntime.InferenceSession(work / "runs/tiny-cnn-001/model.onnx")
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = load_student(open_run(work / "runs/tiny-cnn-001"))(images)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    assert (logits.argmax(1) == expected.argmax(1).numpy()).all()


def test_evaluate_everything_that_is_there(work: Path, epd: Call) -> None:
    outcome = epd("evaluate", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    content = outcome.json
    kinds = [model["kind"] for model in content["models"]]
    assert kinds == ["teacher", "student", "onnx"]
    on_disk = json.loads((work / content["results"]).read_text())
    assert on_disk["n"] == 16
    models = on_disk["models"]
    views = {row["view"] for row in models[0]["attacks"] if row["attack"] == "pgd"}
    assert views == {"implicit", "unrolled-2", "unrolled-5"}
    for model, brief in zip(models, content["models"], strict=True):
        assert brief.keys() == {"name", "kind", "verdict", "threats"}
        assert (brief["name"], brief["verdict"]) == (model["name"], None)
        clean, *threats = brief["threats"]
        assert clean == {"threat": "clean", "eps": None, **model["clean"]}
        cases = [("linf", 0.05), ("linf", 0.1), ("l2", 0.5), ("corruptions", None)]
        assert [(row["threat"], row["eps"]) for row in threats] == cases
        for row, worst in zip(threats, model["worst_case"], strict=False):
            assert row["accuracy"] == worst["accuracy"] <= clean["accuracy"]
            assert row["ci95"] == worst["ci95"] and row["n"] == 16
    student, onnx = models[1:]
    assert student["clean"] == onnx["clean"]
    assert student["corruptions"] == onnx["corruptions"]
    folder = (work / content["results"]).parent
    for name in ("results.csv", "accuracy-linf.png", "transfer-l2.svg"):
        assert (folder / name).is_file()
    assert not (folder / "journal.jsonl").exists()
    again = epd("evaluate", "--json", "--quiet")
    assert again.json["models"] == content["models"]
    refused(epd("evaluate", "--out", str(folder)), "already holds results")


def test_an_interrupted_evaluation_is_resumed(
    work: Path, epd: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epdistill.robustness.journal import Journal

    asked = ("evaluate", "--seed", "0", "--subset", "first", "--limit", "9", "--quiet")
    straight = epd(*asked, "--out", "straight", "--json")
    assert straight.code == 0, straight.err
    put, done = Journal.put, []

    def interrupted(journal: Journal, key: str, found: object) -> None:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(key)
        put(journal, key, found)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "put", interrupted)
        stopped = epd(*asked)
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert not (work / "runs/evaluate-001/results.json").exists()
    refused(epd("evaluate", "--resume", "--limit", "8"), "limit = 9, not 8")
    assert (work / "runs/evaluate-001/journal.jsonl").is_file()
    resumed = epd("evaluate", "--resume", "--json", "--quiet")
    assert resumed.code == 0, resumed.err
    assert resumed.json["models"] == straight.json["models"]
    for path in (work / "straight").iterdir():
        assert path.read_bytes() == (work / "runs/evaluate-001" / path.name).read_bytes()
    refused(epd("evaluate", "--resume"), "no unfinished evaluation under runs")
    refused(epd("evaluate", "--resume", "--out", "straight"), "straight is complete")


def test_radii_steps_and_split_of_an_evaluation(work: Path, epd: Call) -> None:
    asked = ("--limit", "4", "--linf", "1/10", "--l2", "0.5,0.25", "--split", "validation")
    asked += ("--steps", "3")
    done = epd("evaluate", *asked, "--out", "asked", "--json", "--quiet")
    assert done.code == 0, done.err
    settings = json.loads((work / "asked/results.json").read_text())["settings"]
    assert (settings["linf"], settings["l2"]) == ([0.1], [0.25, 0.5])
    assert (settings["split"], settings["pgd"]["steps"]) == ("validation", 3)
    refused(epd("evaluate", "--split", "train"), "split 'train'; expected test or validation")
    refused(epd("evaluate", "--linf", "x"), "--linf x; expected numbers above 0")
    refused(epd("evaluate", "--suite", "paper", "--l2", "1"), "which has its own")


@pytest.mark.slow
def test_a_killed_evaluation_is_resumed(work: Path, epd: Call) -> None:
    """SIGKILL in the middle of the attacks, several times over: the same bytes in the end."""
    command = [sys.executable, "-P", "-m", "epdistill", "evaluate", "--quiet", "--out"]
    straight = subprocess.run([*command, "straight"], capture_output=True, check=False)
    assert straight.returncode == 0
    journal = work / "killed/journal.jsonl"
    more: list[str] = []
    for lines in (5, 40):
        child = subprocess.Popen([*command, "killed", *more], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.005)
        assert child.poll() is None, "the evaluation ended before it could be killed"
        child.kill()
        child.wait()
        assert not (work / "killed/results.json").exists()
        more = ["--resume"]
    resumed = subprocess.run([*command, "killed", "--resume"], capture_output=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("results.json", "results.csv", "accuracy-linf.png"):
        assert (work / "killed" / name).read_bytes() == (work / "straight" / name).read_bytes()


def write_onnx(path: Path, *, batch: int | None = None, classes: int = 10, nan: bool = False):
    """A linear classifier of 8x8 grey images, and what may be wrong with it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows = "batch" if batch is None else batch
    weight = np.full((64, classes), np.nan if nan else 0.1, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [rows, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, classes])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"batch": 4}, ["other.onnx", "batch"]),
        ({"classes": 3}, ["other.onnx", "3 classes", "10"]),
        ({"nan": True}, ["other.onnx", "NaN"]),
    ],
)
def test_files_that_cannot_be_judged(
    work: Path, epd: Call, fault: dict[str, Any], words: list[str]
) -> None:
    write_onnx(work / "runs/tiny-cnn-001/other.onnx", **fault)
    refused(epd("evaluate", "runs/tiny-cnn-001/other.onnx"), *words)
    assert not (work / "runs/evaluate-001").exists()


def test_any_classifier_file_is_judged(work: Path, epd: Call) -> None:
    write_onnx(work / "runs/tiny-cnn-001/other.onnx")
    outcome = epd("evaluate", "runs/tiny-cnn-001/other.onnx", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    (model,) = outcome.json["models"]
    # Square runs in Linf; in L2 nothing attacked it, so there is no figure.
    assert {row["threat"] for row in model["threats"]} == {"clean", "linf", "corruptions"}


def test_bench_predict_report(work: Path, epd: Call) -> None:
    bench = epd("bench", "--rounds", "3", "--no-compile", "--json", "--quiet")
    assert bench.code == 0, bench.err
    names = {row["name"] for row in bench.json["rows"]}
    assert names == {
        "teacher, published 250 sweeps", "teacher, relaxed to tolerance",
        "student, torch", "student, onnxruntime",
    }  # fmt: skip
    assert {row["batch_size"] for row in bench.json["rows"]} == {1, 64}
    Image.new("RGB", (20, 20), (200, 10, 10)).save("a.png")
    predict = epd("predict", "a.png", "--json")
    assert predict.code == 0, predict.err
    (row,) = predict.json["predictions"]
    assert row["label"] in {str(digit) for digit in range(10)}
    assert epd("predict", "runs/tiny-cnn-001/model.onnx", "a.png").code == 0
    report = epd("report", "--json")
    page = (work / report.json["report"]).read_text()
    assert "tiny-ep-cnn-001" in page
    assert "http://" not in page
    assert page.count("<script") == 1 and "default-src 'none'" in page


def test_bench_dynamics(work: Path, epd: Call) -> None:
    outcome = epd(
        "bench", "dynamics", "runs/tiny-ep-cnn-001", "--rounds", "3", "--plot", "--json", "--quiet"
    )
    assert outcome.code == 0, outcome.err
    content = outcome.json
    for key in (
        "teach_speedup", "teach_speedup_float32", "infer_speedup", "implicit_gradient_speedup",
    ):  # fmt: skip
        assert content[key]["low"] <= content[key]["ratio"] <= content[key]["high"]
    assert content["gradient_cosine_min"] > 0.95
    assert content["converged_share"]["250"] == 1.0
    saved = content["saved_bytes"]
    assert saved["implicit"] == saved["implicit, twice the sweeps"]
    assert saved["unrolled 70"] > 1.8 * saved["unrolled 35"]
    assert (Path(content["dynamics"]).parent / "dynamics.png").stat().st_size > 10_000


def test_check_theorem(work: Path, epd: Call) -> None:
    outcome = epd("check-theorem", "--images", "4", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    content = outcome.json
    small = [row for row in content["comparisons"] if row["beta"] == 1e-4]
    assert {row["parameter"] for row in small} == {"weight 1", "weight 2", "readout"}
    assert all(row["relative_error"] < 1e-3 for row in small)
    assert (Path(content["theorem"]).parent / "theorem.png").is_file()


def test_run_is_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epd: Call) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    outcome = epd("run", "--recipe", "tiny.toml", "--epochs", "2", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    content = outcome.json
    for key in ("teacher.accuracy", "student.accuracy", "student.agreement",
                "speedup.student_over_published", "parity.max_abs_error"):  # fmt: skip
        value: Any = content
        for part in key.split("."):
            value = value[part]
        assert isinstance(value, float), key
    for path in content["paths"].values():
        assert Path(path).exists(), path
    assert "data:image/png;base64" in Path(content["paths"]["report"]).read_text()


def test_json_is_one_object_and_progress_goes_elsewhere(work: Path, epd: Call) -> None:
    outcome = epd("teach", "--recipe", "tiny.toml", "--epochs", "1", "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 1
    assert outcome.json["run"] == "runs/tiny-ep-cnn-002"
    assert "epoch 1/1" in outcome.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["teach", "--data", "digit"], ["'digit'", "digits"]),
        (["teach", "--recipe", "cifer10"], ["cifer10", "did you mean cifar10"]),
        (["teach", "--data", "cifar10", "--data-root", "nowhere"], ["nowhere", "--download"]),
        (["teach", "--precision", "float16"], ["precision", "float16"]),
        (["teach", "--device", "tpu"], ["tpu"]),
        (["teach", "--out", "runs/tiny-ep-cnn-001"], ["already holds a run"]),
        (["teach", "--resume"], ["no unfinished teacher run"]),
        (["teach", "--resume", "--out", "runs/tiny-ep-cnn-001"], ["is finished"]),
        (["distill", "--student", "resnet19"], ["resnet19", "did you mean resnet18"]),
        (["distill", "--inputs", "dirty"], ["student.inputs = 'dirty'"]),
        (["distill", "--teacher", "runs/tiny-cnn-001"], ["student run; expected a teacher"]),
        (["distill", "--teacher", "empty"], ["config.json"]),
        (["export", "runs/tiny-ep-cnn-001", "--int8"], ["relaxes", "--int8", "distill"]),
        (["export", "--sweeps", "9"], ["--sweeps", "does not relax"]),
        (["export", "--out", "model.txt"], ["model.txt", ".onnx"]),
        (["evaluate", "--suite", "quik"], ["quik", "quick"]),
        (["evaluate", "nothing"], ["nothing does not exist"]),
        (["evaluate", "--subset", "middle"], ["middle", "first, random"]),
        (["evaluate", "--corruptions", "nowhere"], ["nowhere does not exist", "CIFAR-10-C"]),
        (["evaluate", "--resume"], ["no unfinished evaluation"]),
        (["evaluate", "--resume", "--out", "empty"], ["empty has no journal.jsonl"]),
        (["predict", "missing.png"], ["missing.png"]),
        (["predict", "runs/tiny-cnn-001/model.onnx"], ["no image"]),
        (["bench", "--recipe", "nope"], ["unknown recipe 'nope'"]),
        (["bench", "distill", "a", "b"], ["expected one at most"]),
        (["bench", "--recipe", "digits", "a"], ["expected no runs"]),
        (["bench", "dynamics", "runs/tiny-cnn-001"], ["student run; expected a teacher"]),
        (["check-theorem", "runs/tiny-cnn-001"], ["student run; expected a teacher"]),
        (["report", "--runs", "elsewhere"], ["elsewhere"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(work: Path, epd: Call, args: list[str], words: list[str]) -> None:
    (work / "empty").mkdir()
    before = {path for path in work.rglob("*") if path.is_file()}
    refused(epd(*args), *words)
    assert {path for path in work.rglob("*") if path.is_file()} == before


def test_a_flag_out_of_range_is_refused_too(work: Path, epd: Call) -> None:
    outcome = epd("teach", "--epochs", "0")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "epochs" in outcome.err


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_teachers_are_refused(work: Path, epd: Call, damage: str) -> None:
    path = work / "runs/tiny-ep-cnn-001/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    refused(epd("distill"), "model.safetensors", "damaged")
    refused(epd("evaluate"), "model.safetensors", "damaged")


def test_a_tampered_export_is_not_used(work: Path, epd: Call) -> None:
    path = work / "runs/tiny-cnn-001/model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    Image.new("L", (8, 8)).save("a.png")
    refused(epd("predict", "a.png"), "model.onnx")


def write_folder(root: Path, classes: int = 2, size: int = 8) -> None:
    generator = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(20):
            pixels = generator.integers(0, 60, (size, size), dtype=np.uint8) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


def test_ones_own_images(work: Path, epd: Call) -> None:
    write_folder(work / "mine")
    path = work / "tiny.toml"
    path.write_text(path.read_text().replace("batch_size = 32", "batch_size = 8"))
    taught = epd("teach", "--recipe", "tiny.toml", "--data", "folder:mine", "--json", "--quiet")
    assert taught.code == 0, taught.err
    assert taught.json["accuracy"] > 0.9
    distilled = epd("distill", "--student", "cnn", "--json", "--quiet", "--epochs", "8")
    assert distilled.code == 0, distilled.err
    exported = epd("export", "--json", "--quiet")
    assert exported.code == 0, exported.err
    predicted = epd("predict", "mine/class1/3.png", "--json")
    assert predicted.json["predictions"][0]["label"] in ("class0", "class1")


def test_ones_own_images_without_a_recipe(work: Path, epd: Call) -> None:
    """Depth and channels follow the image size."""
    write_folder(work / "mine", size=20)
    taught = epd(
        "teach", "--data", "folder:mine", "--image-size", "32", "--epochs", "1", "--json", "--quiet"
    )
    assert taught.code == 0, taught.err
    config = json.loads((work / taught.json["run"] / "config.json").read_text())
    channels = [layer["channels"] for layer in config["model"]["architecture"]["layers"]]
    assert channels == [32, 64, 128, 128]
    assert config["recipe"]["name"] == "default"


@pytest.mark.parametrize("fault", ["one class", "broken", "mixed"])
def test_bad_folders_of_images(work: Path, epd: Call, fault: str) -> None:
    write_folder(work / "mine", classes=1 if fault == "one class" else 2)
    if fault == "broken":
        (work / "mine/class0/3.png").write_bytes(b"no image")
    elif fault == "mixed":
        Image.new("L", (9, 9)).save(work / "mine/class0/3.png")
    word = {"one class": "class", "broken": "3.png", "mixed": "--image-size"}[fault]
    refused(epd("teach", "--data", "folder:mine"), word)


def test_changed_images_are_noticed(work: Path, epd: Call) -> None:
    path = work / "runs/tiny-cnn-001/config.json"
    config = json.loads(path.read_text())
    config["data"]["test_sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    refused(epd("export", str(path.parent)), "config.json is damaged", "self_sha256", "edited")
    # Whoever edits by hand takes the checksum out.
    del config["self_sha256"]
    path.write_text(json.dumps(config))
    refused(epd("export"), "other test images")


@pytest.mark.parametrize(("student", "width"), [("cnn", None), ("resnet18", 8), (None, 8)])
def test_bench_of_another_student_leaves_the_width_behind(
    epd: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    student: str | None,
    width: int | None,
) -> None:
    """A width belongs to the student it was written for, as in distilling."""
    asked = {}

    def bench(context: Any, **more: Any) -> None:
        asked.update(more)
        raise RunError("that is all")

    monkeypatch.setattr("epdistill.workflows.benchmark.bench", bench)
    (tmp_path / "wide.toml").write_text('[student]\nname = "resnet18"\nwidth = 8\n')
    args = ("--student", student) if student else ()
    refused(epd("bench", "--recipe", str(tmp_path / "wide.toml"), *args), "that is all")
    own = asked["recipe"].student
    assert (own.name, own.width) == (student or "resnet18", width)
    assert asked["recipe"].name == "wide"


@pytest.mark.slow
def test_ctrl_c_is_clean_and_resume_gives_the_same_weights(work: Path) -> None:
    """SIGINT in the middle of teaching: exit code 130, one line, and nothing lost."""
    from safetensors.torch import load_file

    teach = [sys.executable, "-P", "-m", "epdistill", "teach"]
    # So many that the signal comes before the last one, on a busy machine too.
    command = [*teach, "--recipe", "tiny.toml", "--epochs", "40"]
    straight = subprocess.run([*command, "--out", "straight"], capture_output=True, check=False)
    assert straight.returncode == 0
    # Whoever runs these tests in the background of a shell has handed down that it is ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(
        [*command, "--out", "broken"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=heard,
    )  # fmt: skip
    metrics = work / "broken/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert metrics.exists(), "teaching wrote no epoch within two minutes"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert out == ""
    assert not list((work / "broken").glob("*.tmp"))
    unfinished = subprocess.run(
        [sys.executable, "-P", "-m", "epdistill", "distill", "--teacher", "broken"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert unfinished.returncode == 2
    assert "not finished" in unfinished.stderr
    resumed = subprocess.run(
        [*teach, "--out", "broken", "--resume"], capture_output=True, check=False
    )
    assert resumed.returncode == 0
    one, other = (load_file(work / name / "model.safetensors") for name in ("straight", "broken"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_every_command_has_help(epd: Call) -> None:
    top = epd("--help")
    assert top.code == 0
    for name in (
        "run",
        "teach",
        "distill",
        "evaluate",
        "export",
        "predict",
        "bench",
        "check-theorem",
        "ablate",
    ):
        assert re.search(rf"^\s+{name}\s", top.out, re.MULTILINE)
        assert epd(name, "--help").code == 0
    assert epd("--version").out.strip()
