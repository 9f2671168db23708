"""The examples of docs/api.md, each run; and that the interface keeps up with the command line."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import epdistill
from epdistill.errors import RecipeError

DOCUMENT = Path(__file__).parents[2] / "docs/api.md"
TINY = {
    "TEACHER__CHANNELS": "[8, 16]",
    "TEACHER__BATCH_SIZE": "32",
    "STUDENT__BATCH_SIZE": "32",
    "STUDENT__NAME": "cnn",
    "EVALUATE__LIMIT": "12",
    "EVALUATE__LINF": "[0.05]",
    "EVALUATE__L2": "[0.5]",
    "EVALUATE__STEPS": "2",
    "EVALUATE__QUERIES": "4",
}
# Flags of the command line that are about the terminal.
TERMINAL = {"json"}
BENCHES = {"bench_dynamics", "bench_distill", "bench_serve", "bench_load"}


def examples() -> list[tuple[str, str]]:
    """Heading and code of every example."""
    found = []
    for part in DOCUMENT.read_text().split("\n## ")[1:]:
        heading = part.splitlines()[0]
        found += [(heading, code) for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL)]
    return found


def test_every_task_has_an_example_of_at_most_15_lines() -> None:
    found = examples()
    for heading, code in found:
        lines = [line for line in code.splitlines() if line.strip()]
        assert 2 <= len(lines) <= 15, heading
    text = " ".join(code for _, code in found)
    for name in epdistill.__all__:
        if name not in {"__version__", "plan_ablation", *BENCHES}:
            assert f"epdistill.{name}(" in text, name
    assert "epdistill.export(" in text


@pytest.mark.slow
def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in TINY.items():
        monkeypatch.setenv(f"EPDISTILL__{name}", value)
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save("five.png")
    names: dict[str, Any] = {}
    for heading, code in examples():
        if heading != "Serve":
            exec(compile(code, f"docs/api.md, {heading}", "exec"), names)
    printed = capsys.readouterr().out
    assert "runs/digits-ep-cnn-001" in printed
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "ablation").is_dir()
    # What was tracked: one line per epoch.
    assert names["finished"].summary["recipe"] == "digits"
    (serving,) = (code for heading, code in examples() if heading == "Serve")
    _serve(serving)


def _serve(code: str) -> None:
    """Run the example as a program of its own, ask it whether it is ready, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "port=8000" in code
    program = code.replace("port=8000", f"port={port}, linger=0.1")
    child = subprocess.Popen([sys.executable, "-P", "-c", program], stderr=subprocess.PIPE)
    try:
        url = f"http://127.0.0.1:{port}/v2/health/ready"
        for _ in range(600):
            assert child.poll() is None, child.stderr and child.stderr.read()
            try:
                with urllib.request.urlopen(url, timeout=1) as answer:
                    assert answer.status == 200
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        else:
            raise AssertionError("the server did not get ready")
    finally:
        child.send_signal(signal.SIGTERM)
        _, problems = child.communicate(timeout=60)
    assert child.returncode == 0, problems


def test_the_functions_take_what_the_flags_say() -> None:
    from typer.main import get_command

    from epdistill.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {name.replace("-", "_") for name in commands} == set(epdistill.api.__all__) - {
        "load",
        "plan_ablation",
        *BENCHES,
    }
    for name, command in commands.items():
        function = getattr(epdistill.api, name.replace("-", "_"))
        taken = set(inspect.signature(function).parameters)
        flags = {parameter.name for parameter in command.params} - TERMINAL
        if name == "bench":  # one word list on the command line, a function each here
            flags = (flags - {"words"}) | {"run"}
            for other in BENCHES:
                taken |= set(inspect.signature(getattr(epdistill.api, other)).parameters)
        if name == "ablate":
            flags -= {"plan"}  # `plan_ablation`
        if name == "predict":
            flags = (flags - {"files"}) | {"images", "model"}
        assert flags <= taken, f"{name}: {sorted(flags - taken)}"


def test_every_parameter_is_described() -> None:
    for name in epdistill.api.__all__:
        function = getattr(epdistill.api, name)
        text = inspect.getdoc(function) or ""
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter}"


def test_importing_is_light_and_names_come_when_asked() -> None:
    code = (
        "import epdistill, sys\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'pydantic', 'rich', 'typer'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'teach' in dir(epdistill) and 'export' in dir(epdistill)\n"
        "assert callable(epdistill.teach) and callable(epdistill.export)\n"
        "assert not heavy & set(sys.modules)\n"
        "from epdistill.export.manifest import Manifest\n"
        "assert callable(epdistill.export) and epdistill.export.manifest.Manifest is Manifest\n"
        "print(hasattr(epdistill, 'nothing'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False,
        env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_mistakes_are_told_as_the_command_would(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean digits"):
        epdistill.teach("digit", runs=tmp_path)
    with pytest.raises(RecipeError, match="expected it with an ep-cnn alone"):
        epdistill.teach(model="vit", rule="bptt", runs=tmp_path)
    with pytest.raises(RecipeError, match="track 'wandb'"):
        epdistill.teach(track=["wandb"], runs=tmp_path)
    with pytest.raises(RecipeError, match="resume with"):
        epdistill.ablate("digits", resume=True, runs=tmp_path)
    assert not any(tmp_path.iterdir())
