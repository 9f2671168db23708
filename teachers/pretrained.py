"""The small trained teacher that comes with the package, for timings and first steps."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import load

from epdistill.errors import RunError
from epdistill.runs import SHIPPED, or_shipped
from epdistill.teachers.architecture import Architecture
from epdistill.teachers.model import EPCNN
from epdistill.teachers.schedule import Schedule

FOLDER = SHIPPED


def shipped_folder() -> Path:
    """Where the teacher lies that comes with the package; nothing is written there."""
    return Path(__file__).parent / FOLDER


def named(run: Path) -> Path:
    """The run that a user means: `shipped` is the one that comes with the package.

    Args:
        run: As typed; a folder of that name in the current folder comes first.
    """
    return or_shipped(run, shipped_folder())


def shipped_teacher() -> tuple[EPCNN, dict[str, Any]]:
    """An EP-CNN (32-64-128-128) taught on CIFAR-10, and what is recorded about it.

    Returns:
        The teacher in eval mode, and its `config.json`: recipe, results, checksum.

    Raises:
        RunError: The installed files are damaged.
    """
    folder = resources.files("epdistill.teachers").joinpath(FOLDER)
    config = json.loads(folder.joinpath("config.json").read_text())
    data = folder.joinpath("model.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != config["weights_sha256"]:
        raise RunError(
            "the teacher that comes with the package is damaged (its SHA-256 does not fit); "
            "install epdistill again"
        )
    model = config["model"]
    teacher = EPCNN(Architecture.from_dict(model["architecture"]), Schedule(**model["schedule"]))
    teacher.load_state_dict(load(data))
    return teacher.eval(), config
