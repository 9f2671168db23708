"""SIGTERM under load: what the server counted as answered is what its clients got."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epdistill.errors import ExportError
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.serving.wire import Connection, infer_bytes

# A server that says after its end what it has counted.
LEDGER = """
import sys
from pathlib import Path
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.models import load_models
from epdistill.export.serving.server import bind, serve
from epdistill.export.serving.settings import Limits
from uvicorn.protocols.http.h11_impl import H11Protocol
accepted, made = [0], H11Protocol.connection_made
def counted(self, transport):
    accepted[0] += 1
    made(self, transport)
H11Protocol.connection_made = counted
listener = bind("127.0.0.1", 0)
engine = Engine(load_models([Path(sys.argv[1])], threads=1), Limits(linger=float(sys.argv[2])))
port = listener.getsockname()[1]
serve(engine, listener, token=None, announce=lambda: print(port, flush=True))
print(engine.metrics.text().decode(), accepted[0], engine.open, engine.intake.held)
"""


@contextmanager
def ledger(model: Path, linger: float) -> Iterator[tuple[tuple[str, int], subprocess.Popen[str]]]:
    command = [sys.executable, "-P", "-c", LEDGER, str(model), str(linger)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield ("127.0.0.1", int(process.stdout.readline())), process
        finally:
            process.kill()


class Client:
    """Asks over and over until nobody listens; keeps account.

    Args:
        keeps: Uses a connection as long as the answers allow, else for one request.
        rests: Seconds between requests, so that an open connection is idle at the end.
    """

    def __init__(self, address: tuple[str, int], keeps: bool, rests: float) -> None:
        self.address, self.keeps, self.rests = address, keeps, rests
        self.seen: Counter[str] = Counter()
        self.thread = threading.Thread(target=self._work)

    def prepare(self, images: Any, direct: OnnxClassifier) -> None:
        self._request = infer_bytes("digits", "images", images)
        self._expected = direct.run(images)
        self.thread.start()

    def _work(self) -> None:
        while True:
            try:
                connection = Connection(self.address, 20)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                continue
            self.seen["connected"] += 1
            with connection:
                while self._ask(connection) and self.keeps:
                    time.sleep(self.rests)

    def _ask(self, connection: Connection) -> bool:
        """One request; whether the connection may be used again."""
        try:
            reply = connection.ask(self._request)
        except (OSError, ExportError) as error:
            cut = isinstance(error, TimeoutError | ExportError) and "after 0 b" not in str(error)
            self.seen["cut" if cut else "no answer"] += 1
            return False
        self.seen[str(reply.status)] += 1
        if reply.status == 200:
            logits = reply.logits(10)
            same = np.abs(logits - self._expected).max() <= 1e-6 * np.abs(self._expected).max()
            self.seen["wrong"] += not same
        return reply.headers.get(b"connection") != b"close"


@pytest.mark.slow
@pytest.mark.parametrize("linger", [0.0, 0.3])
@pytest.mark.parametrize("attempt", range(3))
def test_every_accepted_request_is_answered(
    model: Path, direct: OnnxClassifier, digits: Any, linger: float, attempt: int
) -> None:
    with ledger(model, linger) as (address, process):
        clients = [
            Client(address, keeps, rests)
            for keeps, rests in ((True, 0.0), (True, 0.02), (False, 0.0))
            for _ in range(8)
        ]
        for number, client in enumerate(clients):
            client.prepare(digits[number : number + 1 + number % 3], direct)
        time.sleep(0.5 + 0.13 * attempt)
        process.terminate()
        for client in clients:
            client.thread.join(40)
        assert not any(client.thread.is_alive() for client in clients)
        assert process.wait(40) == 0
        assert process.stdout is not None
        told = process.stdout.read()
    seen = sum((client.seen for client in clients), Counter[str]())
    counted = {
        status: int(float(count))
        for status, count in re.findall(
            r'^epdistill_requests_total\{route="\w+",status="(\d+)"\} (\S+)$', told, re.MULTILINE
        )
    }
    accepted, still_open, held = map(int, told.split()[-3:])
    assert counted == {"200": seen["200"]}, (counted, seen)
    assert seen["200"] > 0 and seen["wrong"] == seen["cut"] == 0
    assert still_open == held == 0
    # Without any answer are at most those that were in the system's queue, not accepted yet.
    assert seen["no answer"] == seen["connected"] - accepted, (accepted, seen)
