"""epdistill: EP-CNN teachers, feedforward students that land on their fixed points, ONNX.

Every command of the command line is a function here, loaded when it is first used:
`run`, `teach`, `distill`, `ablate`, `evaluate`, `export`, `load`, `predict`, `bench`,
`bench_dynamics`, `bench_distill`, `bench_serve`, `bench_load`, `plan_ablation`, `check`,
`check_theorem`, `report`, `results` and `serve`. They are described in `epdistill.api`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epdistill.api import (
        ablate,
        bench,
        bench_distill,
        bench_dynamics,
        bench_load,
        bench_serve,
        check,
        check_theorem,
        distill,
        evaluate,
        load,
        plan_ablation,
        predict,
        report,
        results,
        run,
        serve,
        teach,
    )

# onnxruntime's official builds report model names and hashes to a collector
# unless this is set before the library initialises; users did not ask for that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "ablate",
    "bench",
    "bench_distill",
    "bench_dynamics",
    "bench_load",
    "bench_serve",
    "check",
    "check_theorem",
    "distill",
    "evaluate",
    "load",
    "plan_ablation",
    "predict",
    "report",
    "results",
    "run",
    "serve",
    "teach",
]

# Modules that need no import of their own; `export` can also be called (see its docstring).
_MODULES = ("api", "errors", "export", "tracking")


def __getattr__(name: str) -> Any:
    """Load what is asked for; `import epdistill` alone stays light."""
    if name in __all__:
        found = getattr(importlib.import_module("epdistill.api"), name)
    elif name in _MODULES:
        found = importlib.import_module(f"epdistill.{name}")
    else:
        raise AttributeError(f"module 'epdistill' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
