"""The command: what it needs, what it says, and how it ends."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from epdistill.cli import main
from epdistill.export.runtime import OnnxClassifier


def fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str | Path
) -> str:
    """The one line on standard error of a `serve` that does not start."""
    monkeypatch.setattr(sys, "argv", ["epdistill", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capfd.readouterr()
    assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


WITHOUT_TORCH = """
import asyncio, sys
# What a serve-only install has not got.
ABSENT = {"torch", "torchvision", "torchattacks", "onnxscript", "scipy", "sklearn", "matplotlib",
          "safetensors"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import httpx
from pathlib import Path
from epdistill.cli.app import app as commands
from epdistill.export.serving.app import create_app
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.models import load_models
from epdistill.export.serving import server
from epdistill.export.serving.settings import Limits
engine = Engine(load_models([Path(sys.argv[1])], threads=1), Limits())
async def work():
    transport = httpx.ASGITransport(create_app(engine))
    async with engine.running(), httpx.AsyncClient(transport=transport, base_url="http://s") as c:
        zeros = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0] * 64}
        yield await c.post("/v2/models/digits/infer", json={"inputs": [zeros]})
        picture = Path(sys.argv[2]).read_bytes()
        for name in (await c.get("/v1/about")).json()["corruptions"]:
            query = f"corruption={name}&severity=5&show=true"
            yield await c.post(f"/v1/classify?{query}", content=picture)
        yield await c.get("/metrics")
async def main():
    async for answer in work():
        assert answer.status_code == 200, answer.text
asyncio.run(main())
print(sorted(ABSENT & set(sys.modules)))
"""


def test_serving_needs_neither_torch_nor_what_comes_with_it(model: Path) -> None:
    picture = Path(__file__).parents[3] / "export/serving/page/samples/digit-3.png"
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, str(model), str(picture)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_mistakes_are_one_line(
    server: Any,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "m.onnx"
    shutil.copy(model, bare)
    taken = str(server.address[1])
    for arguments, message in (
        ((bare,), "the manifest"),
        ((model, model), "2 models called"),
        ((model, "--provider", "Abacus"), "AbacusExecutionProvider"),
        ((model, "--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
        ((model, "--port", taken), "choose others with --host and --port"),
        (("--runs", tmp_path), "epdistill export"),
    ):
        assert message in fails(monkeypatch, capfd, *arguments)


def test_the_newest_export_is_served_without_arguments(
    start: Any, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "digits-cnn-001"
    run.mkdir(parents=True)
    for suffix in (".onnx", ".json"):
        shutil.copy(model.with_suffix(suffix), run / f"model{suffix}")
    with start("--runs", tmp_path / "runs") as running:
        assert requests.get(f"{running.url}/v2/models/model", timeout=5).status_code == 200
        assert running.url.startswith("http://127.0.0.1:")


def test_the_token_comes_from_the_environment(start: Any, model: Path) -> None:
    with start(model, EPDISTILL_TOKEN="abc") as running:
        assert requests.get(f"{running.url}/v2", timeout=5).status_code == 401
        right = {"Authorization": "Bearer abc"}
        assert requests.get(f"{running.url}/v2", headers=right, timeout=5).status_code == 200
        assert requests.get(f"{running.url}/v2/health/ready", timeout=5).status_code == 200


def test_sigterm_under_load_loses_nothing(
    start: Any, model: Path, direct: OnnxClassifier, digits: Any
) -> None:
    """Eight clients ask until an answer tells them to stop; one is in the middle of an upload."""
    bodies, expected = [], []
    for k in range(8):
        tensor = {"name": "images", "shape": [2, 1, 8, 8], "datatype": "FP32"}
        batch = digits[2 * k : 2 * k + 2]
        bodies.append(json.dumps({"inputs": [{**tensor, "data": batch.ravel().tolist()}]}))
        expected.append(direct.run(batch))
    answered = [0] * 8
    told = [False] * 8
    many = threading.Event()

    with start(model) as running:

        def client(k: int) -> None:
            connection = http.client.HTTPConnection(*running.address, timeout=20)
            while not told[k]:
                connection.request("POST", "/v2/models/digits/infer", bodies[k])
                response = connection.getresponse()
                content = json.loads(response.read())
                assert response.status == 200, content
                logits = np.array(content["outputs"][0]["data"], np.float32).reshape(2, 10)
                np.testing.assert_allclose(logits, expected[k], rtol=1e-5, atol=1e-5)
                answered[k] += 1
                told[k] = response.headers["connection"] == "close"
                if sum(answered) > 200:
                    many.set()
            connection.close()

        threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
        upload = http.client.HTTPConnection(*running.address, timeout=20)
        upload.putrequest("POST", "/v2/models/digits/infer")
        upload.putheader("Content-Length", str(len(bodies[0])))
        upload.endheaders(bodies[0][:100].encode())
        for thread in threads:
            thread.start()
        assert many.wait(20)
        running.process.terminate()
        for thread in threads:
            thread.join(20)
        assert all(told)  # every client was told by an answer, none by a lost request
        upload.send(bodies[0][100:].encode())
        response = upload.getresponse()
        assert response.status == 200 and len(json.loads(response.read())["outputs"]) == 1
        upload.close()
        assert running.process.wait(20) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{running.url}/v2", timeout=5)


def test_after_sigterm_requests_are_taken_for_a_while(start: Any, model: Path) -> None:
    with start(model, "--linger", "60") as running:
        running.process.terminate()
        while requests.get(f"{running.url}/v2/health/ready", timeout=5).status_code == 200:
            pass
        tensor = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0] * 64}
        answer = requests.post(
            f"{running.url}/v2/models/digits/infer", json={"inputs": [tensor]}, timeout=5
        )
        assert answer.status_code == 200 and answer.headers["connection"] == "close"
        assert requests.get(f"{running.url}/v2/health/live", timeout=5).status_code == 200
        assert running.stop() == 0  # the second signal ends it at once


@pytest.mark.slow
def test_64_clients_get_their_own_answers(
    start: Any, model: Path, direct: OnnxClassifier, digits: Any
) -> None:
    """More than the queue holds: refusals are deliberate ones, and no answer is wrong."""
    with start(model, "--queue", "40", "--max-batch", "8") as running:

        def client(k: int) -> Counter[int]:
            statuses: Counter[int] = Counter()
            rng = np.random.default_rng(k)
            connection = http.client.HTTPConnection(*running.address, timeout=60)
            for _ in range(300):
                first, n = int(rng.integers(1700)), int(rng.integers(1, 9))
                batch = digits[first : first + n]
                size = {"binary_data_size": batch.nbytes}
                tensor = {"name": "images", "shape": list(batch.shape), "datatype": "FP32"}
                request = {"inputs": [{**tensor, "parameters": size}]}
                head = json.dumps(request).encode()
                length = {"Inference-Header-Content-Length": str(len(head))}
                connection.request(
                    "POST", "/v2/models/digits/infer", head + batch.tobytes(), length
                )
                response = connection.getresponse()
                content = json.loads(response.read())
                statuses[response.status] += 1
                if response.status == 200:
                    data = content["outputs"][0]["data"]
                    expected = direct.run(batch)
                    logits = np.array(data, np.float32).reshape(n, 10)
                    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-5)
                    assert (logits.argmax(1) == expected.argmax(1)).all()
            connection.close()
            return statuses

        with ThreadPoolExecutor(64) as pool:
            statuses = sum(pool.map(client, range(64)), Counter())
        assert sum(statuses.values()) == 64 * 300
        assert set(statuses) <= {200, 503, 504} and statuses[200] > 1000
        assert running.stop() == 0


def test_without_the_extra_the_command_says_what_to_type(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "epdistill.export.serving.engine", None)
    assert "pip install 'epdistill[serve]'" in fails(monkeypatch, capfd, model)
