"""Runs commands of epdistill and kills them with SIGKILL where it is told to.

Every command runs in a fork of this process, which has imported everything before: a
start costs no seconds. Orders come as lines of JSON on standard input: `args`, `folder`,
`log` (a file), and `calls` (kill at that many calls of functions of epdistill) or `seconds`
(kill after so long), or neither. The answer is a line of JSON: `code` (an exit code, or
minus the signal), `calls` and `seconds` in all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import epdistill.cli.app
import epdistill.robustness.drawing
import epdistill.robustness.harness
import epdistill.robustness.paper
import epdistill.students.distill
import epdistill.teachers.teach
import epdistill.training
import epdistill.workflows.evaluation
import epdistill.workflows.training
from epdistill.cli import main

ROOMS = tuple(f"{os.sep}{room}{os.sep}" for room in ("epdistill", "teachers", "students"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Counts calls of functions of epdistill, and dies at one of them."""

    def __init__(self, fatal: int | None) -> None:
        self.calls, self.fatal = 0, fatal

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and any(room in frame.f_code.co_filename for room in ROOMS):
            self.calls += 1
            if self.calls == self.fatal:
                die()


def child(order: dict[str, Any]) -> None:
    """Do the work, and never return."""
    os.chdir(order["folder"])
    with Path(order["log"]).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # A checkpoint after every step, instead of one a minute.
    epdistill.training.fit.__kwdefaults__["checkpoint_seconds"] = order["checkpoint_seconds"]
    sys.argv = ["epdistill", *order["args"]]
    counter, code = Counter(order["calls"]), 1
    if order["seconds"] is not None:
        timer = threading.Timer(order["seconds"], die)
        timer.daemon = True
        timer.start()
    start = time.monotonic()
    sys.setprofile(counter)
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        sys.stderr.flush()
        spent = {"calls": counter.calls, "seconds": time.monotonic() - start}
        Path(order["log"]).with_suffix(".json").write_text(json.dumps(spent))
        os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        facts = Path(order["log"]).with_suffix(".json")
        facts.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            child(order)
        _, status = os.waitpid(pid, 0)
        spent = json.loads(facts.read_text()) if facts.exists() else {}
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **spent}), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
