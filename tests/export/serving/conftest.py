"""What the tests of the server share: exported models, and a server of its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from epdistill.export.onnx_export import export_onnx
from epdistill.export.runtime import OnnxClassifier

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def stop(self, seconds: float = 20) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def digits() -> Array:
    """1797 images (N,1,8,8) in [0,1]."""
    return (load_digits().images / 16).astype(np.float32)[:, None]


def _trained(seed: int) -> nn.Module:
    """A small convnet that reads most digits."""
    data = load_digits()
    images = torch.tensor(data.images[:500] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target[:500])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 10),
        )  # fmt: skip
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimiser.step()
    return net.eval()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, digits: Array) -> Path:
    """An exported digits model called `digits`."""
    return _export(tmp_path_factory.mktemp("served") / "digits.onnx", 0, digits)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, digits: Array) -> Path:
    """Another one, called `other`."""
    return _export(tmp_path_factory.mktemp("served") / "other.onnx", 1, digits)


def _export(out: Path, seed: int, digits: Array) -> Path:
    names = tuple(f"digit {k}" for k in range(10))
    export_onnx(
        _trained(seed), out, image_shape=(1, 8, 8), classes=names,
        images=torch.from_numpy(digits[:16]), metadata={},
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def direct(model: Path) -> OnnxClassifier:
    """The digits model on onnxruntime, without a server."""
    return OnnxClassifier.open_checked(model, threads=1)


@pytest.fixture(scope="session")
def start() -> Start:
    """Start a server on a free port; it is killed at the end unless it has ended by itself."""

    @contextmanager
    def started(*arguments: str | Path, **environment: str) -> Iterator[Running]:
        linger = () if "ray" in arguments else ("--linger", "0.3")
        defaults = ("--port", "0", "--threads", "1", *linger, "--json")
        command = [sys.executable, "-P", "-m", "epdistill", "serve", *defaults]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"the server ended with {process.wait()}"
            yield Running(json.loads(line)["url"], process)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    return started


@pytest.fixture(scope="session")
def server(start: Start, model: Path, other: Path) -> Iterator[Running]:
    """One server with both models, for all tests that leave it as it was."""
    with start(model, other) as running:
        yield running
        assert running.process.poll() is None, "the server died"
