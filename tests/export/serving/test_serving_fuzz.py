"""Whatever is sent: a clear refusal or a right answer, never a crash, a hang or a leak."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epdistill.export.runtime import OnnxClassifier

SAMPLES = Path(__file__).parents[3] / "export/serving/page/samples"
PICTURE = (SAMPLES / "ship.png").read_bytes()
INFER = "/v2/models/digits/infer"
LENGTH = "Inference-Header-Content-Length"

Array = npt.NDArray[np.float32]


class Case(NamedTuple):
    """One request as bytes.

    Attributes:
        kind: What is wrong with it.
        sent: Its bytes, in pieces with a short rest between them.
        partial: The client then ends its side of the connection.
        asked: Images, where the answer must be 200 and these images' logits.
    """

    kind: str
    sent: tuple[bytes, ...]
    partial: bool = False
    asked: Array | None = None


# What may come back, None for a connection that is closed instead. Kinds that are always
# wrong never get 200; the others may be right by chance.
REFUSED: frozenset[int | None] = frozenset({400})
ALLOWED: dict[str, frozenset[int | None]] = {
    "malformed": REFUSED,
    "shape": REFUSED,
    "nan": REFUSED,
    "dtype": REFUSED,
    "huge header": REFUSED | {None},
    "truncated": REFUSED | {None},
    "slow": frozenset({200}),
    "field": REFUSED | {200},
    "binary": REFUSED | {200},
    "body": REFUSED,
    "picture": REFUSED | {200, 404, 415},
    "route": REFUSED | {200, 404, 405},
    "header": REFUSED | {200, 413, 415, None},
}


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


def packed(
    body: bytes,
    *,
    method: str = "POST",
    path: str = INFER,
    length: int | None = None,
    **headers: str,
) -> bytes:
    """A whole request."""
    size = str(len(body) if length is None else length)
    given = {"Host": "x", "Content-Length": size, **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in given.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def tensor_of(**changes: Any) -> dict[str, Any]:
    return {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", **changes}


def whole(**changes: Any) -> bytes:
    """JSON that is in order but for the changes of its tensor."""
    return json.dumps({"inputs": [tensor_of(**{"data": [0.5] * 64, **changes})]}).encode()


def binary(tensor: dict[str, Any], raw: bytes, told: object = None) -> bytes:
    head = json.dumps({"inputs": [tensor]}).encode()
    length = {LENGTH: str(len(head) if told is None else told)}
    return packed(head + raw, **length)


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    return Case(kind, *globals()["_" + kind.replace(" ", "_")](draw))


Parts = tuple[tuple[bytes, ...], bool] | tuple[tuple[bytes, ...], bool, Array]


def _malformed(draw: st.DrawFn) -> Parts:
    """JSON that is none."""
    text = whole()
    way = draw(st.sampled_from(["cut", "stray", "behind", "before", "swapped"]))
    if way == "cut":
        text = text[: draw(st.integers(0, len(text) - 1))]
    elif way == "stray":  # bytes that JSON has nowhere
        place = draw(st.integers(0, len(text)))
        text = text[:place] + bytes([draw(st.sampled_from([*range(9), 0xFF]))]) + text[place:]
    elif way == "behind":
        text += draw(st.sampled_from([b"}", b"]", b"\x00", b",", b"{}", b"//"]))
    elif way == "before":
        text = draw(st.sampled_from([b"\xef\xbb\xbf", b")", b"'", b"]", b"\x00", b"{"])) + text
    else:
        old, new = draw(st.sampled_from([(b":", b";"), (b",", b" "), (b'"', b"'"), (b"}", b"]")]))
        text = text.replace(old, new)
    return (packed(text),), False


def _shape(draw: st.DrawFn) -> Parts:
    """A shape that is not that of the 64 numbers, or of the 256 bytes."""
    sizes = st.integers(-3, 9) | st.sampled_from([64, 65, 1 << 31, 1 << 62, 1 << 70])
    lie = draw(
        st.lists(sizes | st.sampled_from([True, 1.0, None, "1", []]), max_size=6)
        | st.tuples(sizes, st.just(1), st.just(8), st.just(8)).map(list)
        | st.sampled_from([None, 64, "1x1x8x8", {}, [[1, 1, 8, 8]]])
    )
    if lie == [1, 1, 8, 8] and all(type(size) is int for size in lie):
        lie = [2, 1, 8, 8]
    if draw(st.booleans()):
        return (packed(whole(shape=lie)),), False
    told = {"parameters": {"binary_data_size": 256}}
    return (binary(tensor_of(shape=lie, **told), bytes(256)),), False


def _nan(draw: st.DrawFn) -> Parts:
    """Numbers that are not finite, as words, as too large ones, or as bits."""
    place = draw(st.integers(0, 63))
    if draw(st.booleans()):
        words = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e39", b"nan", b"-NaN"]
        numbers = [b"0.5"] * 64
        numbers[place] = draw(st.sampled_from(words))
        return (packed(whole(data=[]).replace(b"[]", b"[" + b",".join(numbers) + b"]")),), False
    values = np.full(64, 0.5, np.float32)
    values.view(np.uint32)[place] = draw(st.integers(0, (1 << 23) - 1)) | draw(
        st.sampled_from([0x7F800000, 0xFF800000])
    )
    tensor = tensor_of(parameters={"binary_data_size": 256})
    return (binary(tensor, values.tobytes()),), False


def _dtype(draw: st.DrawFn) -> Parts:
    """Another type than the model's, declared or in the data."""
    if draw(st.booleans()):
        other = st.sampled_from(
            ["FP16", "FP64", "BF16", "BOOL", "BYTES", "INT8", "INT32", "UINT8", "UINT64", "fp32"]
        )
        declared = draw(other | st.text(max_size=9) | st.none() | st.integers())
        return (packed(whole(datatype="FP64" if declared == "FP32" else declared)),), False
    wrong = draw(st.sampled_from([True, None, "0.5", "", {}, [], [0.5]]))
    data: list[Any] = [0.5] * 64
    data[draw(st.integers(0, 63))] = wrong
    if wrong is True:  # among numbers numpy reads it as 1
        data = [True] * 64
    return (packed(whole(data=data)),), False


def _huge_header(draw: st.DrawFn) -> Parts:
    """More than 16 KiB: one header, many of them, or the path."""
    size = draw(st.integers(17_000, 80_000))
    way = draw(st.sampled_from(["one", "many", "name", "path"]))
    if way == "path":
        return (packed(whole(), path=f"{INFER}?{'x' * size}"),), True
    if way == "many":
        return (packed(whole(), **{f"X-{k}": "y" * 20 for k in range(size // 20)}),), True
    names = {"one": ("X-Large", "x" * size), "name": ("X" * size, "1")}
    return (packed(whole(), **dict([names[way]])),), True


def _truncated(draw: st.DrawFn) -> Parts:
    """Cut anywhere, or shorter than announced; then the client ends its side."""
    sent = packed(whole())
    if draw(st.booleans()):
        sent = binary(tensor_of(parameters={"binary_data_size": 256}), bytes(256))
    return (sent[: draw(st.integers(1, len(sent) - 1))],), True


def _slow(draw: st.DrawFn) -> Parts:
    """In order, but in many pieces with a rest after each."""
    images = np.full((1, 1, 8, 8), draw(st.integers(0, 16)) / 16, np.float32)
    if draw(st.booleans()):
        sent = packed(whole(data=images.ravel().tolist()))
    else:
        sent = binary(tensor_of(parameters={"binary_data_size": 256}), images.tobytes())
    cuts = sorted(draw(st.sets(st.integers(1, len(sent) - 1), min_size=1, max_size=9)))
    pieces = tuple(sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True))
    return pieces, False, images


def _field(draw: st.DrawFn) -> Parts:
    """Anything in the place of one field."""
    tensor = tensor_of(data=[0.5] * 64)
    request: dict[str, Any] = {"inputs": [tensor]}
    holder = draw(st.sampled_from([request, tensor]))
    key = draw(st.sampled_from([*holder, "parameters", "outputs", "id"]))
    holder[key] = draw(values())
    return (packed(json.dumps(request).encode()),), False


def _binary(draw: st.DrawFn) -> Parts:
    """Lies about the bytes after the JSON."""
    size = draw(st.sampled_from([256, 255, 0, 512, -1, 1 << 40, "256", None, 256.0]))
    tensor = tensor_of(parameters={"binary_data_size": size})
    tensor["shape"][0] = draw(st.sampled_from([1, 1, 2, 0, -1, 64, 65, 1 << 62]))
    raw = draw(st.binary(max_size=8) | st.sampled_from([bytes(256), b"\xff" * 256]))
    return (
        binary(tensor, raw, draw(st.sampled_from([None, None, 0, -1, 999, "1e3", "²"]))),
    ), False


def _body(draw: st.DrawFn) -> Parts:
    return (packed(draw(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))),), False


def _picture(draw: st.DrawFn) -> Parts:
    query = draw(
        st.sampled_from(
            ["", "top=0", "top=99999999", "model=%00", "corruption=fog", "severity=9",
             "corruption=pixelate&severity=5&show=1", "seed=-1", "model=other", "%zz=%"]
        )
    )  # fmt: skip
    damaged = bytearray(PICTURE)
    for _ in range(draw(st.integers(0, 4))):
        damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
    body = bytes(damaged[: draw(st.sampled_from([len(damaged), 0, 8, 9, 30, 700]))])
    return (packed(body, path=f"/v1/classify?{query}"),), False


def _route(draw: st.DrawFn) -> Parts:
    method = draw(st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"]))
    path = draw(
        st.sampled_from(["/", "*", "//", "/v2/models/%2e%2e", "/v2/models/digits/versions/0"])
        | st.text("abv12/%.?#:\\", max_size=30).map(lambda text: "/" + text)
    )
    return (packed(whole(), method=method, path=path),), False


def _header(draw: st.DrawFn) -> Parts:
    """One to three headers that mean something, with values that do not."""
    names = st.sampled_from(
        ["Content-Length", "Transfer-Encoding", "Content-Encoding", "Expect", "Host", LENGTH,
         "Authorization", "Content-Type", "Connection", "Upgrade", "X" * 3000]
    )  # fmt: skip
    meant = st.sampled_from(
        ["", "0", "-1", "chunked", "gzip", "100-continue", "99999999999999999999", "close",
         "upgrade", "websocket", "identity, chunked", "\x01", "x" * 9_000, "é"]
    )  # fmt: skip
    values = meant | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"))
    return (packed(whole(), **draw(st.dictionaries(names, values, min_size=1, max_size=3))),), True


def exchange(address: tuple[str, int], case: Case) -> tuple[int, bytes] | None:
    """Send a case; status and body of the answer, None where the server hung up instead.

    A server that does neither for 20 seconds is hanging, which is an error.
    """
    method = case.sent[0].split(b" ", 1)[0].decode()
    with socket.create_connection(address, 20) as connection:
        try:
            for number, piece in enumerate(case.sent):
                if number:
                    time.sleep(0.002)
                connection.sendall(piece)
            if case.partial:
                connection.shutdown(socket.SHUT_WR)
        except OSError as error:  # refused before all was sent
            assert not isinstance(error, TimeoutError)
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            return response.status, response.read()
        except (http.client.HTTPException, ConnectionResetError):
            return None
        finally:
            response.close()


@contextmanager
def stalled(address: tuple[str, int]) -> Iterator[list[bytes]]:
    """Meanwhile eight clients stop in the middle of a body or a header, over and over.

    Yields what they were told.
    """
    over, told = threading.Event(), []
    whole_request = packed(whole())

    def stall(cut: int) -> None:
        while not over.is_set():
            with socket.create_connection(address, 60) as connection:
                connection.sendall(whole_request[:cut])
                told.append(connection.recv(999))

    threads = [threading.Thread(target=stall, args=(20 * k + 10,)) for k in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "the server hangs"
    assert len(told) >= len(threads)
    for line in told:  # a header that does not end is not answered
        assert line == b"" or line.startswith(b"HTTP/1.1 408 ")
    assert any(told)


def gauge(url: str, name: str) -> float:
    """One figure of the server's process."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    found = re.search(rf"^process_{name} (\S+)$", text, re.MULTILINE)
    assert found
    return float(found.group(1))


def fuzz(server: Any, direct: OnnxClassifier, examples: int) -> tuple[Counter[str], Counter[str]]:
    """Send so many cases of every kind; how often each was sent, and each status came back."""
    kinds: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    def one(case: Case) -> None:
        answer = exchange(server.address, case)
        status = None if answer is None else answer[0]
        kinds[case.kind] += 1
        seen[str(status)] += 1
        assert status in ALLOWED[case.kind], (case, answer)
        if answer is None:
            return
        # Errors are objects, but for what is no HTTP and what has no body.
        if answer[0] >= 400 and answer[1] and answer[1] != b"Invalid HTTP request received.":
            assert set(json.loads(answer[1])) == {"error"}
        if case.asked is not None:
            found = np.array(json.loads(answer[1])["outputs"][0]["data"], np.float32)
            assert found.tobytes() == direct.run(case.asked).tobytes()

    for kind in ALLOWED:
        settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(cases(kind))(one))()
    assert server.process.poll() is None
    zeros = np.zeros((1, 1, 8, 8), np.float32)
    answer = requests.post(server.url + INFER, json=json.loads(whole(data=[0] * 64)), timeout=10)
    logits = np.array(answer.json()["outputs"][0]["data"], np.float32)
    assert logits.tobytes() == direct.run(zeros).tobytes()
    return kinds, seen


def test_some_hundred_cases(server: Any, direct: OnnxClassifier) -> None:
    kinds, seen = fuzz(server, direct, 40)
    assert set(kinds) == set(ALLOWED)
    assert {"200", "400", "404", "405", "415"} <= set(seen)


@pytest.mark.slow
def test_ten_thousand_cases_without_growth_of_memory(
    start: Any, model: Path, other: Path, direct: OnnxClassifier
) -> None:
    with start(model, other) as server:
        fuzz(server, direct, 100)
        memory, files = (gauge(server.url, name) for name in ("resident_memory_bytes", "open_fds"))
        with stalled(server.address):
            kinds, _ = fuzz(server, direct, 800)
        assert sum(kinds.values()) >= 10_000
        assert all(kinds[kind] >= 600 for kind in ALLOWED), kinds
        assert gauge(server.url, "resident_memory_bytes") - memory < 32 << 20
        assert gauge(server.url, "open_fds") - files <= 2
        assert server.stop() == 0
