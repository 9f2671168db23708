"""Run folders: atomic, checked, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epdistill.errors import RunError
from epdistill.runs import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    append_metrics,
    atomic_write,
    finished_runs,
    load_weights,
    new_run_folder,
    newest_run,
    open_run,
    read_metrics,
    save_weights,
    write_json,
)


def make_run(folder: Path, kind: str = "teacher", finished: str | None = "2026-01-01") -> Path:
    folder.mkdir(parents=True)
    digest = save_weights(folder, {"w": torch.arange(6.0)})
    write_json(
        folder / CONFIG,
        {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "finished": finished,
            "weights_sha256": digest,
        },
    )
    return folder


def test_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def broken(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "a temporary file was left behind"


def test_weights_come_back(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "r"))
    assert torch.equal(load_weights(run)["w"], torch.arange(6.0))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    folder = make_run(tmp_path / "r")
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-3])
    else:
        path.unlink()
    with pytest.raises(RunError, match=r"damaged|has no"):
        load_weights(open_run(folder))


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    run, path = open_run(folder), folder / WEIGHTS
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(RunError):
            load_weights(run)


def test_wrong_kind_missing_and_foreign_folders(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", "student")
    with pytest.raises(RunError, match="is a student run; expected a teacher run"):
        open_run(folder, "teacher")
    with pytest.raises(RunError, match="does not exist"):
        open_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"has no config\.json"):
        open_run(tmp_path / "empty")
    (folder / CONFIG).write_text("{")
    with pytest.raises(RunError, match="damaged"):
        open_run(folder)
    (folder / CONFIG).write_text(json.dumps({"kind": "student", "format_version": 99}))
    with pytest.raises(RunError, match="format version 99"):
        open_run(folder)


def test_numbering_and_no_overwriting(tmp_path: Path) -> None:
    first = new_run_folder(None, tmp_path, "a")
    second = new_run_folder(None, tmp_path, "a")
    assert [first.name, second.name] == ["a-001", "a-002"]
    assert new_run_folder(None, tmp_path, "b").name == "b-001"
    held = make_run(tmp_path / "held")
    with pytest.raises(RunError, match="never overwritten"):
        new_run_folder(held, tmp_path, "a")


def test_newest_run_is_by_time_and_kind(tmp_path: Path) -> None:
    make_run(tmp_path / "old", finished="2026-01-01")
    make_run(tmp_path / "new", finished="2026-01-02")
    make_run(tmp_path / "open", finished=None)
    make_run(tmp_path / "s", "student", "2026-01-03")
    assert newest_run(tmp_path, "teacher").name == "new"
    assert [run.name for run in finished_runs(tmp_path)] == ["s", "new", "old"]
    with pytest.raises(RunError, match="epdistill distill"):
        newest_run(tmp_path / "none", "student")


def test_metrics_survive_a_torn_last_line(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"step": 1})
    append_metrics(tmp_path, {"step": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
