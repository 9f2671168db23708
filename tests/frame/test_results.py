"""What `epdistill results` records, and the page that it makes of records alone."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from epdistill.cli import main
from epdistill.console import SILENT
from epdistill.errors import EvaluationError
from epdistill.recipes import load_recipe
from epdistill.recorded import published
from epdistill.recorded.models import has_teacher, published_key, title_of, titles, told_apart
from epdistill.recorded.store import (
    ABLATION,
    BENCH,
    EVALUATION,
    RUN,
    Record,
    read_records,
    without_paths,
    write_record,
)
from epdistill.workflows.ablation import Ablated, Asked, ablate
from epdistill.workflows.context import Context, environment
from epdistill.workflows.keeping import keep

TINY = """
[data]
name = "digits"
[teacher]
channels = [4, 8]
sweeps = 20
teach_sweeps = 4
nudged_sweeps = 2
epochs = 1
batch_size = 256
[student]
name = "cnn"
width = 4
epochs = 1
batch_size = 256
[evaluate]
steps = 2
queries = 2
[ablate]
limit = 10
seeds = 2
deciding = ["ce"]
"""
RECIPE: dict[str, Any] = {
    "name": "cifar10-small",
    "seed": 3,
    "teacher": {"channels": [32, 64], "rule": "ep"},
    "student": {"name": "resnet18", "width": 16, "inputs": "mix", "noise_std": 0.1},
    "data": {"name": "cifar10"},
}
MACHINE = {"cpu": "A CPU", "cores": 2, "torch": "2.14", "torch_threads": 1, "onnxruntime": "1.31"}
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Ablated:
    runs = tmp_path_factory.mktemp("results")
    (runs / "tiny.toml").write_text(TINY)
    base = load_recipe(str(runs / "tiny.toml"), environment={})
    context = Context(runs=runs, reporter=SILENT)
    return ablate(base, context, asked=Asked(("ep-teacher", "ce", "distilled")), out=runs / "abl")


def share(accuracy: float, n: int = 100, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05], "n": n, **more}


def run_record(name: str, kind: str, **recipe: Any) -> Record:
    content = {
        "kind": kind,
        "recipe": {**copy.deepcopy(RECIPE), **recipe},
        "data": {
            "name": "cifar10",
            "train_images": 45000,
            "validation_images": 5000,
            "test_images": 10000,
        },
        "environment": MACHINE,
        "results": {"accuracy": 0.5894, "test_images": 10000, "seconds": 600.0},
        "files": [],
    }
    if kind == "student":
        content["teacher"] = {"name": "teacher"}
        content["files"] = [
            {"name": "model-int8.onnx", "precision": "int8", "figures": {"test_accuracy": 0.5864}}
        ]
    return Record(RUN, name, f"epdistill {name}", MACHINE, content)


def evaluation_record() -> Record:
    grid = [share(0.3, norm="l2", eps=0.308503), share(0.2, norm="linf", eps=0.01)]
    cells = [
        share(0.58, attack="clean", norm=None, eps=None, constant=None, adaptive=share(0.57)),
        share(
            0.41, attack="autoattack", norm="linf", eps=0.00464159, constant=None,
            adaptive=share(0.36),
        ),
    ]  # fmt: skip
    average = {"published": 0.495, "adaptive": 0.465, "complete": False}
    models = [
        {
            "name": "teacher",
            "clean": share(0.58),
            "worst_case": grid,
            "corruption_mean": share(0.5),
            "verdict": "masking evidence: attack horizon (EP)",
            "basins": {
                "states": {"alpha": 0.62, "ci95": [0.5, 0.71]},
                "labels": {"alpha": None, "ci95": None, "f": [0.9, 1.0, 1.0]},
                "images": 100,
            },
            "published": {"cells": cells, "average_robust_accuracy": average},
            "temporal": {
                "cells": [
                    share(a, norm="l2", eps=0.3, gradient=g, attack_sweeps=s, prediction_sweeps=p)
                    for a, g, s, p in (
                        (0.5, "clean", None, 10),
                        (0.6, "clean", None, 70),
                        (0.31, "unrolled", 5, None),
                        (0.35, "unrolled", 70, None),
                    )
                ],
                "worst": [share(0.3, norm="l2", eps=0.3, prediction_sweeps=10)],
            },
        },
        {
            "name": "student",
            "kind": "onnx",
            "clean": share(0.56),
            "worst_case": grid,
            "corruption_mean": None,
            "verdict": None,
            "published": None,
            "temporal": None,
        },
    ]
    content = {
        "n": 100,
        "settings": {
            "name": "paper",
            "split": "test",
            "subset": "first",
            "seed": 0,
            "attacks": [{"name": "pgd"}, {"name": "square"}],
            "pgd": {"steps": 40, "restarts": 5},
            "square": {"queries": 300},
        },
        "skipped": [{"what": "autoattack", "why": "not installed"}],
        "models": models,
    }
    return Record(EVALUATION, "paper-001", "epdistill evaluate", None, content)


def bench_record() -> Record:
    rows = [
        ("teacher, published 250 sweeps", 0.2),
        ("teacher, relaxed to tolerance", 0.02),
        ("student, onnxruntime", 0.001),
    ]
    content = {
        "models": "student",
        "hardware": MACHINE,
        "reference": rows[0][0],
        "rows": [
            {
                "name": name,
                "batch_size": 1,
                "seconds_per_batch": {"median": s, "q25": s, "q75": s},
            }
            for name, s in rows
        ],
        "ratios": [
            {"name": name, "batch_size": 1, "speedup": 0.2 / s, "low": 0.2 / s, "high": 0.2 / s}
            for name, s in rows[1:]
        ],
    }
    return Record(BENCH, "student", "epdistill bench student", MACHINE, content)


def filled(folder: Path) -> Path:
    for record in (
        run_record("teacher", "teacher"),
        run_record("student", "student"),
        evaluation_record(),
        bench_record(),
    ):
        write_record(record, folder, DIGEST)
    return folder


def test_the_page_holds_what_was_recorded(tmp_path: Path) -> None:
    done = keep([], filled(tmp_path / "records"), tmp_path / "RESULTS.md")
    text = done.page.read_text()
    lines = text.splitlines()
    assert "| EP-CNN | 3 | 58.9 (58.0-59.9, n = 10,000) | 88.0 | - | 10 |" in lines
    assert any(
        line.startswith("| resnet18 x16, distilled, half with noise 0.1 | 3 | 58.9")
        and "| +0.30 |" in line
        for line in lines
    )
    # Ours as published, ours under the worst case, theirs (from the data beside the paper).
    linf = "AutoAttack Linf 1.18/255"
    assert f"| {linf} | 41.0 (36-46) | 36.0 (31-41) | 77.0 |" in lines
    assert (
        "| average robust accuracy | 49.5 (families missing) | 46.5 (families missing) | 58.0 |"
        in lines
    )
    assert "masking evidence: attack horizon (EP)" in text
    assert "states 0.62 (0.50-0.71), labels none (90.0 to 100.0 % change), n = 100" in text
    assert "PGD takes 40 steps from 5 starts, Square 300 queries" in text
    assert "| student, onnxruntime | 1 | 1 (1-1) | 200 (200-200) |" in lines
    assert "* Not run: autoattack (not installed)" in lines
    assert "Files have no gradients" in text
    # A line that nobody measured is there for its printed figure; one with neither is not.
    assert "| C&W c = 0.005 | - | - | 42.0 |" in lines
    for stem in (
        "evaluation-paper-001-front",
        "evaluation-paper-001-teacher-horizon",
        "evaluation-paper-001-teacher-sweeps",
    ):
        assert f"records/{stem}.png)" in text
        assert (tmp_path / f"records/{stem}.png").stat().st_size > 1000
    assert str(tmp_path) not in text


def test_budgets_are_told_of_what_was_run(tmp_path: Path) -> None:
    record = evaluation_record()
    settings = record.content["settings"]
    kept = {**settings, "attacks": [one for one in settings["attacks"] if one["name"] == "square"]}
    alone = replace(record, content={**record.content, "settings": kept})
    write_record(alone, tmp_path / "records", DIGEST)
    text = keep([], tmp_path / "records", tmp_path / "RESULTS.md").page.read_text()
    assert "; Square 300 queries." in text and "PGD takes" not in text


def test_runs_that_were_timed_beside_are_points_of_the_front(tmp_path: Path) -> None:
    folder, timed, judged = filled(tmp_path / "records"), bench_record(), evaluation_record()
    timed.content["beside"] = ["rival"]
    model = judged.content["models"][-1]
    for name, how in (("rival", "onnxruntime"), ("rival/model-int8.onnx", "onnxruntime int8")):
        row = {**timed.content["rows"][-1], "name": f"rival, {how}"}
        timed.content["rows"].append(row)
        judged.content["models"].append({**model, "name": name})
    for record in (timed, judged, run_record("rival", "teacher")):
        write_record(record, folder, DIGEST)
    text = keep([], folder, tmp_path / "RESULTS.md").page.read_text()
    assert "| EP-CNN, onnxruntime int8 | 1 | 1 (1-1) |" in text
    drawn = (folder / "evaluation-paper-001-front.svg").read_text()
    for words in ("EP-CNN (onnxruntime)", "rival/model-int8.onnx (onnxruntime int8)"):
        assert words in drawn


def test_one_model_alone_is_no_front(tmp_path: Path) -> None:
    folder, judged = filled(tmp_path / "records"), evaluation_record()
    judged.content["models"] = [m for m in judged.content["models"] if m["name"] == "teacher"]
    write_record(judged, folder, DIGEST)
    # However far apart the ways to ask it are.
    assert not any(
        stem.endswith("-front") for stem in keep([], folder, tmp_path / "RESULTS.md").pictures
    )


def test_a_gpu_stands_for_the_machine_it_is_in(tmp_path: Path) -> None:
    taught = run_record("teacher", "teacher")
    for one in (taught, run_record("student", "student")):
        write_record(one, tmp_path / "records", DIGEST)
    taught.content["environment"] = {**MACHINE, "gpu": "A GPU"}
    write_record(taught, tmp_path / "records", DIGEST)
    text = keep([], tmp_path / "records", tmp_path / "RESULTS.md").page.read_text()
    assert "Trained on A CPU (2 cores, torch 2.14); A GPU (2 cores, torch 2.14)." in text
    assert environment(torch.device("cpu"))["gpu"] is None


def test_what_was_measured_of_unrecorded_runs_is_shown_too(tmp_path: Path) -> None:
    for record in (evaluation_record(), bench_record()):
        write_record(record, tmp_path / "records", DIGEST)
    text = keep([], tmp_path / "records", tmp_path / "RESULTS.md").page.read_text()
    assert "| teacher | 58.0 (53-63) |" in text
    assert "### Speed: student" in text


def test_the_page_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    records = filled(tmp_path / "records")
    (records / "notes.md").write_text("What people say.\n")
    first = keep([], records, tmp_path / "RESULTS.md")
    files = {path: path.read_bytes() for path in [first.page, *records.iterdir()]}
    assert b"What people say." in files[first.page]
    keep([], records, tmp_path / "RESULTS.md")
    assert {path: path.read_bytes() for path in files} == files


def test_an_edited_record_is_refused(tmp_path: Path) -> None:
    records = filled(tmp_path / "records")
    path = records / "run-teacher.json"
    path.write_text(path.read_text().replace("0.5894", "0.8894"))
    with pytest.raises(EvaluationError, match=r"run-teacher\.json cannot be read"):
        keep([], records, tmp_path / "RESULTS.md")
    assert not (tmp_path / "RESULTS.md").exists()


def test_no_records_and_nothing_to_record(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no records"):
        keep([], tmp_path / "none", tmp_path / "RESULTS.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds nothing to record"):
        keep([tmp_path / "empty"], tmp_path / "none", tmp_path / "RESULTS.md")
    (tmp_path / "records").mkdir()
    (tmp_path / "records/other.json").write_text('{"a": 1}')
    with pytest.raises(EvaluationError, match="no record of format 1"):
        read_records(tmp_path / "records")


def test_an_ablation_is_recorded_with_its_runs(done: Ablated, tmp_path: Path) -> None:
    kept = keep([done.folder.parent], tmp_path / "records", tmp_path / "RESULTS.md")
    kinds = [record.kind for record in read_records(tmp_path / "records")]
    # Teacher, student and plain student on the first seed, the plain one on the second too,
    # whose judge, the distilled student, stands in no row.
    assert (kinds.count(ABLATION), kinds.count(RUN)) == (1, 4)
    text = kept.page.read_text()
    for row in done.content["rows"]:
        clean, low = row["mean"][0], 100 * row["mean"][0]["ci95"][0]
        assert f"| `{row['row']}` | {len(row['seeds'])} | {clean['n']} |" in text
        assert f"{100 * clean['accuracy']:.1f}" in text
        assert f"({low:.0f}-" in text
    assert "`ce` - `ep-teacher`" in text
    distilled = next(row for row in done.content["rows"] if row["row"] == "distilled")
    lost = distilled["fidelity"]["l2"][-1]
    assert f"{100 * lost['accuracy']:.1f}, {100 * lost['teacher_accuracy']:.1f} |" in text
    assert any(stem.endswith("-fidelity") for stem in kept.pictures)
    for path in (tmp_path / "records").glob("*.json"):
        assert str(done.folder.parent.parent) not in path.read_text()
    # Recorded again: the same files, once each.
    again = keep([done.folder.parent] * 2, tmp_path / "records", tmp_path / "RESULTS.md")
    assert sorted(again.recorded) == sorted(kept.recorded)
    assert again.records == kept.records


def test_the_front_of_an_ablation_is_that_of_one_machine(done: Ablated, tmp_path: Path) -> None:
    folder, page = tmp_path / "records", tmp_path / "RESULTS.md"
    keep([done.folder.parent], folder, page)
    (ablation,) = (one for one in read_records(folder) if one.kind == ABLATION)
    runs = {row["row"]: Path(row["seeds"][0]["run"]).name for row in ablation.content["rows"]}
    timed = bench_record().content
    here = Record(BENCH, runs["distilled"], "epdistill bench", MACHINE, timed)
    alone = {**timed, "rows": timed["rows"][-1:]}
    there = Record(BENCH, runs["ce"], "epdistill bench", {**MACHINE, "cpu": "Other"}, alone)
    first, *_, last = timed["rows"]
    slow = {**last, "seconds_per_batch": first["seconds_per_batch"]}
    equal = Record(BENCH, here.name, here.command, MACHINE, {**timed, "rows": [first, slow]})
    for record in (here, there):
        write_record(record, folder, DIGEST)
    assert not any(stem.endswith("-front") for stem in keep([], folder, page).pictures)
    ablation.content["split"] = "test"
    # Which of its seeds was timed does not matter.
    (row,) = (row for row in ablation.content["rows"] if row["row"] == "distilled")
    row["seeds"].insert(0, {**row["seeds"][0], "run": "elsewhere"})
    write_record(ablation, folder, DIGEST)
    # As fast as each other: nothing to draw.
    write_record(equal, folder, DIGEST)
    assert not any(stem.endswith("-front") for stem in keep([], folder, page).pictures)
    write_record(here, folder, DIGEST)
    keep([], folder, page)
    drawn = (folder / f"{ablation.stem}-front.svg").read_text()
    assert "A CPU, 1 thread(s); 10 images" in drawn and "Other" not in drawn
    assert "(published 250 sweeps)" in drawn and "(onnxruntime)" in drawn


def test_pictures_of_examples_come_along(done: Ablated, tmp_path: Path) -> None:
    source = next((done.folder / "models").iterdir())
    assert list(source.glob("examples-*.png"))
    kept = keep([source], tmp_path / "records", tmp_path / "RESULTS.md")
    stems = [stem for stem in kept.pictures if "-examples-" in stem]
    assert stems
    for stem in stems:
        name = stem[stem.index("examples-") :]
        assert (tmp_path / f"records/{stem}.png").read_bytes() == (
            source / f"{name}.png"
        ).read_bytes()


def test_a_damaged_source_records_nothing(done: Ablated, tmp_path: Path) -> None:
    folder = tmp_path / "abl"
    shutil.copytree(done.folder.parent, folder)
    path = folder / "validation/ablation.json"
    path.write_text(path.read_text().replace("quick", "quack"))
    with pytest.raises(EvaluationError, match=r"ablation\.json cannot be read"):
        keep([folder], tmp_path / "records", tmp_path / "RESULTS.md")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("student", "title"),
    [
        ({}, "resnet18 x16, distilled, half with noise 0.1"),
        ({"loss": "ce", "inputs": "clean"}, "resnet18 x16, labels"),
        ({"loss": "ce", "inputs": "noise", "noise_std": 0.25}, "resnet18 x16, labels, noise 0.25"),
        ({"loss": "ce", "inputs": "clean", "label_smoothing": 0.1}, "resnet18 x16, smoothed labels"),  # noqa: E501
        ({"match": "logits"}, "resnet18 x16, logits alone, half with noise 0.1"),
        ({"label_weight": 1.0}, "resnet18 x16, distilled with labels, half with noise 0.1"),
        ({"inputs": "adversarial"}, "resnet18 x16, distilled, adversarial images (trained for)"),
        (
            {"targets": "clean"},
            "resnet18 x16, distilled, half with noise 0.1, the clean image's answer",
        ),
    ],
)  # fmt: skip
def test_titles_of_students(student: dict[str, Any], title: str) -> None:
    own = {**RECIPE["student"], **student}
    record = run_record("x", "student", student=own)
    assert title_of(record.content) == title
    longer = run_record("x", "student", student={**own, "epochs": 4})
    assert title_of(longer.content) == f"{title}, 4 epochs"
    assert has_teacher(title) == (student.get("loss") != "ce")


def test_titles_of_teachers() -> None:
    adv = {"adv_cnn": {"norm": "l2", "eps": 0.5}}
    found = {
        title_of(run_record("x", "teacher", **recipe).content): published_key(
            run_record("x", "teacher", **recipe).content
        )
        for recipe in (
            {},
            {"teacher": {"channels": [1], "rule": "bptt"}},
            {"model": "adv-cnn", "baselines": adv},
            {"model": "wca"},
            {"model": "bp-cnn", "baselines": {"bp_cnn": {"epochs": 15}}},
            {"model": "bp-cnn", "baselines": {"bp_cnn": {"epochs": 1}}},
            {"model": "vit", "baselines": {"vit": {"epochs": 2}}},
        )
    }
    assert found == {
        "EP-CNN": published.EP,
        "EP-CNN by BPTT": None,
        "Adv-CNN l2 0.5": published.ADV_HALF,
        "WCA-Net": "wca",
        "BP-CNN": published.BP,
        # Another number of epochs than the bundled recipe of that name has.
        "BP-CNN, 1 epoch": published.BP,
        "ViT, 2 epochs": published.VIT,
    }
    own = run_record("x", "teacher", model="vit", baselines={"vit": {"epochs": 2}}).content
    assert title_of({**own, "recipe": {**own["recipe"], "name": "mine"}}) == "ViT"


def test_models_that_would_read_alike_are_told_apart_by_their_seeds() -> None:
    short = {"bp_cnn": {"epochs": 1}}
    records = [
        run_record(f"bp-{seed}", "teacher", model="bp-cnn", baselines=short, seed=seed)
        for seed in (0, 1)
    ]
    student = run_record("s", "student", model="bp-cnn", baselines=short)
    named, runs = titles([*records, student]), {one.name: one for one in [*records, student]}
    names = ["bp-0", "s", "bp-1", "s/model-int8.onnx", "unknown"]
    told = told_apart(names, named, runs)
    words = "resnet18 x16, distilled from BP-CNN (1 epoch), half with noise 0.1"
    assert told == {
        "bp-0": "BP-CNN, 1 epoch, seed 0",
        "s": words,
        "bp-1": "BP-CNN, 1 epoch, seed 1",
        "s/model-int8.onnx": f"{words}, int8 file",
        "unknown": "unknown",
    }
    assert told_apart(["bp-0"], named, runs) == {"bp-0": "BP-CNN, 1 epoch"}
    assert published.one("cifar10", published.CLEAN, "wca") is None


def test_paths_are_cut_to_names() -> None:
    content = {"a": ["/x/y/z", "b/c"], "self_sha256": "0", "n": 3, "t": ("/q",)}
    assert without_paths(content) == {"a": ["z", "b/c"], "n": 3, "t": ["q"]}


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = filled(tmp_path / "records")
    page = tmp_path / "RESULTS.md"
    words = ["results", "--records", str(records), "--page", str(page), "--json"]
    monkeypatch.setattr(sys, "argv", ["epdistill", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(page)
    assert (told["records"], told["recorded"]) == (4, [])
    assert "evaluation-paper-001-front" in told["pictures"]
