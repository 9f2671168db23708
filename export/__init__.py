"""Export: ONNX behind a parity gate, a careful way to run it, predictions, benchmarks.

    onnx_export       torch module -> one self-contained `.onnx` file and its manifest
    tracing           torch module -> ONNX graph in memory
    relaxation_graph  a teacher's relaxation -> ONNX graph with a Loop
    parity            the gate: the graph against the module in float32 and float64
    graph             what an ONNX graph may hold: checks before running, strips before shipping
    labelling         what a file says about itself: its `metadata_props`
    manifest          the JSON beside the file: SHA-256, classes, figures
    card              the same for people
    signature         what goes into a graph and what comes out
    runtime           `OnnxClassifier`, the checked file on onnxruntime
    quantise, half    int8 and float16 versions of a file
    reduced           how those are judged and written
    triton            a model repository for Triton and KServe
    predict           image files -> labels and probabilities
    bench             interleaved latency measurements of several contenders
    costs             operations, the machine's matrix rate, torch.compile

Import from the modules; nothing heavy is loaded before it is needed.

The package can be called: `epdistill.export(run)` is `epdistill.api.export(run)`, so that this
command too is a function of its name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epdistill.workflows.deployment import Exported


class _Room(ModuleType):
    """A package with a verb for its name."""

    def __call__(self, *args: Any, **settings: Any) -> Exported:
        from epdistill.api import export

        return export(*args, **settings)


sys.modules[__name__].__class__ = _Room
