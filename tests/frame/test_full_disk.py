"""A disk that is full, read-only or broken: one line, nothing lost, and the work goes on.

On a real filesystem of 1 MiB where one can be mounted (as root), and with errors put
between the program and the system everywhere.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from epdistill.cli import main
from epdistill.console import Reporter
from epdistill.disk import append, trouble
from epdistill.errors import DiskError
from epdistill.robustness.journal import NAME, Journal
from epdistill.runs import CARD, CONFIG, append_metrics, atomic_write, open_run, write_together
from epdistill.students.cache import VIEWS, ViewCache
from epdistill.teachers.targets import Targets
from epdistill.workflows.checking import DAMAGED, check

TINY = """
[data]
name = "digits"
[teacher]
channels = [4, 6]
init_scale = 2.0
batch_size = 256
epochs = 2
[student]
name = "cnn"
batch_size = 256
epochs = 2
[evaluate]
limit = 6
linf = [0.05]
l2 = [0.3]
steps = 1
queries = 2
"""
PAGE = 4096


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def epd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def call(*args: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["epdistill", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    # Not below pytest's own folder: a mount that outlives a killed run would stay in its way.
    folder = Path(tempfile.mkdtemp(prefix="epdistill-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        folder.rmdir()
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    yield folder
    # Lazily: a test that failed may still hold a file in there.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


class Disk:
    """The small filesystem, as the current folder, with a file that takes up room.

    Attributes:
        expected: What the same commands leave behind where there is room.
    """

    def __init__(self, folder: Path, expected: Path) -> None:
        self.folder, self.expected = folder, expected
        self.ballast = folder / "ballast"
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / "tiny.toml").write_text(TINY)

    def leave(self, pages: int) -> None:
        """Fill it up to so many pages."""
        self.free()
        room = os.statvfs(self.folder)
        self.ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - pages * PAGE))

    def free(self) -> None:
        """Give the room back."""
        self.ballast.unlink(missing_ok=True)

    def others(self, out: Path) -> dict[Path, bytes]:
        """Everything that was there before a command wrote into `out`."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {p: p.read_bytes() for p in paths if p != self.ballast and p.parent != out}

    def same(self, out: Path) -> None:
        """The folder holds what it should, but for times."""
        expected = self.expected / out.name
        assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
        for path in expected.iterdir():
            if path.name not in ("config.json", "README.md"):
                assert (out / path.name).read_bytes() == path.read_bytes(), path


TEACH = ("teach", "--recipe", "tiny.toml", "--quiet", "--out", "t")
DISTILL = (
    "distill", "--teacher", "t", "--match", "logits", "--cached-views", "1", "--quiet",
    "--out", "s",
)  # fmt: skip
EVALUATE = ("evaluate", "t", "s", "--quiet", "--out", "e")
EXPORT = ("export", "s", "--quiet", "--out", "x/model.onnx")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands leave behind on a disk that has room."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.toml").write_text(TINY)
    for command in (TEACH, DISTILL, EVALUATE, EXPORT):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "epdistill", *command],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def disk(small_disk: Path, straight: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.chdir(small_disk)
    return Disk(small_disk, straight)


def stopped(outcome: Outcome, *words: str) -> str:
    """One line: which file, why, how much is left, what is kept. Returns what it says to type."""
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    (line,) = outcome.err.splitlines()
    for word in ("cannot write", *words):
        assert word in line, line
    found = re.search(r"(kept|intact|beginning): .*, then type (.*)$", line)
    assert found, line
    return found[2]


def go_on(epd: Call, told: str, first: tuple[str, ...]) -> Outcome:
    """Type what a line said."""
    if told == "the same command again":
        return epd(*first)
    name, *args = shlex.split(told)
    assert name == "epdistill" and "--resume" in args
    return epd(*args, "--quiet")


# So many pages of 4 KiB are left at first; the last have room for everything.
ROOMS = {TEACH: (0, 1, 3, 5, 7, 9, 60), DISTILL: (1, 3, 55, 58, 60, 140),
         EVALUATE: (0, 3, 10, 40, 60, 230), EXPORT: (0, 2, 4, 100)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", ROOMS, ids=lambda command: str(command[0]))
def test_a_small_disk(command: tuple[str, ...], disk: Disk, epd: Call) -> None:
    for needed in ("t", "s")[: {"teach": 0, "distill": 1}.get(command[0], 2)]:
        shutil.copytree(disk.expected / needed, needed)
    out = disk.folder / Path(command[-1]).parts[0]
    told = []
    for pages in ROOMS[command]:
        disk.leave(pages)
        before = disk.others(out)
        outcome = epd(*command)
        assert outcome.code == 0 or pages != ROOMS[command][-1], outcome.err
        if outcome.code != 0:
            told.append(stopped(outcome, "bytes"))
            disk.free()
            done = go_on(epd, told[-1], command)
            assert done.code == 0, done.err
        disk.free()
        disk.same(out)
        after = disk.others(out)
        if command is EVALUATE:  # the cards of what is evaluated are written anew
            assert not [one for one in check([disk.folder]) if one.state == DAMAGED]
            before, after = (
                {path: data for path, data in files.items() if path.name not in (CARD, CONFIG)}
                for files in (before, after)
            )
        assert after == before
        shutil.rmtree(out)
    # How many pages are too few depends on the sizes of weights and cards.
    assert len(told) >= 3
    # Some stops came before anything was begun, others in the middle.
    assert len(set(told)) == (1 if command is EXPORT else 2), told


@pytest.mark.slow
def test_an_older_export_outlives_a_newer_one_without_room(disk: Disk, epd: Call) -> None:
    for needed in ("t", "s", "x"):
        shutil.copytree(disk.expected / needed, needed)
    for pages in (0, 2, 4):
        disk.leave(pages)
        stopped(epd(*EXPORT), "No space left on device")
        disk.same(disk.folder / "x")


# Everything below needs no filesystem of its own.

TROUBLES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG]


class Broken:
    """Stands between the program and `os.fsync`, and fails once: at the n-th call."""

    def __init__(self, n: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.number, self.real, self.calls = n, number, os.fsync, 0
        monkeypatch.setattr("os.fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.real(descriptor)


@pytest.mark.slow
def test_wherever_teaching_fails_it_goes_on(
    epd: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    with monkeypatch.context() as patched:
        counter = Broken(0, 0, patched)
        assert epd(*TEACH).code == 0
    shutil.move("t", "straight")
    assert counter.calls > 10
    for n in range(1, counter.calls + 1):
        number = TROUBLES[n % len(TROUBLES)]
        with monkeypatch.context() as patched:
            Broken(n, number, patched)
            outcome = epd(*TEACH)
        told = stopped(outcome, os.strerror(number), "bytes free")
        if n == counter.calls:
            # All that failed was to make sure of the last file.
            assert open_run(Path("t")).config["finished"]
        else:
            done = go_on(epd, told, TEACH)
            assert done.code == 0, done.err
        for name in ("model.safetensors", "metrics.jsonl"):
            assert Path("t", name).read_bytes() == Path("straight", name).read_bytes(), n
        shutil.rmtree("t")


@pytest.mark.parametrize("number", TROUBLES)
def test_files_are_as_they_were(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    atomic_write(one, "old")
    atomic_write(other, "old too")
    append_metrics(tmp_path, {"step": 1})
    journal = Journal.create(tmp_path, {"seed": 1})
    journal.put("a", 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for n, work in (
        (1, lambda: atomic_write(one, "new")),
        (1, lambda: atomic_write(one, "new", keep=tmp_path / "kept")),
        (2, lambda: write_together({one: "new", other: "new too"})),
        (1, lambda: append_metrics(tmp_path, {"step": 2})),
        (1, lambda: journal.put("b", 2)),
    ):
        with monkeypatch.context() as patched:
            Broken(n, number, patched)
            with pytest.raises(DiskError, match=os.strerror(number)) as caught:
                work()
        assert "\n" not in str(caught.value) and "bytes free" in str(caught.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    journal.put("b", 2)
    journal.close()
    with Journal.resume(tmp_path, {"seed": 1}) as again:
        assert (again.get("a"), again.get("b"), again.notes) == (1, 2, [])


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"whole\n")
    real = os.write

    def scarce(descriptor: int, data: Any) -> int:
        if len(data) <= 3:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data[:3])

    monkeypatch.setattr("os.write", scarce)
    with path.open("r+b", buffering=0) as file, pytest.raises(OSError, match="full"):
        append(file.fileno(), b"0123456789")
    assert path.read_bytes() == b"whole\n"


def test_other_errors_are_none_of_a_disks() -> None:
    assert trouble(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert trouble(OSError("no number")) is None
    found = trouble(OSError(errno.ENOSPC, "full", "nowhere/at/all"))
    assert found is not None
    assert "cannot read or write nowhere/at/all (full, " in str(found)
    assert str(found.going_on("A is kept", "B")).endswith("; A is kept: make room, then type B")
    bare = trouble(OSError(errno.ENOSPC, "full"))
    assert bare is not None and "cannot read or write (full); " in str(bare)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_news_that_nobody_can_read_stop_nothing() -> None:
    reporter = Reporter()
    full = Path("/dev/full").open("w")  # noqa: SIM115
    reporter.console = Console(file=full)
    reporter.line("news")
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_no_room_for_cached_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def teacher(images: torch.Tensor) -> Targets:
        raise AssertionError("nobody is asked")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskError, match=r"views\.f16 .No space left on device"):
        ViewCache(
            tmp_path, views=1, images=2, image=(1, 2, 2), states=[], classes=2, teacher=teacher
        )
    assert not (tmp_path / VIEWS).exists()
