"""The small exported student that comes with the package, so that there is something to serve."""

from __future__ import annotations

from pathlib import Path

from epdistill.runs import SHIPPED, or_shipped

FOLDER = Path(__file__).parent / SHIPPED
FILE = "cifar10-resnet18-int8.onnx"


def named(model: Path) -> Path:
    """The file that a user means: `shipped` is the one that comes with the package.

    Args:
        model: As typed; a file or folder of that name in the current folder comes first.
    """
    return or_shipped(model, FOLDER / FILE)
