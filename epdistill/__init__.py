"""epdistill: EP-CNN teachers, feedforward students that land on their fixed points, ONNX."""

import os

# onnxruntime's official builds report model names and hashes to a collector
# unless this is set before the library initialises; users did not ask for that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["__version__"]
