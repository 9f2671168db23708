"""`epdistill ablate`: stopping and sharing, the table and its document."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epdistill.cli import main
from epdistill.errors import RecipeError, RunError
from epdistill.recipes import Recipe, load_recipe
from epdistill.runs import open_run
from epdistill.sealed import read_sealed
from epdistill.students.distill import DistillTask
from epdistill.workflows.ablation import Ablated, Asked, ablate
from epdistill.workflows.ablation_plan import NAMES, Plan, plan_for
from epdistill.workflows.ablation_tables import tables
from epdistill.workflows.claims import claim
from epdistill.workflows.context import Context
from epdistill.workflows.training import teach

DOCUMENT = Path(__file__).parents[2] / "docs" / "ablation.md"
ROWS = ("ep-teacher", "ce")

Call = Callable[..., tuple[int, str, str]]


def quiet(runs: Path) -> Context:
    from epdistill.console import SILENT

    return Context(runs=runs, reporter=SILENT)


@pytest.fixture(scope="module")
def straight(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Ablated:
    """The ablation that nobody disturbed."""
    runs = tmp_path_factory.mktemp("straight")
    return ablate(base, quiet(runs), asked=Asked(ROWS), out=runs / "one")


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


def same(one: Ablated, other: Ablated) -> None:
    """Weights bit for bit, and every figure but the seconds."""
    runs = {path.name for path in (one.folder.parent / "cells").iterdir()}
    assert runs == {path.name for path in (other.folder.parent / "cells").iterdir()}
    for name in runs:
        mine, theirs = (
            load_file(done.folder.parent / "cells" / name / "model.safetensors")
            for done in (one, other)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    texts = [re.sub(r'"seconds": [\d.e-]+', "", json.dumps(done.content)) for done in (one, other)]
    assert texts[0] == texts[1]
    for name in ("ablation.csv", "accuracy-linf.png", "accuracy-l2.svg"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ablate.rows": ["cd"]}, ("unknown row 'cd'", "ce")),
        ({"ablate.deciding": ["distiled"]}, ("did you mean distilled?",)),
        ({"student.loss": "ce"}, ("student.loss = 'ce'", "expected 'distill'")),
        ({"teacher.rule": "bptt"}, ("teacher.rule = 'bptt'", "expected 'ep'")),
        ({"model": "vit"}, ("model = 'vit'", "ep-cnn")),
        ({"student.distance": "bce"}, ("row distilled-adv: distance bce", "[0,1]")),
        ({"student.width": 2, "student.name": "torchvision:resnet18"}, ("row distilled", "width")),
    ],
)
def test_mistakes_are_told_before_training(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
):
    recipe = load_recipe(str(tiny), changes, {})
    with pytest.raises(RecipeError) as error:
        ablate(recipe, quiet(tmp_path / "runs"))
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_the_table_says_what_the_evaluations_say(straight: Ablated, base: Recipe):
    content = straight.content
    assert content == read_sealed(straight.folder / "ablation.json")
    assert content["complete"] and not content["failed"]
    assert not (straight.folder / "crafted").exists()
    rows = {row["row"]: row for row in content["rows"]}
    assert list(rows) == list(ROWS)
    assert [len(row["seeds"]) for row in rows.values()] == [1, 2]
    top = straight.folder.parent
    for row in rows.values():
        for seed in row["seeds"]:
            results = json.loads((top / seed["evaluation"] / "results.json").read_text())
            assert results["settings"]["split"] == "validation"
            model, *others = results["models"]
            assert model["name"] == Path(seed["run"]).name
            # The images of the seed's distilled student were tried on it.
            assert [other["name"].partition("-")[0] for other in others] == ["distilled"]
            assert any(found["attack"] == "transfer" for found in model["attacks"])
            clean, *cases = seed["worst_case"]
            assert (clean["norm"], clean["eps"]) == ("clean", 0.0)
            assert {key: clean[key] for key in ("accuracy", "ci95", "n")} == model["clean"]
            theirs = [{**case} for case in model["worst_case"]]
            for case in theirs:
                case.pop("attacks")
            assert cases == theirs
            assert [(case["norm"], case["eps"]) for case in cases] == [
                ("linf", 0.02), ("linf", 0.1), ("l2", 0.3)
            ]  # fmt: skip
            config = open_run(top / seed["run"]).config
            assert config["recipe"]["seed"] == seed["seed"]
    # Validation images are others for every seed.
    assert [case["n"] for case in rows["ce"]["mean"]] == [10] * 4
    fidelity = rows["ce"]["seeds"][0]["fidelity"]
    test = open_run(top / rows["ce"]["seeds"][0]["run"]).config["results"]["fidelity"]
    assert (fidelity["clean"]["images"], test["clean"]["images"]) == (143, 359)
    pairs = {(gap["row"], gap["reference"]) for gap in content["differences"]}
    assert pairs == {("ep-teacher", "ce"), ("ce", "ep-teacher")}
    for gap in content["differences"]:
        assert gap["seeds"] == [0]
        one, other = (
            next(
                case["accuracy"]
                for case in rows[gap[side]]["seeds"][0]["worst_case"]
                if (case["norm"], case["eps"]) == (gap["norm"], gap["eps"])
            )
            for side in ("row", "reference")
        )
        assert gap["difference"] == pytest.approx(one - other)
    lines = (straight.folder / "ablation.csv").read_text().splitlines()
    assert lines[0] == "row,seed,norm,eps,accuracy,low,high,n"
    assert len(lines) == 1 + 4 * (1 + 2 + 2)


def test_what_is_printed(straight: Ablated):
    content = json.loads(json.dumps(straight.content))
    linf, l2, fidelity, clean, headline = tables(content)
    assert linf[1] == ["row", "clean", "Linf\n5.1/255", "Linf\n25.5/255"]
    assert l2[1] == ["row", "L2\n0.3", "corrupted"]
    assert [row[0] for row in l2[2]] == ["ep-teacher\n1 seed, n = 5", "ce\n2 seeds, n = 10"]
    mean = content["rows"][1]["mean"][0]
    shares = [100 * mean[key] for key in ("accuracy", "std")]
    assert linf[2][1][1].startswith("{:.1f}±{:.1f}\n".format(*shares))
    assert [row[0] for row in fidelity[2]] == ["ce"]
    assert clean[0].startswith("clean") and headline[0].startswith("L2 0.3")
    assert clean[1] == ["row", "ep-teacher", "ce"]
    assert clean[2][0][1] == clean[2][1][2] == ""
    # Robustness that was trained for never goes by another name.
    content["rows"][1]["keys"]["student.inputs"] = "adversarial"
    assert tables(content)[0][2][1][0].endswith("(not inherited)")


def test_stopped_anywhere_it_ends_the_same(
    base: Recipe, straight: Ablated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C in the middle of distilling, and again in the middle of an evaluation."""
    from epdistill.robustness.journal import Journal

    def stopping(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
        left = iter(range(calls))

        def call(*args: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*args)

        return call

    context, out = quiet(tmp_path), tmp_path / "one"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DistillTask, "step", stopping(DistillTask.step, 2))
        ablate(base, context, asked=Asked(ROWS), out=out)
    assert len(list(out.glob("cells/*/model.safetensors"))) == 1
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "put", stopping(Journal.put, 4))
        ablate(None, context, resume=True)
    assert list(out.glob("validation/models/*/journal.jsonl"))
    assert list(out.glob("validation/crafted/*.safetensors"))
    # Another row's name for a training does not make it another training.
    (sender,) = out.glob("cells/distilled-seed0-*")
    done = ablate(None, context, resume=True)
    assert sender.is_dir()
    same(done, straight)
    with pytest.raises(RunError, match="no unfinished ablation"):
        ablate(None, context, resume=True)
    with pytest.raises(RunError, match="already holds an ablation"):
        ablate(base, context, out=out)


def test_the_same_networks_on_test_images(straight: Ablated, monkeypatch: pytest.MonkeyPatch):
    def trained(*args: Any, **more: Any) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr("epdistill.workflows.ablation_work.teach", trained)
    monkeypatch.setattr("epdistill.workflows.ablation_work.distill", trained)
    top = straight.folder.parent
    before = (straight.folder / "ablation.json").read_bytes()
    found = ablate(None, quiet(top.parent), asked=Asked(split="test"), out=top, resume=True)
    assert found.folder == top / "test"
    assert (straight.folder / "ablation.json").read_bytes() == before
    (row,) = (row for row in found.content["rows"] if row["row"] == "ce")
    # The test images are the same for both seeds.
    assert [case["n"] for case in row["mean"]] == [5] * 4
    examples = [
        {
            line.partition(",")[0]
            for line in (top / seed["evaluation"] / "results.csv").read_text().splitlines()[1:]
        }
        for seed in row["seeds"]
    ]
    assert examples[0] == examples[1]
    results = open_run(top / row["seeds"][0]["run"]).config["results"]
    assert row["seeds"][0]["fidelity"] == results["fidelity"]


def test_what_fails_does_not_stop_the_rest(tiny: Path, tmp_path: Path, epd: Call):
    recipe = tmp_path / "wild.toml"
    recipe.write_text(
        tiny.read_text().replace("steps = 1\nbatch", "steps = 1\nlearning_rate = 1e30\nbatch")
    )
    out = tmp_path / "out"
    args = ("--recipe", str(recipe), "--out", str(out), "--quiet")
    code, shown, err = epd("ablate", *args, "--rows", "distilled-adv,distilled", "--seeds", "1")
    assert code == 2
    assert "3 parts could not be done" in err and "NaN or infinite logits" in err
    assert re.search(r"│ distilled +│", shown)
    content = json.loads((out / "validation" / "ablation.json").read_text())
    assert [row["row"] for row in content["rows"]] == ["distilled"]
    assert not content["complete"]
    first, *others = content["failed"].values()
    assert "NaN or infinite logits" in first
    assert others == ["what it needs could not be trained"] * 2


def test_a_teacher_from_elsewhere(base: Recipe, tiny: Path, tmp_path: Path, straight: Ablated):
    context = quiet(tmp_path)
    other = load_recipe(str(tiny), {"teacher.epochs": 2, "teacher.beta": 0.3}, {})
    run = teach(other, context).run
    with pytest.raises(RecipeError, match=r"nearest in teacher.beta = 0.3, not 0.5, teacher.epoch"):
        ablate(base, context, asked=Asked(("ep-teacher",), teachers=(run.path,)))
    run = teach(base, context).run
    done = ablate(base, context, asked=Asked(("ep-teacher",), teachers=(run.path,)))
    assert not list(done.folder.parent.glob("cells/ep-cnn*"))
    (mine,), theirs = done.content["rows"], straight.content["rows"][0]
    assert mine["seeds"][0]["run"] == str(run.path)
    assert mine["mean"] == theirs["mean"]
    resumed = ablate(None, context, out=done.folder.parent, resume=True)
    assert resumed.content == done.content


def test_the_plan_is_shown_and_nothing_is_done(tiny: Path, tmp_path: Path, epd: Call, straight):
    args = ("ablate", "--runs", str(tmp_path / "runs"), "--plan")
    code, out, err = epd(*args, "--recipe", str(tiny), "--rows", "kd,ce", "--json")
    assert code == 0, err
    cells = json.loads(out)["cells"]
    assert [(cell["label"], cell["seed"]) for cell in cells[:4]] == [
        ("ep-cnn-ep", 0), ("kd", 0), ("distilled", 0), ("ce", 0)
    ]  # fmt: skip
    assert {cell["label"]: cell["rows"] for cell in cells}["distilled"] == []
    assert cells[1]["keys"] == {"student.match": "logits", "student.readout": "learned"}
    assert all(cell["train_seconds"] > 0 for cell in cells)
    assert [cell["attack_seconds"] > 0 for cell in cells[:4]] == [False, True, False, True]
    assert not any(cell["trained"] or cell["judged"] for cell in cells)
    assert not (tmp_path / "runs").exists()
    code, out, _ = epd(*args, "--resume", "--out", str(straight.folder.parent))
    assert code == 0
    assert re.search(r"│ ce +│ student\.loss = (ce)? +│ +0, 1 │ +done │ +done │", out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--resume", "--epochs", "2"), ("--resume with teacher.epochs",)),
        (("--split", "train"), ("--split train", "validation or test")),
        (("--rows", "ce,"), ("unknown row ''",)),
        (("--resume",), ("no unfinished ablation",)),
        (("--resume", "--out", "nowhere"), ("cannot be read", "folder of an ablation")),
    ],
)
def test_bad_flags(args: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, epd: Call):
    code, out, err = epd("ablate", "--runs", str(tmp_path), *args)
    assert (code, out) == (2, "")
    for word in words:
        assert word in " ".join(err.split())


def paths(value: Any, above: str = "") -> Iterator[str]:
    """Every key of nested objects, `rows[].mean[].eps`."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield f"{above}{key}"
            yield from paths(inside, f"{above}{key}.")
    elif isinstance(value, list):
        for inside in value:
            yield from paths(inside, f"{above.removesuffix('.')}[].")


def test_the_document_lists_the_keys_of_the_file_and_no_others(straight: Ablated):
    text = DOCUMENT.read_text()
    _, _, table = text.partition("\n## ablation.json\n")
    known = set()
    for cell in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE):
        for key in re.findall(r"`([^`]+)`", cell):
            head, brace, rest = key.partition("{")
            known |= {head + name for name in (rest.rstrip("}").split(", ") if brace else [""])}
    wide = tuple(key.removesuffix("*") for key in known if key.endswith("*"))
    real = set(paths(straight.content))
    listed = {key for key in known if not key.endswith("*")}
    assert {key for key in real if not key.startswith(wide)} == listed
    for name in NAMES:
        assert f"`{name}`" in text
    assert "`row,seed,norm,eps,accuracy,low,high,n`" in text


def test_a_claim_ends_with_its_process(tmp_path: Path):
    path = tmp_path / "claims" / "part"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from epdistill.workflows.claims import claim\n"
        "with claim(Path(sys.argv[1])) as ours:\n"
        "    print(ours, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "True\n"
        assert path.read_text() == f"{child.pid}\n"
        with claim(path) as ours:
            assert not ours
        child.kill()
        child.wait()
        with claim(path) as ours:
            assert ours
            with claim(path) as again:
                assert not again
        with claim(path) as ours:
            assert ours


@pytest.mark.slow
def test_killed_and_shared_by_two_processes(tiny: Path, straight: Ablated, tmp_path: Path):
    """SIGKILL in the middle of it all, then two processes at once: the same bits."""
    out = tmp_path / "one"
    command = [sys.executable, "-P", "-m", "epdistill", "ablate", "--out", str(out), "--quiet"]

    def start(*args: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *args], stdout=pipe, stderr=pipe, text=True)

    first = start("--recipe", str(tiny), "--rows", ",".join(ROWS))
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (out / "validation" / "accuracy-l2.png").exists()
    both = [start("--resume", "--json") for _ in range(2)]
    said = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    for text, _ in said:
        content = json.loads(text)
        assert content.pop("ablation") == str(out / "validation" / "ablation.json")
        same(Ablated(out / "validation", content), straight)


def test_resuming_knows_where_the_data_lies(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Path | None] = []

    def rehearse(plan: Plan, context: Context) -> None:
        asked.append(context.data_root)

    monkeypatch.setattr("epdistill.workflows.ablation.rehearse", rehearse)
    monkeypatch.setattr("epdistill.workflows.ablation.parts_of", lambda place: [])
    context = replace(quiet(tmp_path), data_root=tmp_path / "data")
    done = ablate(base, context, asked=Asked(ROWS))
    assert done.folder == tmp_path / "tiny-ablation-001" / "validation"
    assert done.content["rows"] == [] and not done.content["complete"]
    ablate(None, quiet(tmp_path), resume=True)
    ablate(None, replace(context, data_root=tmp_path / "moved"), resume=True)
    assert asked == [tmp_path / "data", tmp_path / "data", tmp_path / "moved"]


def test_a_plan_read_back_is_the_plan(base: Recipe, straight: Ablated):
    noted = json.loads((straight.folder.parent / "plan.json").read_text())
    plan = Plan(Recipe.model_validate(noted["recipe"]), noted["seeds"])
    assert [cell.fingerprint for cell in plan.cells()] == [
        cell.fingerprint for cell in plan_for(base, ROWS).cells()
    ]
