"""SIGKILL at twenty random moments of teach, distill and evaluate: all end with the same bits.

Half of the moments are calls of functions, drawn among all that a command makes, the others
points in time, so that some fall into the middle of a write or of a convolution.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epdistill.robustness.journal import begun
from epdistill.runs import CONFIG, open_run
from epdistill.sealed import read_sealed
from epdistill.workflows.checking import DAMAGED, check

TINY = """
[data]
name = "digits"
[teacher]
channels = [4, 6]
init_scale = 2.0
batch_size = 128
epochs = 2
[student]
name = "cnn"
batch_size = 128
epochs = 2
[evaluate]
limit = 8
linf = [0.05]
l2 = [0.3]
steps = 2
queries = 3
"""
COMMANDS: dict[str, tuple[str, ...]] = {
    "teach": ("teach", "--recipe", "tiny.toml"),
    "distill": ("distill", "--teacher", "teach"),
    "distill cached": ("distill", "--teacher", "teach", "--match", "logits", "--cached-views", "1"),
    "evaluate": ("evaluate", "teach", "distill"),
}
TIMES = {"teach": 7, "distill": 4, "distill cached": 3, "evaluate": 6}
SEED = 7
KILLED = -signal.SIGKILL


class Server:
    """The process that runs and kills commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).with_name("mortal.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self,
        *args: str,
        calls: int | None = None,
        seconds: float | None = None,
        checkpoint_seconds: float = 0.0,
    ) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {
            "args": [*args, "--quiet"], "folder": str(self.folder), "calls": calls,
            "seconds": seconds, "log": str(self.folder / "log.txt"),
            "checkpoint_seconds": checkpoint_seconds,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def said(self) -> str:
        return (self.folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.toml").write_text(TINY)
    server = Server(folder)
    with server.process:  # closes its standard input, which ends it
        yield server
    assert server.process.returncode == 0


def go_on(server: Server, command: tuple[str, ...], out: str) -> None:
    """What a person does who finds the folder."""
    folder = server.folder / out
    if command[0] == "evaluate":
        finished = (folder / "results.json").is_file() and not begun(folder)
        resume = begun(folder)
    else:
        resume = (folder / CONFIG).is_file()
        finished = resume and bool(open_run(folder).config["finished"])
    if not finished:
        args = (command[0], "--resume") if resume else command
        done = server.run(*args, "--out", out)
        assert done["code"] == 0, server.said()


def same(one: Path, other: Path) -> None:
    """The same files; of those that hold times, the same figures."""
    for path in one.iterdir():
        if path.name == CONFIG:
            results = [dict(read_sealed(folder / CONFIG)["results"]) for folder in (one, other)]
            for found in results:
                del found["seconds"]
            assert results[0] == results[1]
        elif path.name != "README.md":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert not [finding for finding in check([other]) if finding.state == DAMAGED]


@pytest.mark.slow
def test_twenty_moments(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(SEED)
    survived, moments = 0, []
    for name, command in COMMANDS.items():
        # Undisturbed, and with a checkpoint a minute.
        straight = server.run(*command, "--out", name, checkpoint_seconds=60.0)
        assert straight["code"] == 0, server.said()
        for number in range(TIMES[name]):
            out, share = f"{name} {number}", float(generator.uniform(0.02, 0.99))
            if number % 2 == 0:
                at = {"calls": max(int(share * straight["calls"]), 1)}
                assert server.run(*command, "--out", out, **at)["code"] == KILLED
            else:
                seconds = share * straight["seconds"]
                # Where this machine was faster than before, the moment is drawn nearer.
                while server.run(*command, "--out", out, seconds=seconds)["code"] != KILLED:
                    seconds *= 0.8
                    out += "'"
                at = {"seconds": round(seconds, 3)}
            left = sorted(p.name for p in (server.folder / out).glob("*.*"))
            moments.append(f"{name}: killed at {at}, left {', '.join(left) or 'nothing'}")
            go_on(server, command, out)
            same(server.folder / name, server.folder / out)
            survived += 1
    with capsys.disabled():
        print("\n" + "\n".join(moments))  # noqa: T201
        print(f"{survived} of {sum(TIMES.values())} killed commands ended the same")  # noqa: T201
    assert survived == sum(TIMES.values()) == 20
