"""The Open Inference Protocol, asked by real clients, answered as onnxruntime answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import requests
import tritonclient.http as triton

from epdistill.export.runtime import OnnxClassifier

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield made
    made.close()


def ask(url: str, batch: Array, **changes: Any) -> requests.Response:
    tensor = {
        "name": "images",
        "shape": list(batch.shape),
        "datatype": "FP32",
        "data": batch.ravel().tolist(),
    }
    body = {"inputs": [tensor], **changes}
    return requests.post(f"{url}/v2/models/digits/infer", json=body, timeout=10)


def logits_of(response: requests.Response) -> Array:
    (output,) = response.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_health_and_metadata(client: triton.InferenceServerClient, server: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("digits") and client.is_model_ready("other", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("digits") == {
        "name": "digits",
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }
    assert requests.get(f"{server.url}/v2/health/live", timeout=5).json() == {"live": True}


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("sends_binary", [False, True])
@pytest.mark.parametrize("gets_binary", [False, True])
def test_triton_s_client_gets_onnxruntime_s_bits(
    client: triton.InferenceServerClient,
    direct: OnnxClassifier,
    digits: Array,
    n: int,
    sends_binary: bool,
    gets_binary: bool,
) -> None:
    tensor = triton.InferInput("images", [n, 1, 8, 8], "FP32")
    tensor.set_data_from_numpy(digits[:n], binary_data=sends_binary)
    output = triton.InferRequestedOutput("logits", binary_data=gets_binary)
    answer = client.infer("digits", [tensor], outputs=[output], request_id="mine")
    assert answer.as_numpy("logits").tobytes() == direct.run(digits[:n]).tobytes()
    assert answer.get_response()["id"] == "mine"


def test_without_outputs_triton_s_client_gets_binary(
    client: triton.InferenceServerClient, direct: OnnxClassifier, digits: Array
) -> None:
    tensor = triton.InferInput("images", [3, 1, 8, 8], "FP32")
    tensor.set_data_from_numpy(digits[:3])
    answer = client.infer("digits", [tensor], model_version="1")
    assert answer.get_output("logits")["parameters"]["binary_data_size"] == 3 * 10 * 4
    assert answer.as_numpy("logits").tobytes() == direct.run(digits[:3]).tobytes()


def test_plain_requests_get_the_same_bits(
    server: Any, direct: OnnxClassifier, digits: Array
) -> None:
    wide = np.random.default_rng(0).normal(0, 9, (5, 1, 8, 8)).astype(np.float32)
    for batch in (digits[:1], digits[5:17], wide):
        expected = direct.run(batch).tobytes()
        assert logits_of(ask(server.url, batch)).tobytes() == expected
        nested = {"name": "images", "shape": list(batch.shape), "datatype": "FP32"}
        nested["data"] = batch.tolist()
        response = ask(server.url, batch, inputs=[nested], outputs=[{"name": "logits"}], id="7")
        assert logits_of(response).tobytes() == expected
        assert response.json()["id"] == "7" and response.json()["model_name"] == "digits"


def test_real_clients_share_batches(
    start: Any, model: Path, direct: OnnxClassifier, digits: Array
) -> None:
    """Of many clients at once everyone gets their own answer, and they do share batches."""

    def by_requests(url: str, batch: Array) -> Array:
        return logits_of(ask(url, batch))

    def by_triton(url: str, batch: Array, binary: bool) -> Array:
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        tensor = triton.InferInput("images", list(batch.shape), "FP32")
        tensor.set_data_from_numpy(batch, binary_data=binary)
        output = triton.InferRequestedOutput("logits", binary_data=binary)
        logits: Array = client.infer("digits", [tensor], outputs=[output]).as_numpy("logits")
        client.close()
        return logits

    def one(url: str, k: int) -> tuple[int, Array]:
        batch = digits[k : k + 1 + k % 3]
        if k % 3 == 0:
            return k, by_requests(url, batch)
        return k, by_triton(url, batch, k % 3 == 1)

    with start(model, "--delay-ms", "200") as running, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(partial(one, running.url), range(200)))
        text = requests.get(f"{running.url}/metrics", timeout=5).text
        assert running.stop() == 0
    for k, logits in answers:
        expected = direct.run(digits[k : k + 1 + k % 3])
        assert np.abs(logits - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
        assert (logits.argmax(1) == expected.argmax(1)).all()
    found = re.search(r'^epdistill_batch_images_count\{model="digits"\} (\S+)$', text, re.MULTILINE)
    assert found and float(found.group(1)) < 150  # batches for 200 requests


def good(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0] * 64}
    return {"inputs": [{**tensor, **changes}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        ({}, "expected a list of one, 'images'"),
        ({"inputs": []}, "received 0 inputs"),
        ({"inputs": [1]}, "expected an object"),
        ({"inputs": good()["inputs"] * 2}, "received 2 inputs"),
        ({**good(), "id": 7}, "expected a string"),
        (good(name="pictures"), "received the input 'pictures'; expected images"),
        (good(datatype="FP64"), "received datatype 'FP64' for images; expected FP32"),
        (good(datatype=None), "received datatype None"),
        (good(shape=[1, 8, 8]), r"expected [N, 1, 8, 8]"),
        (good(shape=[1, 1, 8, 9]), r"expected [N, 1, 8, 8]"),
        (good(shape=[0, 1, 8, 8], data=[]), "N >= 1"),
        (good(shape=[-1, 1, 8, 8]), "N >= 1"),
        (good(shape=[True, 1, 8, 8]), "N >= 1"),
        (good(shape=[1.0, 1, 8, 8]), "N >= 1"),
        (good(shape=[65, 1, 8, 8]), "received 65 images; expected at most 64"),
        (good(shape=[1 << 40, 1, 8, 8]), "expected at most 64"),
        (good(shape="1,1,8,8"), "N >= 1"),
        (good(data=[0] * 63), "expected 64 numbers"),
        (good(data=[[0] * 8] * 8), "expected 64 numbers"),
        (good(data=[[0], [0, 1]]), "nested unevenly"),
        (good(data=["0"] * 64), "expected 64 numbers"),
        (good(data=[None] * 64), "expected 64 numbers"),
        (good(data=[True] * 64), "expected 64 numbers"),
        (good(data=5), "received no list of data"),
        (good(data=[1e300] * 64), "expected finite numbers"),
        (good(parameters=3), "expected an object"),
        (good(parameters={"binary_data_size": 256}), "received binary_data_size 256 and 0 bytes"),
        ({**good(), "outputs": 5}, "expected a list of 'logits' at most"),
        ({**good(), "outputs": [{"name": "states"}]}, "received the output 'states'"),
        (
            {**good(), "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
            "/v1/classify",
        ),
        ({**good(), "parameters": {"binary_data_output": 1}}, "expected true or false"),
    ],
)
def test_malformed_requests_are_refused_in_one_line(server: Any, body: Any, message: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = requests.post(f"{server.url}/v2/models/digits/infer", data=raw, timeout=10)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert message in response.json()["error"] and "\n" not in response.json()["error"]


def test_nan_in_json_is_refused(server: Any) -> None:
    body = json.dumps(good(data=[float("nan")] * 64))
    response = requests.post(f"{server.url}/v2/models/digits/infer", data=body, timeout=10)
    assert response.status_code == 400 and "not valid JSON" in response.json()["error"]


@pytest.mark.parametrize(
    ("size", "header", "raw", "message"),
    [
        (256, None, bytes(256), "not valid JSON"),  # no header: all of it would be JSON
        (256, "x", bytes(256), "expected the length of the JSON"),
        (256, "-1", bytes(256), "expected the length of the JSON"),
        (256, "9999", bytes(256), "expected the length of the JSON"),
        (256, "9" * 5000, bytes(256), "expected the length of the JSON"),
        (256, 0, bytes(255), "255 bytes after the JSON"),
        (256, 0, bytes(257), "257 bytes after the JSON"),
        (255, 0, bytes(255), "expected 256 of both"),
        (1 << 60, 0, bytes(256), "expected 256 of both"),
        (-256, 0, bytes(256), "expected 256 of both"),
        (True, 0, bytes(256), "expected 256 of both"),
        ("256", 0, bytes(256), "expected 256 of both"),
        (256, 0, np.full(64, np.nan, np.float32).tobytes(), "expected finite numbers"),
        (256, 0, np.full(64, np.inf, np.float32).tobytes(), "expected finite numbers"),
        (None, 0, bytes(256), "expected none without binary_data_size"),
    ],
)
def test_lies_about_binary_data_are_refused(
    server: Any, size: Any, header: Any, raw: bytes, message: str
) -> None:
    tensor: dict[str, Any] = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32"}
    if size is None:
        tensor["data"] = [0] * 64
    else:
        tensor["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = (
        {} if header is None else {"Inference-Header-Content-Length": str(header or len(head))}
    )
    response = requests.post(
        f"{server.url}/v2/models/digits/infer", data=head + raw, headers=headers, timeout=10
    )
    assert response.status_code == 400
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/digits/versions/2", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("GET", "/v2/models/digits/infer", 405),
        ("POST", "/v2", 405),
        ("GET", "/nothing", 404),
        ("GET", "/page/../../../../etc/passwd", 404),
        ("GET", "/page/%2e%2e/server.py", 404),
        ("GET", "/page/__init__.py", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_routes_give_the_error_object(
    server: Any, method: str, path: str, status: int
) -> None:
    response = requests.request(method, server.url + path, timeout=5)
    assert response.status_code == status
    assert set(response.json()) == {"error"}


def test_metrics_speak_of_routes_and_models_only(server: Any) -> None:
    requests.get(f"{server.url}/secret-path", timeout=5)
    ask(server.url, np.zeros((1, 1, 8, 8), np.float32))
    response = requests.get(f"{server.url}/metrics", timeout=5)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "secret-path" not in response.text
    assert 'epdistill_requests_total{route="none",status="404"}' in response.text
    assert 'epdistill_waiting_images{model="digits"} 0.0' in response.text
    assert 'epdistill_requests_total{route="infer",status="200"}' in response.text
