"""`bench serve` and `bench load`: what they measure is right, and under documented keys."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epdistill.cli import main
from epdistill.errors import ExportError
from epdistill.export.runtime import OnnxClassifier, available_cores
from epdistill.export.serving.child import child
from epdistill.export.serving.wire import Connection, Reply, get_bytes, infer_bytes
from epdistill.recipes import load_recipe
from epdistill.sealed import read_sealed
from epdistill.workflows.served_file import place, served_file
from epdistill.workflows.serving_load import _ask, _Question, _summary, _Tally

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """Run a `bench` command; the content of its bench.json, which it has printed too."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str | Path) -> dict[str, Any]:
        command = ["epdistill", "bench", *map(str, args), "--quiet"]
        for shown in (["--json"], []):
            monkeypatch.setattr(sys, "argv", [*command, *shown])
            with pytest.raises(SystemExit) as stop:
                main()
            printed = capsys.readouterr()
            assert (stop.value.code or 0) == 0, printed.err
            if shown:
                content: dict[str, Any] = json.loads(printed.out)
                path = Path(content.pop("bench"))
        assert path.name == "bench.json" and content == read_sealed(path)
        return content

    return call


def test_the_server_against_onnxruntime_alone(bench: Bench, model: Path, document: Any) -> None:
    content = bench("serve", model, "--rounds", "3", "--threads", "1")
    described = document("bench-schema.md", "bench.json of `bench serve`")
    assert not described.unknown(content) and not described.missing(content)
    serving = content["serving"]
    assert serving["size_bytes"] == model.stat().st_size and serving["threads"] == 1
    latency = serving["latency"]
    for kind in ("raw", "served"):
        assert latency[kind]["repeats"] == 3 and latency[kind]["median"] > 0
    # What the server spends is part of what the client waits for.
    assert latency["server"]["model"]["median"] <= latency["server"]["total"]["median"]
    assert latency["server"]["total"]["q25"] <= latency["served"]["q75"]
    assert latency["overhead_seconds"]["p50"] == pytest.approx(
        latency["served"]["median"] - latency["raw"]["median"]
    )
    assert latency["within"] == (latency["overhead_seconds"]["p50"] <= latency["allowed_seconds"])
    assert [row["batch_size"] for row in serving["throughput"]] == [16, 32, 64]
    for row in serving["throughput"]:
        assert row["batch_size"] <= row["images_per_batch"] <= 64
        rate = row["batch_size"] / row["served"]["median"]
        assert row["served_images_per_second"] == pytest.approx(rate)
        assert 0 < row["client_cpu_seconds"] < row["served"]["median"] * 2
        assert row["within"] == (row["share_client_excluded"]["median"] >= 0.9)


def test_many_clients(bench: Bench, model: Path, document: Any) -> None:
    load = bench("load", model, "--clients", "6", "--seconds", "1", "--threads", "1")
    described = document("bench-schema.md", "bench.json of `bench load`")
    assert not described.unknown(load) and not described.missing(load)
    found = load["load"]
    assert found["clients"] == 6 and found["exit_code"] == 0
    assert found["wrong"] == found["other_5xx"] == found["broken"] == 0
    assert found["other_statuses"] == {} and found["largest_error"] <= found["tolerance"]
    assert found["answered"] == found["latency"]["repeats"] == found["server_counted"]["200"] > 0
    assert found["memory_bytes"]["most"] > 1 << 20


@pytest.mark.slow
def test_64_clients_for_a_minute(bench: Bench, model: Path) -> None:
    """Nothing wrong, nothing lost, no status but 200 and deliberate refusals, no growth."""
    found = bench("load", model, "--clients", "64", "--seconds", "60", "--threads", "1")["load"]
    assert found["seconds"] >= 60 and found["answered"] > 1000
    assert found["wrong"] == found["other_5xx"] == found["broken"] == 0
    assert found["other_statuses"] == {}
    counted = {status: int(count) for status, count in found["server_counted"].items()}
    refused = {status: count for status, count in found["overloaded"].items() if count}
    assert counted == {"200": found["answered"], **refused}
    assert found["memory_bytes"]["growth"] < 48 << 20
    assert found["exit_code"] == 0


class Fake:
    """A connection to a server that answers as told."""

    def __init__(self, status: int, logits: Any) -> None:
        raw = np.asarray(logits, np.float32).tobytes()
        self._reply = Reply(status, {b"inference-header-content-length": b"2"}, b"{}" + raw)

    def ask(self, request: bytes) -> Reply:
        return self._reply


@pytest.mark.parametrize(
    ("status", "logits", "wrong"),
    [
        (200, [[1.0, 3.0], [2.0, 1.0]], 0),
        (200, [[1.0, 3.0 + 2e-6], [2.0, 1.0]], 0),
        (200, [[1.0, 3.0 + 1e-5], [2.0, 1.0]], 1),
        (200, [[3.0, 1.0], [2.0, 1.0]], 1),
        (200, [[2.0, 1.0], [1.0, 3.0]], 1),  # another request's answer
        (200, [[1.0, 3.0]], 1),
        (200, [[1.0, float("nan")], [2.0, 1.0]], 1),
        (500, [[1.0, 3.0], [2.0, 1.0]], 0),
    ],
)
def test_wrong_answers_are_seen(status: int, logits: Any, wrong: int) -> None:
    expected = np.array([[1.0, 3.0], [2.0, 1.0]], np.float32)
    tally = _Tally()
    _ask(Fake(status, logits), _Question(b"", expected), tally)  # type: ignore[arg-type]
    found = _summary([tally, _Tally(statuses=Counter({503: 2, 418: 1}), broken=["gone"])])
    assert found["wrong"] == wrong and found["other_5xx"] == (status == 500)
    assert found["overloaded"] == {"503": 2, "504": 0} and found["other_statuses"] == {"418": 1}
    assert found["requests"] == 5 and found["broken_reasons"] == ["gone"]


def test_the_bare_client_speaks_the_protocol(
    server: Any, direct: OnnxClassifier, digits: Any
) -> None:
    with Connection(server.address) as connection:
        for n in (1, 5, 64):
            reply = connection.ask(infer_bytes("digits", "images", digits[:n]))
            assert reply.status == 200
            assert reply.logits(10).tobytes() == direct.run(digits[:n]).tobytes()
            assert 0 < reply.seconds("model") < reply.seconds("total")
        assert connection.ask(get_bytes("/nothing")).status == 404
        with pytest.raises(KeyError):
            connection.ask(infer_bytes("digits", "images", digits[:1])).seconds("nothing")


def test_a_server_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ended with 2"), child([tmp_path / "none.onnx"]):
        pass


def test_which_file_is_served(model: Path, tmp_path: Path) -> None:
    with served_file(model, None, tmp_path) as (path, label):
        assert path == model and label == str(model)
    run = tmp_path / "digits-cnn-001"
    run.mkdir()
    for suffix in (".onnx", ".json"):
        shutil.copy(model.with_suffix(suffix), run / f"model{suffix}")
    for given in (run, None):
        with served_file(given, None, tmp_path) as (path, _):
            assert path == run / "model.onnx"
    recipe = load_recipe("digits", {"student.name": "cnn", "student.width": 8})
    with served_file(None, recipe, tmp_path) as (path, label):
        assert OnnxClassifier.open_checked(path, threads=1).input_shape == (1, 8, 8)
        assert label == "untrained cnn of recipe digits"
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be pinned here")
def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="one per core"):
        place(available_cores() + 1)
    for cores, threads, expected in (
        ({3}, None, (1, (3,), None)),
        ({0, 1}, None, (1, (0,), 1)),
        ({0, 1}, 2, (2, (0, 1), None)),
        ({0, 1, 5, 7}, 2, (2, (0, 1, 5), 7)),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        placed = place(threads)
        assert (placed.threads, placed.server, placed.client) == expected
