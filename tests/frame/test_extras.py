"""All extras live together in one environment, and the reference is built without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def wanted(names: list[str]) -> list[Requirement]:
    """The requirements of some extras, those on other extras of ours followed."""
    extras, found, seen = project()["optional-dependencies"], [], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in extras[name]:
            requirement = Requirement(text)
            if requirement.name == "epdistill":
                names += requirement.extras
            else:
                found.append(requirement)
    return found


def test_the_development_install_holds_every_extra() -> None:
    extras = set(project()["optional-dependencies"])
    for extra in extras:
        missing = {str(item) for item in wanted([extra])} - {str(item) for item in wanted(["dev"])}
        assert not missing, f"dev lacks {missing} of {extra}"


def test_what_every_extra_asks_for_is_installed_together() -> None:
    """One environment satisfies the package, all extras, and all that these ask for in turn."""
    queue = [Requirement(text) for text in project()["dependencies"]]
    queue += wanted(list(project()["optional-dependencies"]))
    seen: set[tuple[str, frozenset[str]]] = set()
    problems = []
    while queue:
        requirement = queue.pop()
        try:
            installed = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(installed.version, prereleases=True):
            problems.append(f"{requirement}, but {installed.version} is installed")
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in installed.requires or ():
            further = Requirement(text)
            given = ({"extra": extra} for extra in ("", *requirement.extras))
            if further.marker is None or any(further.marker.evaluate(e) for e in given):
                queue.append(further)
    assert not problems, "; ".join(problems)
    assert {"torchattacks", "requests", "tensorboard", "fastapi"} <= {name for name, _ in seen}


def test_pip_finds_nothing_broken() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (modules,) = re.findall(r"^DOCUMENTED := (.*)$", recipe, re.MULTILINE)
    flags = "-P -W error -W ignore::DeprecationWarning -m pdoc --docformat google"
    assert flags in recipe
    command = [sys.executable, *flags.split()]
    done = subprocess.run(
        [*command, "--output-directory", str(tmp_path), *modules.split()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warn" not in done.stderr.lower(), done.stderr[-2000:]
    for page, words in {
        "epdistill/api.html": "distill",
        "epdistill/tracking.html": "TensorBoard",
        "epdistill/teachers/relaxation.html": "relax",
        "epdistill/export/runtime.html": "OnnxClassifier",
    }.items():
        assert words in (tmp_path / page).read_text(), page
