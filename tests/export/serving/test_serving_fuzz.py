"""Whatever is sent: a clear refusal or a right answer, never a crash, a hang or a leak."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epdistill.export.runtime import OnnxClassifier

SAMPLES = Path(__file__).parents[3] / "export/serving/page/samples"
PICTURE = (SAMPLES / "ship.png").read_bytes()
INFER = "/v2/models/digits/infer"


class Case(NamedTuple):
    """One request as bytes; after a partial one the client hangs up."""

    sent: bytes
    partial: bool


def values() -> st.SearchStrategy[Any]:
    """JSON of any kind, with what is known to hurt."""
    nasty = st.sampled_from(
        [None, True, -1, 0, 1 << 63, 1 << 200, 1e308, 1e-320, float("nan"), float("inf"), "",
         "FP32",
         "BYTES", "FP16", "images", "logits", [], {}, [1, 1, 8, 8], [[[]]], "\x00", "\ud7ff" * 9]
    )  # fmt: skip
    return st.recursive(
        nasty | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5)
        ),
        max_leaves=9,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    method, path, headers = "POST", INFER, {}
    kind = draw(st.sampled_from(["field", "binary", "body", "picture", "route", "header"]))
    tensor: dict[str, Any] = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32"}
    request: dict[str, Any] = {"inputs": [tensor]}
    body = b""
    if kind == "binary":
        size = draw(st.sampled_from([256, 255, 0, 512, -1, 1 << 40, "256", None, 256.0]))
        tensor["parameters"] = {"binary_data_size": size}
        tensor["shape"][0] = draw(st.sampled_from([1, 1, 2, 0, -1, 64, 65, 1 << 62]))
        head = json.dumps(request).encode()
        raw = draw(st.binary(max_size=8) | st.sampled_from([bytes(256), b"\xff" * 256]))
        body = head + raw
        told = draw(st.sampled_from([len(head), len(head), 0, -1, len(body) + 1, "1e3", "٣"]))
        headers["Inference-Header-Content-Length"] = str(told)
    elif kind == "picture":
        path = "/v1/classify?" + draw(
            st.sampled_from(
                ["", "top=0", "top=99999999", "model=%00", "corruption=fog", "severity=9",
                 "corruption=pixelate&severity=5&show=1", "seed=-1", "model=other", "%zz=%"]
            )
        )  # fmt: skip
        damaged = bytearray(PICTURE)
        for _ in range(draw(st.integers(0, 4))):
            damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
        body = bytes(damaged[: draw(st.sampled_from([len(damaged), 0, 8, 9, 30, 700]))])
    elif kind == "body":
        body = draw(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
    else:
        tensor["data"] = [0.5] * 64
        if kind == "field":
            holder = draw(st.sampled_from([request, tensor]))
            key = draw(st.sampled_from([*holder, "parameters", "outputs", "id"]))
            holder[key] = draw(values())
        body = json.dumps(request).encode()
    if kind == "route":
        method = draw(st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"]))
        path = draw(
            st.sampled_from(["/", "*", "//", "/v2/models/%2e%2e", "/v2/models/digits/versions/0"])
            | st.text("abv12/%.?#:\\", max_size=30).map(lambda text: "/" + text)
        )
    if kind == "header":
        name = draw(
            st.sampled_from(
                ["Content-Length", "Transfer-Encoding", "Content-Encoding", "Expect", "Host",
                 "Authorization", "Content-Type", "Connection", "Upgrade", "X" * 3000]
            )
        )  # fmt: skip
        headers[name] = draw(
            st.sampled_from(
                ["", "0", "-1", "chunked", "gzip", "100-continue", "99999999999999999999", "close",
                 "upgrade", "websocket", "identity, chunked", "\x01", "x" * 20_000, "é"]
            )
        )  # fmt: skip
    length = draw(st.sampled_from([len(body)] * 9 + [len(body) + 7]))
    headers = {"Host": "x", "Content-Length": str(length), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    cut = draw(st.sampled_from([len(body)] * 9 + [len(body) // 2]))
    sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + body[:cut]
    return Case(sent, partial=cut < length or kind == "header")


def exchange(address: tuple[str, int], case: Case) -> tuple[int, bytes] | None:
    """Send a case; status and body of the answer, None where the server hung up instead."""
    method = case.sent.split(b" ", 1)[0].decode()
    with socket.create_connection(address, 20) as connection:
        try:
            connection.sendall(case.sent)
            if case.partial:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):  # refused before all was sent
            pass
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            return response.status, response.read()
        except (http.client.HTTPException, ConnectionResetError):
            return None
        finally:
            response.close()


def resident(url: str) -> float:
    """Bytes of memory that the server's process holds."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    assert found
    return float(found.group(1))


def fuzz(server: Any, direct: OnnxClassifier, examples: int) -> dict[str, int]:
    """Send so many cases; how often each status came back."""
    seen: dict[str, int] = {}

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def one(case: Case) -> None:
        answer = exchange(server.address, case)
        status = "hung up" if answer is None else str(answer[0])
        seen[status] = seen.get(status, 0) + 1
        if answer is None:
            assert case.partial, case
            return
        assert answer[0] < 500, answer
        # Errors are objects, but for what is no HTTP and what has no body.
        if answer[0] >= 400 and answer[1] and answer[1] != b"Invalid HTTP request received.":
            assert set(json.loads(answer[1])) == {"error"}

    one()
    assert server.process.poll() is None
    zeros = np.zeros((1, 1, 8, 8), np.float32)
    tensor = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0] * 64}
    answer = requests.post(server.url + INFER, json={"inputs": [tensor]}, timeout=10)
    logits = np.array(answer.json()["outputs"][0]["data"], np.float32)
    assert logits.tobytes() == direct.run(zeros).tobytes()
    return seen


def test_some_hundred_cases(server: Any, direct: OnnxClassifier) -> None:
    seen = fuzz(server, direct, 400)
    assert {"200", "400", "404", "405", "415"} <= set(seen)


@pytest.mark.slow
def test_ten_thousand_cases_without_growth_of_memory(server: Any, direct: OnnxClassifier) -> None:
    fuzz(server, direct, 1000)
    before = resident(server.url)
    seen = fuzz(server, direct, 10_000)
    assert sum(seen.values()) >= 10_000
    assert resident(server.url) - before < 32 << 20
