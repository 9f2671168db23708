"""The models, queues and counters of one server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy.typing as npt
from fastapi import Request

from epdistill.errors import RequestError
from epdistill.export.serving.batching import Answer, Batcher
from epdistill.export.serving.intake import CLIENT_GONE, Intake
from epdistill.export.serving.metrics import Metrics
from epdistill.export.serving.models import VERSION, ServedModel
from epdistill.export.serving.settings import Limits

# Decoding and JSON are done beside the event loop; more threads would only take
# processors from onnxruntime.
_WORKERS = 2


class Engine:
    """What the application's routes work with.

    Args:
        models: By name, the first one being the default.
        limits: Everything that bounds it.

    Attributes:
        models: As given.
        limits: As given.
        metrics: Its counters.
        intake: Reads bodies.
        workers: Threads for what would block the event loop.
        started: The queues are being served.
        draining: The end is near: not ready for more, though requests are still answered.
        open: Requests in progress.
    """

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.intake = Intake(limits)
        self.workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
        self.started = False
        self.draining = False
        self.open = 0
        self._batchers: dict[str, Batcher] = {}

    @property
    def ready(self) -> bool:
        """Whether more requests are welcome."""
        return self.started and not self.draining

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve the queues as long as the block lasts."""
        for name, model in self.models.items():
            batcher = self._batchers[name] = Batcher(model, self.limits, self.metrics)
            self.metrics.watch(name, lambda batcher=batcher: batcher.waiting)  # type: ignore[misc]
        tasks = [asyncio.create_task(batcher.work()) for batcher in self._batchers.values()]
        self.started = True
        try:
            yield
        finally:
            self.started = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.workers.shutdown(cancel_futures=True)

    def find(self, name: str | None, version: str = VERSION) -> ServedModel:
        """A model by its name; the first one for None.

        Raises:
            RequestError: 404; there is no such model or version.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RequestError(
                404, f"received the model {name[:80]!r}; expected one of {', '.join(self.models)}"
            )
        if version != VERSION:
            raise RequestError(404, f"received version {version[:20]!r}; expected {VERSION}")
        return self.models[name]

    async def compute(
        self, request: Request, model: ServedModel, tensor: npt.NDArray[Any], until: float
    ) -> Answer:
        """Logits for a request whose body has been read.

        Args:
            request: Watched, so that nothing is computed for a client that hung up.
            model: One of `models`.
            tensor: (N, ...) as the model takes it.
            until: The deadline on the clock `time.monotonic`.

        Raises:
            RequestError: As `Batcher.submit`; 504 at the deadline; 499 for a client gone.
        """
        answer = asyncio.ensure_future(self._batchers[model.name].submit(tensor))
        gone = asyncio.ensure_future(request.receive())  # the body is read: this is its end
        try:
            done, _ = await asyncio.wait(
                {answer, gone},
                timeout=max(0.0, until - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
        if answer in done:
            return answer.result()
        if gone in done:
            raise RequestError(CLIENT_GONE, "the client hung up")
        raise RequestError(504, "the deadline passed before the answer; try again", retry=True)
