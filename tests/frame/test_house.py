"""The house itself: one import package, lazy start, telemetry off, no second copies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_rooms_are_not_top_level_packages() -> None:
    import epdistill.export.parity
    import epdistill.students.model
    import epdistill.teachers.model

    assert epdistill.teachers.model.EPCNN.__module__ == "epdistill.teachers.model"
    for room in ("teachers", "students", "export"):
        assert room not in sys.modules


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from epdistill.cli.app import app\n"
        "try:\n    app(['--help'], prog_name='epdistill')\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'onnxruntime', 'onnx', 'sklearn', 'pydantic'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    assert python(code).splitlines()[-1] == "HEAVY []"


def test_telemetry_is_off_before_onnxruntime_loads() -> None:
    code = (
        "import epdistill.export.runtime, os, sys\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    assert python(code).strip() == "1"


def test_a_users_choice_about_telemetry_stays() -> None:
    code = "import epdistill, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code, ORT_DISABLE_TELEMETRY="0").strip() == "0"


@pytest.mark.slow
def test_the_built_wheel_works_from_another_folder(tmp_path: Path) -> None:
    """Build a wheel, unpack it alone, and run it without the checkout on the path."""
    root = Path(__file__).parents[2]
    sources = tmp_path / "src"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(sources)], check=True
    )
    (wheel,) = tmp_path.glob("epdistill-*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    assert sorted(p.name for p in site.iterdir() if not p.name.endswith("dist-info")) == [
        "bin",
        "epdistill",
    ]
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import epdistill, epdistill.teachers.model, epdistill.students.model\n"
        "from epdistill.recipes import BUNDLED, load_recipe\n"
        "from pathlib import Path\n"
        "from epdistill.workflows.context import Context\n"
        "from epdistill.workflows.training import teach\n"
        "from epdistill.console import SILENT\n"
        "[load_recipe(name) for name in BUNDLED]\n"
        "teach(load_recipe('digits', {'teacher.epochs': 1}), Context(reporter=SILENT))\n"
        "print(epdistill.__file__, epdistill.teachers.__file__)"
    )
    work = tmp_path / "elsewhere"
    work.mkdir()
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=work, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for path in result.stdout.split():
        assert path.startswith(str(site)), path
