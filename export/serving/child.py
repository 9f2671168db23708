"""A server in a process of its own, for measuring and for load."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from epdistill.errors import ExportError
from epdistill.export.serving.wire import Connection, get_bytes

_STOP_SECONDS = 60


@dataclass(frozen=True)
class Child:
    """A running server.

    Attributes:
        address: Host and port.
        models: Names of the models, in the order of their files.
        process: The process.
    """

    address: tuple[str, int]
    models: tuple[str, ...]
    process: subprocess.Popen[str]

    def metrics(self) -> Mapping[str, float]:
        """What `/metrics` says, by name and labels as it writes them."""
        with Connection(self.address) as connection:
            text = connection.ask(get_bytes("/metrics")).body.decode()
        return {
            found[1]: float(found[2])
            for found in re.finditer(r"^([^#\s].*) (\S+)$", text, re.MULTILINE)
        }

    def stop(self) -> int:
        """End it as an orchestrator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_SECONDS)


@contextmanager
def child(
    files: Sequence[Path], *arguments: str, cores: Collection[int] | None = None
) -> Iterator[Child]:
    """Start `epdistill serve` on a free port of loopback; killed at the end if it still runs.

    Args:
        files: What is served.
        arguments: Further flags of the command.
        cores: Where it may run, None for anywhere (and where the system cannot pin).

    Raises:
        ExportError: It ended instead of answering.
    """
    command = [
        sys.executable, "-P", "-m", "epdistill", "serve", "--host", "127.0.0.1", "--port", "0",
        "--json", *arguments, *map(str, files),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "EPDISTILL_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            if cores is not None:
                os.sched_setaffinity(process.pid, cores)  # before its threads, which inherit it
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ExportError(
                    f"the server ended with {process.wait()} before it answered; expected it to "
                    "start: `epdistill serve` with the same file says why"
                )
            said = json.loads(line)
            host, _, port = said["url"].removeprefix("http://").rpartition(":")
            yield Child((host, int(port)), tuple(m["name"] for m in said["models"]), process)
        finally:
            process.kill()
