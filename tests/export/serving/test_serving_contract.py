"""What every client may rely on, whatever runs the application: uvicorn, or two replicas on Ray."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from epdistill.export.runtime import OnnxClassifier

Array = npt.NDArray[np.float32]
PICTURE = Path(__file__).parents[3] / "export/serving/page/samples/digit-3.png"
# A machine that is busy with other things takes minutes to start Ray's ten processes.
PATIENCE = 300


def body_of(images: Array) -> dict[str, Any]:
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
    return {"inputs": [{**tensor, "data": images.ravel().tolist()}]}


def ask(url: str, images: Array) -> requests.Response:
    return requests.post(f"{url}/v2/models/digits/infer", json=body_of(images), timeout=60)


def logits_of(answer: requests.Response) -> Array:
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


@contextmanager
def client_of(url: str) -> Iterator[triton.InferenceServerClient]:
    address = url.removeprefix("http://")
    client = triton.InferenceServerClient(address, connection_timeout=60, network_timeout=60)
    try:
        yield client
    finally:
        client.close()
        # Its finaliser closes it again, in whatever thread collects it, which gevent refuses.
        client.close = lambda: None


def probes_and_metadata(url: str, direct: OnnxClassifier, digits: Array) -> None:
    with client_of(url) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("digits") and client.is_model_ready("other", "1")
        assert not client.is_model_ready("nobody")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        found = client.get_model_metadata("digits")
    assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]


def triton_s_client_gets_the_bits(url: str, direct: OnnxClassifier, digits: Array) -> None:
    with client_of(url) as client:
        for n in (1, 3, 64):
            expected = direct.run(digits[:n]).tobytes()
            for sends_binary in (False, True):
                for gets_binary in (False, True):
                    tensor = triton.InferInput("images", [n, 1, 8, 8], "FP32")
                    tensor.set_data_from_numpy(digits[:n], binary_data=sends_binary)
                    output = triton.InferRequestedOutput("logits", binary_data=gets_binary)
                    answer = client.infer("digits", [tensor], outputs=[output], request_id="mine")
                    assert answer.as_numpy("logits").tobytes() == expected
                    assert answer.get_response()["id"] == "mine"


def plain_requests_get_the_bits(url: str, direct: OnnxClassifier, digits: Array) -> None:
    wide = np.random.default_rng(0).normal(0, 9, (5, 1, 8, 8)).astype(np.float32)
    for batch in (digits[:1], digits[5:17], wide):
        assert logits_of(ask(url, batch)).tobytes() == direct.run(batch).tobytes()


def shared_batches_are_the_same_to_rounding(
    url: str, direct: OnnxClassifier, digits: Array
) -> None:
    def one(k: int) -> Array:
        return logits_of(ask(url, digits[k : k + 1 + k % 3]))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(100)))
    for k, logits in enumerate(answers):
        expected = direct.run(digits[k : k + 1 + k % 3])
        assert np.abs(logits - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
        assert (logits.argmax(1) == expected.argmax(1)).all()


def pictures_page_and_metrics(url: str, direct: OnnxClassifier, digits: Array) -> None:
    found = requests.post(f"{url}/v1/classify?top=2", data=PICTURE.read_bytes(), timeout=60)
    assert found.status_code == 200 and found.json()["label"] == "digit 3"
    assert len(found.json()["top"]) == 2
    assert "text/html" in requests.get(url, timeout=60).headers["content-type"]
    assert "epdistill_requests_total" in requests.get(f"{url}/metrics", timeout=60).text


def mistakes_are_the_protocol_s_error(url: str, direct: OnnxClassifier, digits: Array) -> None:
    path = f"{url}/v2/models/digits/infer"
    for status, address, content in (
        (400, path, b"{"),
        (400, path, json.dumps(body_of(digits[:65])).encode()),
        (400, path, json.dumps(body_of(digits[:1]) | {"id": 7}).encode()),
        (404, f"{url}/v2/models/nobody/infer", json.dumps(body_of(digits[:1])).encode()),
        (413, path, bytes((64 << 20) + 1)),
    ):
        answer = requests.post(address, data=content, timeout=60)
        assert answer.status_code == status, answer.text[:200]
        assert set(answer.json()) == {"error"}
    with client_of(url) as client:
        tensor = triton.InferInput("images", [1, 64], "FP32")
        tensor.set_data_from_numpy(digits[:1].reshape(1, 64))
        with pytest.raises(InferenceServerException, match=r"expected \[N, 1, 8, 8\]"):
            client.infer("digits", [tensor])


Check = Callable[[str, OnnxClassifier, Array], None]
CONTRACT: list[Check] = [
    probes_and_metadata,
    triton_s_client_gets_the_bits,
    plain_requests_get_the_bits,
    shared_batches_are_the_same_to_rounding,
    pictures_page_and_metrics,
    mistakes_are_the_protocol_s_error,
]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_uvicorn(check: Check, server: Any, direct: OnnxClassifier, digits: Array) -> None:
    check(server.url, direct, digits)


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Ray's temporary folder; its sockets' paths may not be long."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="r")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_replicas_on_ray(
    start: Any, model: Path, other: Path, direct: OnnxClassifier, digits: Array, ray_folder: str
) -> None:
    """All of it on one deployment, which takes long to start."""
    arguments = (model, other, "--engine", "ray", "--replicas", "2")
    environment = {"RAY_TMPDIR": ray_folder, "EPDISTILL_TOKEN": ""}
    with start(*arguments, **environment) as running:
        for check in CONTRACT:
            check(running.url, direct, digits)
        family = descendants(running.process.pid)
        assert running.url.startswith("http://127.0.0.1:")
        both_replicas_answer(running.url, direct, digits, family)
        nothing_is_reported(family)
        what_was_accepted_is_answered(running, direct, digits)
        assert running.process.wait(PATIENCE) == 0
        assert running.process.stdout.read() == ""  # one JSON object, and no more
        assert not [pid for pid in family if lives(pid)]
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{running.url}/v2", timeout=5)


def both_replicas_answer(
    url: str, direct: OnnxClassifier, digits: Array, family: dict[int, str]
) -> None:
    replicas = [name for name in family.values() if name.startswith("ray::ServeReplica")]
    assert len(replicas) == 2

    def one(k: int) -> str:
        answer = ask(url, digits[k : k + 1])
        assert (logits_of(answer).argmax(1) == direct.run(digits[k : k + 1]).argmax(1)).all()
        return answer.headers["epdistill-replica"]

    seen: set[str] = set()
    with ThreadPoolExecutor(16) as pool:
        for _ in range(20):
            seen |= set(pool.map(one, range(100)))
            if len(seen) == 2:
                break
    assert len(seen) == 2


def nothing_is_reported(family: dict[int, str]) -> None:
    """Ray's own processes were started with its reports switched off."""
    found = [
        Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for pid, command in family.items()
        if "/raylet " in command or "/gcs_server " in command
    ]
    assert len(found) == 2
    for environment in found:
        assert b"RAY_USAGE_STATS_ENABLED=0" in environment
        assert b"ORT_DISABLE_TELEMETRY=1" in environment
        assert b"RAY_AUTH_MODE=token" in environment


def what_was_accepted_is_answered(running: Any, direct: OnnxClassifier, digits: Array) -> None:
    """Clients ask on through SIGTERM; one is in the middle of an upload."""
    address = running.address
    body = json.dumps(body_of(digits[:2])).encode()
    expected = direct.run(digits[:2])
    wrong: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
        while True:
            connection.request("POST", "/v2/models/digits/infer", body)
            response = connection.getresponse()
            content = response.read()
            if response.status == 404:  # Ray's proxy does not know us any more
                break
            logits = json.loads(content)["outputs"][0]["data"] if response.status == 200 else []
            if np.abs(np.array(logits, np.float32).reshape(-1, 10) - expected).max() > 1e-5:
                wrong.append(f"{response.status} {content[:100]!r}")
                break
        connection.close()

    upload = http.client.HTTPConnection(*address, timeout=PATIENCE)
    upload.putrequest("POST", "/v2/models/digits/infer")
    upload.putheader("Content-Length", str(len(body)))
    upload.endheaders(body[:100])
    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert ask(running.url, digits[:2]).status_code == 200  # by now the upload has begun
    running.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    upload.send(body[100:])
    response = upload.getresponse()
    assert response.status == 200, response.read()
    logits = json.loads(response.read())["outputs"][0]["data"]
    np.testing.assert_allclose(np.reshape(logits, (2, 10)), expected, rtol=1e-5, atol=1e-5)
    upload.close()


def descendants(pid: int) -> dict[int, str]:
    """The command lines of all processes below one, by id."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    parents, commands = {}, {}
    for line in listed.splitlines():
        one, parent, command = line.split(maxsplit=2)
        parents[int(one)], commands[int(one)] = int(parent), command
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return {one: commands[one] for one in found - {pid}}


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
