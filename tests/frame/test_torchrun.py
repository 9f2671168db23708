"""The commands under torchrun: one run folder, one voice, the figures of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epdistill.runs import load_weights, open_run

SMALL = {
    "EPDISTILL__TEACHER__CHANNELS": "[4, 6]",
    "EPDISTILL__EVALUATE__LINF": "[0.03]",
    "EPDISTILL__EVALUATE__L2": "[0.3]",
    "EPDISTILL__EVALUATE__STEPS": "3",
    "EPDISTILL__EVALUATE__QUERIES": "10",
}


def epdistill(where: Path, *words: str, size: int = 2) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    program = [sys.executable, "-P", *(start if size > 1 else []), "-m", "epdistill"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*program, *words],
        cwd=where,
        env={**clean, **SMALL, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def answer(where: Path, *words: str, size: int = 2) -> dict[str, Any]:
    done = epdistill(where, *words, "--json", size=size)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_teach_distill_evaluate(tmp_path: Path) -> None:
    taught = answer(tmp_path, "teach", "--epochs", "1")
    run = open_run(tmp_path / taught["run"], "teacher")
    assert run.config["environment"]["processes"] == 2
    assert load_weights(run)
    told = answer(
        tmp_path, "distill", "--student", "cnn", "--epochs", "1", "--inputs", "noise", size=2
    )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits-cnn-001",
        "digits-ep-cnn-001",
    ]
    assert told["teacher_accuracy"] == taught["accuracy"]
    how = ("evaluate", "--limit", "300")
    # Three batches of 128, 128 and 44: two processes share them out.
    files = [answer(tmp_path, *how, size=size)["results"] for size in (2, 1)]
    together, alone = (json.loads((tmp_path / file).read_text()) for file in files)
    for content in (together, alone):
        content.pop("created", None)
    assert together == alone
    csv = [(tmp_path / file).with_suffix(".csv").read_bytes() for file in files]
    assert csv[0] == csv[1]
    left = {path.name for path in (tmp_path / files[0]).parent.iterdir()}
    assert "journal.jsonl" not in left and "results.json" in left


@pytest.mark.slow
def test_errors_are_said_once(tmp_path: Path) -> None:
    for words, told in (
        (("teach", "--recipe", "nowhere"), "unknown recipe 'nowhere'"),
        (("export",), "2 processes for a command that one does"),
        (("distill",), "no finished teacher run"),
    ):
        done = epdistill(tmp_path, *words)
        assert done.returncode != 0
        assert done.stderr.count(f"epdistill: {told}") == 1, done.stderr


@pytest.mark.slow
def test_a_run_taken_by_rank_0_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    done = epdistill(tmp_path, "teach", "--epochs", "1", "--out", "taken")
    assert done.returncode != 0
    assert done.stderr.count("epdistill: ") == 1
    assert "already holds a run" in done.stderr
