"""Latency of several contenders, measured so that a busy machine hits all of them alike.

Contenders are measured in rounds, one call of each per round, and not one after
the other: what disturbs the machine for a second then disturbs everybody, and
the *ratio* of two medians stays meaningful where a single figure is not. Slow
contenders take part in fewer rounds, spread evenly. Threads are the caller's to
set (torch.set_num_threads, `OnnxClassifier(threads=...)`).
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epdistill.errors import DataError
from epdistill.export.runtime import available_cores

MIN_REPEATS = 3

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `repeats` calls."""

    median: float
    q25: float
    q75: float
    p99: float
    repeats: int


@dataclass(frozen=True)
class Contender:
    """Something that answers a batch of images, float32 (N, C, H, W) in [0,1].

    `run` must return only when the answer is there: on an accelerator it has to
    synchronise, or the queueing is what gets timed.
    """

    name: str
    run: Callable[[Tensor], object]


@dataclass(frozen=True)
class BenchRow:
    """One contender at one batch size; `timing` is in seconds per batch."""

    name: str
    batch_size: int
    timing: Timing

    @property
    def seconds_per_image(self) -> float:
        """Median seconds per batch, divided by its size."""
        return self.timing.median / self.batch_size

    @property
    def images_per_second(self) -> float:
        """The inverse of `seconds_per_image`."""
        return self.batch_size / self.timing.median


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the reference a contender is at one batch size.

    Attributes:
        name: The contender.
        batch_size: Images per call.
        speedup: Reference's median over the contender's; above 1 is faster.
        low: Reference's lower quartile over the contender's upper one.
        high: Reference's upper quartile over the contender's lower one.
    """

    name: str
    batch_size: int
    speedup: float
    low: float
    high: float


def timing(seconds: Sequence[float]) -> Timing:
    """Summarise measured calls; quantiles are interpolated linearly."""
    q25, median, q75, p99 = np.quantile(np.asarray(seconds), [0.25, 0.5, 0.75, 0.99]).tolist()
    return Timing(median=median, q25=q25, q75=q75, p99=p99, repeats=len(seconds))


def measure(
    fn: Callable[[], object],
    *,
    warmup: int,
    repeats: int,
    min_seconds: float,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time one function on its own.

    Args:
        fn: Called without arguments; its result is dropped.
        warmup: Calls before the measurement (caches, lazy initialisation).
        repeats: Measured calls at least (1 or more).
        min_seconds: Go on until the measured calls add up to this long.
        clock: Returns seconds.
    """
    for _ in range(warmup):
        fn()
    seconds: list[float] = []
    while len(seconds) < max(repeats, 1) or sum(seconds) < min_seconds:
        seconds.append(_time(fn, clock))
    return timing(seconds)


def bench(
    contenders: Sequence[Contender],
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    warmup: int = 2,
    rounds: int = 50,
    max_seconds: float = 10.0,
    clock: Clock = time.perf_counter,
) -> list[BenchRow]:
    """Measure all contenders on the same images, interleaved.

    Args:
        contenders: With different names.
        images: float32 (N, C, H, W) in [0,1]; repeated where a batch needs more.
        batch_sizes: Images per call.
        warmup: Calls of each contender before the measurement; the fastest one
            decides how often a contender is measured.
        rounds: Measured calls of each contender per batch size.
        max_seconds: A contender for which they would take longer is measured as often
            as fits in this time, but at least `MIN_REPEATS` times.
        clock: Returns seconds.

    Returns:
        One row per batch size and contender, in the order given.

    Raises:
        DataError: No images, no contenders, two of one name, or a batch size below 1.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) != len(names):
        raise DataError(f"received the contenders {names}; expected one or more, names differing")
    if len(images) == 0 or not batch_sizes or min(batch_sizes) < 1:
        raise DataError(
            f"received {len(images)} images and the batch sizes {tuple(batch_sizes)}; "
            "expected at least one image and sizes from 1 on"
        )
    rows: list[BenchRow] = []
    for size in batch_sizes:
        batch = images[torch.arange(size) % len(images)].contiguous()
        calls = [partial(contender.run, batch) for contender in contenders]
        plans = []
        for call in calls:
            estimate = min(_time(call, clock) for _ in range(max(warmup, 1)))
            affordable = int(max_seconds / estimate) if estimate > 0 else rounds
            plans.append(max(min(rounds, affordable), MIN_REPEATS))
        samples = _interleave(calls, plans, clock)
        rows += [
            BenchRow(name, size, timing(seconds))
            for name, seconds in zip(names, samples, strict=True)
        ]
    return rows


def _interleave(
    calls: Sequence[Callable[[], object]], plans: Sequence[int], clock: Clock
) -> list[list[float]]:
    """Seconds of each call, `plans[i]` times for call i, in rounds over all calls.

    A call with m of R rounds takes part in those where floor(r m / R) grows; who
    goes first rotates, so that nobody always follows the same neighbour's cache.
    """
    rounds, count = max(plans), len(calls)
    samples: list[list[float]] = [[] for _ in calls]
    for r in range(rounds):
        for offset in range(count):
            i = (r + offset) % count
            if (r + 1) * plans[i] // rounds > r * plans[i] // rounds:
                samples[i].append(_time(calls[i], clock))
    return samples


def _time(fn: Callable[[], object], clock: Clock) -> float:
    start = clock()
    fn()
    return clock() - start


def ratios(rows: Sequence[BenchRow], reference_name: str) -> list[Ratio]:
    """How many times faster than one of them the contenders are, per batch size.

    Args:
        rows: What `bench` returned.
        reference_name: The contender to compare with (left out of the result).

    Raises:
        DataError: The reference was not measured at one of the batch sizes.
    """
    references = {row.batch_size: row.timing for row in rows if row.name == reference_name}
    missing = sorted({row.batch_size for row in rows} - references.keys())
    if missing or not rows:
        names = sorted({row.name for row in rows})
        raise DataError(
            f"received the reference {reference_name!r}, not measured at batch sizes {missing}; "
            f"expected one of {names}"
        )
    result = []
    for row in rows:
        if row.name != reference_name:
            base, own = references[row.batch_size], row.timing
            result.append(
                Ratio(
                    name=row.name,
                    batch_size=row.batch_size,
                    speedup=base.median / own.median,
                    low=base.q25 / own.q75,
                    high=base.q75 / own.q25,
                )
            )
    return result


def torch_contender(model: nn.Module, name: str = "torch") -> Contender:
    """A module as a contender: a copy in eval mode, run in inference mode."""
    module = deepcopy(model).eval()

    def run(images: Tensor) -> object:
        with torch.inference_mode():
            return module(images)

    return Contender(name, run)


def hardware() -> dict[str, Any]:
    """What the figures depend on: CPU, cores, torch's threads, versions."""
    return {
        "cpu": _cpu_name(Path("/proc/cpuinfo")),
        "cores": available_cores(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


def _cpu_name(cpuinfo: Path) -> str:
    """The model name of the first CPU in `/proc/cpuinfo`, or what Python knows elsewhere."""
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def to_json(rows: Sequence[BenchRow], reference_name: str | None = None) -> dict[str, Any]:
    """The content of `bench.json`: hardware, rows, and the ratios to a reference if named."""
    content: dict[str, Any] = {
        "hardware": hardware(),
        "rows": [
            {
                "name": row.name,
                "batch_size": row.batch_size,
                "seconds_per_batch": asdict(row.timing),
                "seconds_per_image": row.seconds_per_image,
                "images_per_second": row.images_per_second,
            }
            for row in rows
        ],
    }
    if reference_name is not None:
        content["reference"] = reference_name
        content["ratios"] = [asdict(ratio) for ratio in ratios(rows, reference_name)]
    return content
