"""`epdistill bench load`: many clients at once, every answer compared with onnxruntime's.

Requests of 1 to 64 images are made beforehand, and so are their answers, by onnxruntime
alone on the same file. Some requests are large and there are many clients, so that the
server's queue fills up at times: then 503 is what it should say.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epdistill.errors import ExportError
from epdistill.export.bench import hardware, timing
from epdistill.export.manifest import manifest_path, read_manifest
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.serving.child import Child, child
from epdistill.export.serving.wire import Connection, infer_bytes
from epdistill.recipes import Recipe
from epdistill.runs import new_run_folder, write_json
from epdistill.workflows.benchmark import SCHEMA_VERSION, Benched
from epdistill.workflows.context import Context
from epdistill.workflows.served_file import place, served_file

# Answers from shared batches may differ by rounding: by so much of the largest logit, or of 1.
TOLERANCE = 1e-6
_OVERLOADED = (503, 504)
_SIZES = (1, 1, 1, 1, 2, 3, 5, 8, 16, 64)
_PREPARED = 64
# A new connection after so many requests.
_PER_CONNECTION = 50
_BACK_OFF = 0.05


@dataclass(frozen=True)
class _Question:
    """A request and the answer that onnxruntime gives alone."""

    request: bytes
    logits: npt.NDArray[np.float32]


@dataclass
class _Tally:
    """What one client saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    images: int = 0
    wrong: int = 0
    same_bits: int = 0
    largest: float = 0.0
    broken: list[str] = field(default_factory=list)


def load(
    context: Context,
    *,
    model: Path | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    clients: int = 64,
    seconds: float = 60.0,
    threads: int | None = None,
) -> Benched:
    """Put a server under load and write bench.json.

    Args:
        context: Folders, reporter.
        model: See `served_file`.
        recipe: See `served_file`.
        out: Folder for bench.json; numbered automatically without it.
        clients: Connections that ask at once.
        seconds: How long.
        threads: See `place`; here clients and server share all cores.

    Raises:
        ExportError: No such file, or the server did not start.
    """
    placed = place(threads)
    with served_file(model, recipe, context.runs) as (path, label):
        manifest = read_manifest(manifest_path(path))
        classifier = OnnxClassifier.open_checked(path, threads=placed.threads)
        with child([path], "--threads", str(placed.threads)) as server:
            questions = _questions(classifier, server.models[0])
            with context.reporter.bar("bench load", max(1, int(seconds))) as bar:
                tallies, memory, took = _under_load(server, questions, clients, seconds, bar)
            counted = _counted(server)
            code = server.stop()
    content = {
        "schema_version": SCHEMA_VERSION,
        "models": label,
        "hardware": hardware(),
        "load": {
            "threads": placed.threads,
            "sha256": manifest.sha256,
            "clients": clients,
            "seconds": took,
            **_summary(tallies),
            "images_per_second": sum(tally.images for tally in tallies) / took,
            "server_counted": counted,
            "memory_bytes": memory,
            "exit_code": code,
        },
    }
    folder = new_run_folder(out, context.runs, "bench-load")
    write_json(folder / "bench.json", content)
    return Benched(folder, content)


def _questions(classifier: OnnxClassifier, model: str) -> list[_Question]:
    """Requests of all sizes with onnxruntime's answers."""
    chosen = np.random.default_rng(0)
    name = classifier.signature.input
    found = []
    for number in range(_PREPARED):
        size = _SIZES[number % len(_SIZES)]
        images = chosen.random((size, *classifier.input_shape), dtype=np.float32)
        request = infer_bytes(model, name, classifier.feed(images)[name])
        found.append(_Question(request, classifier.run(images)))
    return found


def _under_load(
    server: Child, questions: list[_Question], clients: int, seconds: float, bar: Any
) -> tuple[list[_Tally], dict[str, float], float]:
    """Let the clients ask; what each saw, the server's memory, and the seconds it took."""
    tallies = [_Tally() for _ in range(clients)]
    start = time.perf_counter()
    until = start + seconds
    threads = [
        threading.Thread(target=_client, args=(server, questions, tally, number, until))
        for number, tally in enumerate(tallies)
    ]
    for thread in threads:
        thread.start()
    resident: list[float] = []
    while (left := until - time.perf_counter()) > 0:
        time.sleep(min(1.0, left))
        if (bytes_now := _resident(server)) > 0:  # 0: too many clients for one more
            resident.append(bytes_now)
        bar.advance()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    # Buffers for the largest batches are there after a while; growth counts from then on.
    last = _resident(server)
    settled = resident[len(resident) // 4] if resident else last
    memory = {
        "settled": settled,
        "end": last,
        "most": max([*resident, last]),
        "growth": last - settled,
    }
    return tallies, memory, took


def _client(
    server: Child, questions: list[_Question], tally: _Tally, number: int, until: float
) -> None:
    """One client: asks until the time is over, on a connection that is renewed now and then."""
    chosen = np.random.default_rng(number)
    while time.perf_counter() < until:
        try:
            with Connection(server.address) as connection:
                for _ in range(_PER_CONNECTION):
                    question = questions[chosen.integers(len(questions))]
                    _ask(connection, question, tally)
                    if time.perf_counter() >= until:
                        return
        except (OSError, ExportError, ValueError, KeyError) as error:
            tally.broken.append(f"{type(error).__name__}: {error}")


def _ask(connection: Connection, question: _Question, tally: _Tally) -> None:
    """One request and the judgement of its answer."""
    start = time.perf_counter()
    reply = connection.ask(question.request)
    seconds = time.perf_counter() - start
    tally.statuses[reply.status] += 1
    if reply.status in _OVERLOADED:
        time.sleep(_BACK_OFF)
    if reply.status != 200:
        return
    tally.seconds.append(seconds)
    expected = question.logits
    logits = reply.logits(expected.shape[1])
    tally.images += len(expected)
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        tally.wrong += 1
        return
    error = float(np.abs(logits - expected).max() / max(1.0, float(np.abs(expected).max())))
    tally.largest = max(tally.largest, error)
    tally.same_bits += logits.tobytes() == expected.tobytes()
    same = (logits.argmax(1) == expected.argmax(1)).all()
    tally.wrong += not (same and error <= TOLERANCE)


def _summary(tallies: list[_Tally]) -> dict[str, Any]:
    """All clients together."""
    statuses = sum((tally.statuses for tally in tallies), Counter[int]())
    broken = [reason for tally in tallies for reason in tally.broken]
    seconds = [value for tally in tallies for value in tally.seconds]
    failures = [status for status in statuses.elements() if status >= 500]
    return {
        "requests": sum(statuses.values()) + len(broken),
        "answered": statuses[200],
        "wrong": sum(tally.wrong for tally in tallies),
        "same_bits": sum(tally.same_bits for tally in tallies),
        "largest_error": max(tally.largest for tally in tallies),
        "tolerance": TOLERANCE,
        "overloaded": {str(status): statuses[status] for status in _OVERLOADED},
        "other_5xx": sum(status not in _OVERLOADED for status in failures),
        "other_statuses": {
            str(status): count for status, count in sorted(statuses.items())
            if status != 200 and status < 500
        },
        "broken": len(broken),
        "broken_reasons": sorted(set(broken))[:10],
        "latency": asdict(timing(seconds)) if seconds else None,
    }  # fmt: skip


def _resident(server: Child) -> float:
    """Bytes of memory of the server; 0 where the system, or the server, does not tell."""
    return server.metrics().get("process_resident_memory_bytes", 0.0)


def _counted(server: Child) -> dict[str, float]:
    """Inference requests by status as the server counted them."""
    counted = {}
    for key, value in server.metrics().items():
        head, _, status = key.partition('route="infer",status="')
        if head == "epdistill_requests_total{" and status:
            counted[status.rstrip('"}')] = value
    return counted
