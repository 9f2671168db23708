"""Requests that wait become one batch, within a latency budget.

One thread per model runs onnxruntime. While it is busy, requests queue; when it is
free, it takes as many as a batch holds, in their order. It waits for more only when
there is reason to: the batch before was shared by more requests than have come yet, and
the first one has not waited for the whole budget. So a lone client never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epdistill.errors import RequestError
from epdistill.export.serving.metrics import Metrics
from epdistill.export.serving.models import ServedModel
from epdistill.export.serving.settings import Limits

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What a request gets back.

    Attributes:
        logits: float32 (N, K).
        batch: Images in the batch that it was part of.
        queued: Seconds it waited.
        computed: Seconds that onnxruntime took for the batch.
    """

    logits: Array
    batch: int
    queued: float
    computed: float


@dataclass(eq=False)
class _Job:
    tensor: npt.NDArray[Any]
    future: asyncio.Future[Answer]
    since: float


class Batcher:
    """The queue of one model and the thread that serves it.

    To be used inside a running event loop; `work` is the task that serves.

    Args:
        model: Runs the batches.
        limits: `batch`, `delay` and `queue` apply.
        metrics: Is told of every batch.

    Attributes:
        waiting: Images in the queue.
    """

    def __init__(self, model: ServedModel, limits: Limits, metrics: Metrics) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._jobs: deque[_Job] = deque()
        self._changed = asyncio.Event()
        self._last_shared = 1  # requests in the batch before
        self.waiting = 0

    async def submit(self, tensor: npt.NDArray[Any]) -> Answer:
        """Have a tensor (N, ...) computed; cancelled before it began, it is not.

        Args:
            tensor: As the model takes it, N within the limit of a batch.

        Raises:
            RequestError: 503, the queue is full; 500, onnxruntime failed on the batch.
        """
        if self.waiting + len(tensor) > self._limits.queue:
            raise RequestError(
                503,
                f"{self.waiting} images wait for {self._model.name}, and at most "
                f"{self._limits.queue} may; expected a lower rate of requests: try again later",
                retry=True,
            )
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(tensor, future, time.monotonic()))
        self.waiting += len(tensor)
        self._changed.set()
        return await future

    async def work(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix=f"onnx-{self._model.name}") as thread:
            while True:
                await self._gather()
                jobs = self._take()
                if jobs:
                    await self._run(jobs, loop, thread)

    async def _gather(self) -> None:
        """Wait for a request, and for its likely companions within the budget."""
        while not self._jobs:
            self._changed.clear()
            await self._changed.wait()
        with contextlib.suppress(TimeoutError):
            left = self._jobs[0].since + self._limits.delay - time.monotonic()
            async with asyncio.timeout(left):
                while len(self._jobs) < self._last_shared and self.waiting < self._limits.batch:
                    self._changed.clear()
                    await self._changed.wait()

    def _take(self) -> list[_Job]:
        """The next batch's requests, without those that are given up."""
        taken: list[_Job] = []
        images = 0
        while self._jobs and images + len(self._jobs[0].tensor) <= self._limits.batch:
            job = self._jobs.popleft()
            self.waiting -= len(job.tensor)
            if job.future.done():  # its client is gone, or its deadline passed
                continue
            taken.append(job)
            images += len(job.tensor)
        return taken

    async def _run(
        self, jobs: list[_Job], loop: asyncio.AbstractEventLoop, thread: ThreadPoolExecutor
    ) -> None:
        """Compute one batch and hand every request its part."""
        self._last_shared = len(jobs)
        start = time.monotonic()
        try:
            logits, computed = await loop.run_in_executor(thread, self._compute, jobs)
        except Exception as error:  # whatever it was, every request hears of it
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(RequestError(500, str(error)))
            return
        self._metrics.batch(self._model.name, len(logits), computed)
        offset = 0
        for job in jobs:
            part = logits[offset : offset + len(job.tensor)]
            offset += len(job.tensor)
            self._metrics.queued(self._model.name, start - job.since)
            if not job.future.done():
                job.future.set_result(Answer(part, len(logits), start - job.since, computed))

    def _compute(self, jobs: list[_Job]) -> tuple[Array, float]:
        """Logits of all requests together, and the seconds they took; in the model's thread."""
        tensors = [job.tensor for job in jobs]
        merged = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        classifier = self._model.classifier
        start = time.perf_counter()
        logits = classifier.run_feed({classifier.signature.input: merged})
        return logits, time.perf_counter() - start
