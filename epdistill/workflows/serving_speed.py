"""`epdistill bench serve`: what the server costs on top of onnxruntime.

The server runs in a process of its own, the same file on onnxruntime beside it, both on
the same cores with the same number of threads; the client has a core to itself where
there is one, sends bytes made beforehand, and its own processor time is measured. One
request and one call take turns, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epdistill.errors import ExportError
from epdistill.export.bench import MIN_REPEATS, hardware, timing
from epdistill.export.manifest import manifest_path, read_manifest
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.serving.child import Child, child
from epdistill.export.serving.wire import Connection, Reply, infer_bytes
from epdistill.recipes import Recipe
from epdistill.runs import new_run_folder, write_json
from epdistill.workflows.benchmark import SCHEMA_VERSION, Benched
from epdistill.workflows.context import Context
from epdistill.workflows.served_file import Placement, place, served_file

BATCH_SIZES = (16, 32, 64)
# Two requests on their way: while one is computed the next one is received.
CONNECTIONS = 2
# What a server may cost: a share of onnxruntime's time, and seconds.
ALLOWED_SHARE, ALLOWED_SECONDS = 0.15, 0.0005
LEAST_SHARE = 0.9
_WARM_UP = 10
_IDLE_SECONDS = 5
_TIMEOUT = 600

Array = npt.NDArray[np.float32]


def bench_serve(
    context: Context,
    *,
    model: Path | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    rounds: int = 200,
    max_seconds: float = 60.0,
    threads: int | None = None,
) -> Benched:
    """Measure the server against onnxruntime alone and write bench.json.

    Args:
        context: Folders, reporter.
        model: See `served_file`.
        recipe: See `served_file`.
        out: Folder for bench.json; numbered automatically without it.
        rounds: Rounds of measurement; fewer where they would take longer than
            `max_seconds`, at least `MIN_REPEATS`.
        max_seconds: Roughly, per batch size.
        threads: See `place`.

    Raises:
        ExportError: No such file, the server did not start, or answered other bits than
            onnxruntime.
    """
    placed = place(threads)
    with served_file(model, recipe, context.runs) as (path, label):
        manifest = read_manifest(manifest_path(path))
        with (
            child(
                [path],
                "--threads",
                str(placed.threads),
                "--deadline",
                str(_TIMEOUT),
                cores=placed.server,
            ) as server,
            _Both(path, server, placed) as both,
            context.reporter.bar("bench serve", 1 + len(BATCH_SIZES)) as bar,
        ):
            latency = _latency(both, rounds, max_seconds)
            bar.advance()
            throughput = []
            for size in BATCH_SIZES:
                throughput.append(_throughput(both, size, rounds, max_seconds))
                bar.advance()
    content = {
        "schema_version": SCHEMA_VERSION,
        "models": label,
        "hardware": hardware(),
        "serving": {
            "threads": placed.threads,
            "server_cores": placed.server,
            "client_core": placed.client,
            "sha256": manifest.sha256,
            "size_bytes": manifest.size_bytes,
            "precision": manifest.precision,
            "image_shape": manifest.image_shape,
            "latency": latency,
            "throughput": throughput,
        },
    }
    folder = new_run_folder(out, context.runs, "bench-serve")
    write_json(folder / "bench.json", content)
    return Benched(folder, content)


class _Both:
    """The server and onnxruntime beside it, each asked from threads that stay in their place."""

    def __init__(self, path: Path, server: Child, placed: Placement) -> None:
        self.server, self.apart = server, placed.client is not None
        self._beside = ThreadPoolExecutor(1, initializer=lambda: placed.pin(client=False))
        self._client = ThreadPoolExecutor(CONNECTIONS, initializer=lambda: placed.pin(client=True))
        opening = self._beside.submit(OnnxClassifier.open_checked, path, threads=placed.threads)
        self.classifier = opening.result()
        self._connections: list[Connection | None] = [None] * CONNECTIONS
        self._used = [0.0] * CONNECTIONS

    def __enter__(self) -> _Both:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            if connection is not None:
                connection.close()
        self._beside.shutdown()
        self._client.shutdown()

    def images(self, size: int) -> Array:
        """Noise (size, C, H, W)."""
        shape = (size, *self.classifier.input_shape)
        return np.random.default_rng(0).random(shape, dtype=np.float32)

    def request(self, images: Array) -> bytes:
        """What asks the server for them."""
        name = self.classifier.signature.input
        return infer_bytes(self.server.models[0], name, self.classifier.feed(images)[name])

    def raw(self, images: Array, calls: int) -> float:
        """Seconds of so many calls of onnxruntime, one after the other."""
        feed = self.classifier.feed(images)

        def work() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                self.classifier.run_feed(feed)
            return time.perf_counter() - start

        return self._beside.submit(work).result()

    def ask(self, request: bytes, calls: int) -> tuple[float, float, list[Reply]]:
        """So many requests over all connections: wall seconds, the client's CPU seconds, answers.

        Raises:
            ExportError: An answer is not 200.
        """

        def work(line: int, count: int) -> tuple[float, float, float, list[Reply]]:
            connection = self._open(line)
            begun, used = time.perf_counter(), time.thread_time()
            replies = [connection.ask(request) for _ in range(count)]
            self._used[line] = time.perf_counter()
            return begun, self._used[line], time.thread_time() - used, replies

        shares = [calls // CONNECTIONS + (k < calls % CONNECTIONS) for k in range(CONNECTIONS)]
        started = [
            self._client.submit(work, line, count) for line, count in enumerate(shares) if count
        ]
        found = [future.result() for future in started]
        replies = [reply for entry in found for reply in entry[3]]
        for reply in replies:
            if reply.status != 200:
                raise ExportError(
                    f"the server answered {reply.status} ({reply.body[:200]!r}); expected 200"
                )
        wall = max(entry[1] for entry in found) - min(entry[0] for entry in found)
        return wall, sum(entry[2] for entry in found), replies

    def _open(self, line: int) -> Connection:
        """One of the connections; a new one where the server may have closed it by now."""
        connection = self._connections[line]
        if connection is None or time.perf_counter() - self._used[line] > _IDLE_SECONDS:
            if connection is not None:
                connection.close()
            connection = self._connections[line] = Connection(self.server.address, _TIMEOUT)
        return connection

    def check(self, images: Array, request: bytes) -> None:
        """Warm both up, and see that they answer the same bits."""
        expected = self.classifier.run(images)
        for _ in range(_WARM_UP if len(images) == 1 else 2):
            (reply,) = self.ask(request, 1)[2]
            if reply.logits(len(self.classifier.classes)).tobytes() != expected.tobytes():
                raise ExportError(
                    "the server answered other bits than onnxruntime for the same batch and "
                    "threads; expected the same: measure again, and report it if it stays"
                )

    def cpu_seconds(self) -> float:
        """Processor seconds of the server so far; 0 where the system does not tell."""
        return self.server.metrics().get("process_cpu_seconds_total", 0.0)


def _latency(both: _Both, rounds: int, max_seconds: float) -> dict[str, Any]:
    """Batch 1: a call and a request in turn."""
    images = both.images(1)
    request = both.request(images)
    both.check(images, request)
    raw: list[float] = []
    served: list[float] = []
    client: list[float] = []
    parts: dict[str, list[float]] = {"queue": [], "model": [], "total": []}

    def call() -> None:
        raw.append(both.raw(images, 1))

    def ask() -> None:
        wall, used, (reply,) = both.ask(request, 1)
        served.append(wall)
        client.append(used)
        for name, seconds in parts.items():
            seconds.append(reply.seconds(name))

    before = both.cpu_seconds()
    _take_turns([call, ask], rounds, max_seconds)
    used = both.cpu_seconds() - before
    base, found = timing(raw), timing(served)
    overhead = found.median - base.median
    allowed = ALLOWED_SHARE * base.median + ALLOWED_SECONDS
    differences = np.subtract(served, raw)
    return {
        "batch_size": 1,
        "raw": asdict(base),
        "served": asdict(found),
        "server": {name: asdict(timing(seconds)) for name, seconds in parts.items()},
        "overhead_seconds": {"p50": overhead, **_quartiles(differences)},
        "allowed_seconds": allowed,
        "within": overhead <= allowed,
        "client_cpu_seconds": float(np.mean(client)),
        "server_cpu_seconds": used / len(served),
    }


def _throughput(both: _Both, size: int, rounds: int, max_seconds: float) -> dict[str, Any]:
    """Requests of one size on two connections, against as many calls in a row."""
    images = both.images(size)
    request = both.request(images)
    both.check(images, request)
    calls = 2 * CONNECTIONS
    raw: list[float] = []
    served: list[float] = []
    client: list[float] = []

    def call() -> None:
        raw.append(both.raw(images, calls) / calls)

    def ask() -> None:
        wall, used, _ = both.ask(request, calls)
        served.append(wall / calls)
        client.append(used / calls)

    metrics = both.server.metrics()
    _take_turns([call, ask], rounds, max_seconds)
    after = both.server.metrics()
    batches = _grown(metrics, after, "epdistill_batch_images_count")
    counted = _grown(metrics, after, "epdistill_batch_images_sum")
    used = after.get("process_cpu_seconds_total", 0.0) - metrics.get(
        "process_cpu_seconds_total", 0.0
    )
    share = _quartiles(np.divide(raw, served))
    # A client with a core of its own takes nothing from the server.
    own = 0.0 if both.apart else 1.0
    without = _quartiles(np.divide(raw, np.subtract(served, own * np.asarray(client))))
    return {
        "batch_size": size,
        "connections": CONNECTIONS,
        "requests_per_round": calls,
        "images_per_batch": counted / batches,
        "raw": asdict(timing(raw)),
        "served": asdict(timing(served)),
        "raw_images_per_second": size / timing(raw).median,
        "served_images_per_second": size / timing(served).median,
        "share": share,
        "share_client_excluded": without,
        "within": without["median"] >= LEAST_SHARE,
        "client_cpu_seconds": float(np.mean(client)),
        "server_cpu_seconds": used / (len(served) * calls),
    }


def _grown(before: Any, after: Any, name: str) -> float:
    """By how much a counter of the only model grew."""
    (key,) = (key for key in after if key.startswith(name + "{"))
    grown: float = after[key] - before.get(key, 0.0)
    return grown


def _quartiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q25": low, "q75": high}


def _take_turns(turns: Sequence[Callable[[], None]], rounds: int, max_seconds: float) -> None:
    """Everybody once per round, who is first alternating, until rounds or time are over."""
    start = time.perf_counter()
    for number in range(rounds):
        for offset in range(len(turns)):
            turns[(number + offset) % len(turns)]()
        if number + 1 >= MIN_REPEATS and time.perf_counter() - start > max_seconds:
            return
