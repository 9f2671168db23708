"""Too much, too large, too slow, not allowed: each gets its own status, and nothing breaks."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import requests

from epdistill.errors import ExportError
from epdistill.export.serving.app import create_app
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.models import ServedModel, load_models
from epdistill.export.serving.settings import Limits


class Gate:
    """Holds onnxruntime up until it is opened, and records the batches."""

    def __init__(self, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.batches: list[int] = []
        run = model.classifier.run_feed

        def held(feed: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(20)
            self.batches.append(len(feed["images"]))
            return run(feed)

        monkeypatch.setattr(model.classifier, "run_feed", held)


@pytest.fixture
def models(model: Path) -> Any:
    return load_models([model], threads=1)


@pytest.fixture
def gate(models: Any, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(models["digits"], monkeypatch)


@asynccontextmanager
async def client_of(engine: Engine, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine, token))
    async with engine.running(), httpx.AsyncClient(transport=transport, base_url="http://s") as it:
        yield it


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


def request(n: int = 1) -> dict[str, Any]:
    tensor = {"name": "images", "shape": [n, 1, 8, 8], "datatype": "FP32", "data": [0] * 64 * n}
    return {"url": "/v2/models/digits/infer", "json": {"inputs": [tensor]}}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_full_queue_is_503_and_all_accepted_are_answered(models: Any, gate: Gate) -> None:
    async def work() -> None:
        engine = Engine(models, Limits(batch=4, queue=6, delay=0))
        async with client_of(engine) as client:
            first = asyncio.create_task(client.post(**request(4)))
            await until(gate.entered.is_set)
            waiting = [asyncio.create_task(client.post(**request(2))) for _ in range(3)]
            await until(lambda: engine._batchers["digits"].waiting == 6)
            refused = await client.post(**request(1))
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert "6 images wait for digits" in refused.json()["error"]
            gate.opened.set()
            answers = await asyncio.gather(first, *waiting)
            assert [answer.status_code for answer in answers] == [200] * 4
            assert (await client.post(**request(1))).status_code == 200
        assert gate.batches == [4, 4, 2, 1]

    run(work)


def test_too_late_is_504_and_is_not_computed(models: Any, gate: Gate) -> None:
    async def work() -> None:
        engine = Engine(models, Limits(deadline=0.2))
        async with client_of(engine) as client:
            first = asyncio.create_task(client.post(**request(1)))
            await until(gate.entered.is_set)
            second = await client.post(**request(2))
            assert second.status_code == 504 and "deadline" in second.json()["error"]
            assert (await first).status_code == 504
            gate.opened.set()
            assert (await client.post(**request(3))).status_code == 200
        assert gate.batches == [1, 3]

    run(work)


def test_too_many_open_requests_are_503_but_probes_are_answered(models: Any, gate: Gate) -> None:
    async def work() -> None:
        engine = Engine(models, Limits(requests=2))
        async with client_of(engine) as client:
            held = [asyncio.create_task(client.post(**request(1))) for _ in range(2)]
            await until(lambda: engine.open == 2)
            refused = await client.get("/v2")
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert (await client.get("/v2/health/live")).status_code == 200
            gate.opened.set()
            assert [answer.status_code for answer in await asyncio.gather(*held)] == [200, 200]
            assert (await client.get("/v2")).status_code == 200

    run(work)


def test_who_waited_while_the_model_was_busy_shares_a_batch(models: Any, gate: Gate) -> None:
    async def work() -> None:
        engine = Engine(models, Limits(batch=8))
        async with client_of(engine) as client:
            sent = [asyncio.create_task(client.post(**request(1)))]
            await until(gate.entered.is_set)
            sent += [asyncio.create_task(client.post(**request(n))) for n in (1, 2, 3, 2, 4)]
            await until(lambda: engine._batchers["digits"].waiting == 12)
            gate.opened.set()
            for n, answer in zip((1, 1, 2, 3, 2, 4), await asyncio.gather(*sent), strict=True):
                assert answer.json()["outputs"][0]["shape"] == [n, 10]
        assert gate.batches == [1, 8, 4]  # in their order, whole requests only

    run(work)


def test_a_request_given_up_is_not_computed(models: Any, gate: Gate) -> None:
    async def work() -> None:
        engine = Engine(models, Limits())
        async with client_of(engine) as client:
            first = asyncio.create_task(client.post(**request(1)))
            await until(gate.entered.is_set)
            body = json.dumps(request(5)["json"]).encode()
            messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

            async def receive() -> Any:
                return messages.pop(0)

            statuses: list[int] = []

            async def send(message: Any) -> None:
                statuses.extend([message["status"]] if "status" in message else [])

            scope = {
                "type": "http", "method": "POST", "path": "/v2/models/digits/infer",
                "raw_path": b"", "query_string": b"", "headers": [], "http_version": "1.1",
            }  # fmt: skip
            await client._transport.app(scope, receive, send)  # type: ignore[attr-defined]
            assert statuses == [499]
            gate.opened.set()
            assert (await first).status_code == 200
            assert (await client.post(**request(2))).status_code == 200
        assert gate.batches == [1, 2]

    run(work)


def test_a_failing_model_is_500_for_all_who_share_it(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        def broken(feed: Any) -> Any:
            raise ExportError("out of memory")

        async with client_of(Engine(models, Limits())) as client:
            with monkeypatch.context() as patched:
                patched.setattr(models["digits"].classifier, "run_feed", broken)
                for answer in await asyncio.gather(*(client.post(**request(1)) for _ in range(5))):
                    assert answer.status_code == 500 and answer.json()["error"] == "out of memory"
            assert (await client.post(**request(1))).status_code == 200

    run(work)


def test_answers_that_are_not_finite_go_as_binary_only(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        bad = np.full((1, 10), np.nan, np.float32)
        monkeypatch.setattr(models["digits"].classifier, "run_feed", lambda feed: bad)
        async with client_of(Engine(models, Limits())) as client:
            asked = request(1)
            refused = await client.post(**asked)
            assert refused.status_code == 500 and "not finite" in refused.json()["error"]
            asked["json"]["parameters"] = {"binary_data_output": True}
            answer = await client.post(**asked)
            assert answer.content.endswith(bad.tobytes())

    run(work)


def test_bodies_are_bounded(models: Any) -> None:
    async def work() -> None:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield bytes(1000)

        engine = Engine(models, Limits(body_bytes=5000, json_bytes=3000, held_bytes=5000))
        async with client_of(engine) as client:
            url = "/v2/models/digits/infer"
            declared = await client.post(url, content=bytes(5001))
            assert declared.status_code == 413 and "expected at most 5000" in declared.text
            streamed = await client.post(url, content=endless())
            assert streamed.status_code == 413
            assert (await client.post(url, content=b" " * 3001)).status_code == 413
            assert (await client.post("/v1/classify", content=bytes(5001))).status_code == 413
            packed = await client.post(url, content=b"x", headers={"content-encoding": "gzip"})
            assert packed.status_code == 415
            assert engine.intake.held == 0
            engine.intake.held = 4900
            full = await client.post(**request(1))
            assert full.status_code == 503 and "retry-after" in full.headers
            assert engine.intake.held == 4900

    run(work)


def test_headers_are_bounded_also_in_one_piece(models: Any) -> None:
    async def work() -> None:
        async with client_of(Engine(models, Limits(header_bytes=2000))) as client:
            for path, headers in (("/v2", {"x": "y" * 2000}), ("/v2?" + "y" * 2000, {})):
                refused = await client.get(path, headers=headers)
                assert refused.status_code == 400
                assert "expected at most 2000" in refused.json()["error"]
            assert (await client.get("/v2", headers={"x": "y" * 1000})).status_code == 200

    run(work)


def test_a_token_is_asked_of_all_but_probes_and_the_page(models: Any) -> None:
    async def work() -> None:
        async with client_of(Engine(models, Limits()), "s3cret") as client:
            for path in ("/v2/health/live", "/v2/health/ready", "/", "/page/playground.js"):
                assert (await client.get(path)).status_code == 200
            for path in ("/v2", "/metrics", "/v1/about", "/v2/models/digits", "/nothing"):
                refused = await client.get(path)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
            for wrong in ("Bearer s3cre", "s3cret", "Bearer s3cret ", "bearer s3cret", "Bearer ß"):
                sent = {"authorization": wrong.encode()}
                assert (await client.post(**request(1), headers=sent)).status_code == 401
            right = {"authorization": "Bearer s3cret"}
            assert (await client.post(**request(1), headers=right)).status_code == 200
            assert (await client.get("/metrics", headers=right)).status_code == 200

    run(work)


def test_not_ready_while_draining(models: Any) -> None:
    async def work() -> None:
        engine = Engine(models, Limits())
        assert not engine.ready
        async with client_of(engine) as client:
            assert (await client.get("/v2/health/ready")).json() == {"ready": True}
            engine.draining = True
            for path in ("/v2/health/ready", "/v2/models/digits/ready"):
                answer = await client.get(path)
                assert answer.status_code == 503 and answer.json()["ready"] is False
            answer = await client.post(**request(1))
            assert answer.status_code == 200 and answer.headers["connection"] == "close"
            assert (await client.get("/v2/health/live")).status_code == 200

    run(work)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch", 0), ("deadline", 0), ("deadline", float("nan")), ("delay", -1), ("queue", -5)],
)
def test_limits_are_positive(name: str, value: float) -> None:
    with pytest.raises(ExportError, match=f"{name} = {value}"):
        Limits(**{name: value})
    assert Limits(delay=0, linger=0).delay == 0


SLOW = """
import sys
from pathlib import Path
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.models import load_models
from epdistill.export.serving.server import bind, serve, url_of
from epdistill.export.serving.settings import Limits
listener = bind("127.0.0.1", 0)
limits = Limits(header_seconds=0.2, deadline=0.4, header_bytes=2000, linger=0)
engine = Engine(load_models([Path(sys.argv[1])], threads=1), limits)
serve(engine, listener, token=None, announce=lambda: print(url_of(listener), flush=True))
"""


def test_slow_and_oversized_senders_are_let_go(model: Path) -> None:
    """Headers that do not end, bodies that do not end, headers without measure."""
    command = [sys.executable, "-P", "-c", SLOW, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            host, _, port = url.removeprefix("http://").rpartition(":")

            def exchange(sent: bytes) -> bytes:
                with socket.create_connection((host, int(port)), 10) as connection:
                    connection.sendall(sent)
                    received = b""
                    while part := connection.recv(4096):
                        received += part
                    return received

            assert exchange(b"") == b""
            assert exchange(b"GET /v2 HTTP/1.1\r\nHost: x\r\n") == b""
            whole = exchange(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\nGET /v2 HTT")
            assert whole.count(b"HTTP/1.1 200") == 1
            begun = exchange(
                b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
            )
            assert begun.startswith(b"HTTP/1.1 408") and b"connection: close" in begun
            assert exchange(b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 9000).startswith(b"HTTP/1.1 400")
            assert exchange(b"\x16\x03\x01\x02\x00 no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
            assert requests.get(f"{url}/v2/health/ready", timeout=5).status_code == 200
        finally:
            process.terminate()
    assert process.returncode == 0
