"""What is unfinished is offered, and held by one process at a time."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from epdistill.cli import main
from epdistill.disk import alone
from epdistill.errors import DiskError, LostTouchError, RunError
from epdistill.robustness.journal import Journal
from epdistill.runs import sweep
from epdistill.workflows import training
from epdistill.workflows.survival import told

TINY = """
[data]
name = "digits"
[teacher]
channels = [4, 6]
batch_size = 512
epochs = 1
[student]
name = "cnn"
batch_size = 512
epochs = 1
[evaluate]
limit = 2
linf = [0.05]
l2 = [0.3]
steps = 1
queries = 1
[ablate]
seeds = 1
limit = 2
"""
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def epd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Call:
    """Types a command; its exit code, and all that it told people."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)

    def call(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["epdistill", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_unfinished_runs_are_offered(epd: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    teach = ("teach", "--recipe", "tiny.toml")
    with monkeypatch.context() as patched:
        patched.setattr(training, "_finish", stopped)
        code, said = epd(*teach)
        assert code == 130 and "unfinished" not in said
    offer = "epdistill teach --resume --out runs/tiny-ep-cnn-001 continues it"
    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", stopped)
        with alone(Path("runs/tiny-ep-cnn-001")) as ours:
            assert ours
            assert "unfinished" not in epd(*teach, "--runs", "runs")[1]
            code, said = epd("teach", "--resume", "--out", "runs/tiny-ep-cnn-001")
            assert code == 2 and "another process is training in runs/tiny-ep-cnn-001" in said
    for path in Path("runs/tiny-ep-cnn-002").iterdir():
        path.unlink()
    code, said = epd(*teach)
    assert code == 0
    assert [offer in line for line in said.splitlines()].count(True) == 1
    # The newest is finished: the older one is nobody's concern any more.
    assert "unfinished" not in epd(*teach)[1]
    with monkeypatch.context() as patched:
        patched.setattr(training, "_finish", stopped)
        assert epd("distill")[0] == 130
        code, said = epd("distill")
    assert "epdistill distill --resume --out runs/tiny-cnn-001 continues it" in said


def test_unfinished_evaluations_and_ablations_are_offered(
    epd: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert epd("teach", "--recipe", "tiny.toml", "--quiet")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr("epdistill.robustness.harness.evaluate", stopped)
        assert epd("evaluate")[0] == 130
        held = Journal()
        held._open(Path("runs/evaluate-001/journal.jsonl"), "r+b")
        assert "unfinished" not in epd("evaluate")[1]
        held.close()
        said = epd("evaluate")[1]
    assert "epdistill evaluate --resume --out runs/evaluate-002 continues it" in said
    with monkeypatch.context() as patched:
        patched.setattr("epdistill.workflows.ablation._work_through", stopped)
        ablate = ("ablate", "--recipe", "tiny.toml", "--rows", "ce")
        code, said = epd(*ablate)
        assert code == 130 and "unfinished" not in said
        said = epd(*ablate)[1]
    assert "epdistill ablate --resume --out runs/tiny-ablation-001 continues it" in said


def test_an_evaluation_that_lost_its_team_can_go_on(
    epd: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise error

        return fail

    assert epd("teach", "--recipe", "tiny.toml", "--quiet")[0] == 0
    for error, kept in ((LostTouchError("the others have gone"), True), (RunError("bad"), False)):
        with monkeypatch.context() as patched:
            patched.setattr("epdistill.robustness.harness.evaluate", failing(error))
            code, said = epd("evaluate", "--out", f"runs/{kept}")
        assert code == error.exit_code and str(error) in said  # type: ignore[attr-defined]
        assert Path(f"runs/{kept}").exists() is kept
    assert epd("evaluate", "--resume", "--out", "runs/True")[0] == 0


def test_a_full_disk_is_told_with_the_command(tmp_path: Path) -> None:
    def fails(number: int) -> None:
        with told("B", lambda: "A is kept"):
            raise OSError(number, "says the system", "a")

    with pytest.raises(
        DiskError, match=r"cannot read or write a .*; A is kept: make room, then type B$"
    ):
        fails(errno.ENOSPC)
    with pytest.raises(FileNotFoundError):  # no disk's fault
        fails(errno.ENOENT)


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    for name in (".config.json.123.tmp", "config.json", ".hidden.tmp", "a.1.tmp", ".gitignore"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", ".hidden.tmp", "a.1.tmp", ".gitignore",
    }  # fmt: skip


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with alone(tmp_path) as ours, alone(tmp_path) as theirs:
        assert ours and not theirs
    with alone(tmp_path) as ours:
        assert ours
