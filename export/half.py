"""float16 for GPUs and for half the download; input and output stay float32."""

from __future__ import annotations

from epdistill.errors import ExportError
from epdistill.export.manifest import FLOAT16, Manifest
from epdistill.export.reduced import Labels, Reduced, finished, judge, logits_of
from epdistill.export.runtime import Array, OnnxClassifier
from epdistill.export.tracing import one_line, silence


def halve(data: bytes, source: Manifest, *, images: Array, labels: Labels) -> Reduced:
    """The float16 version of a float32 file.

    Args:
        data: The float32 file.
        source: Its manifest.
        images: Validation images (N, C, H, W) in [0,1].
        labels: Their classes, (N,).

    Raises:
        ExportError: onnxruntime cannot convert the graph.
        ParityError: It gives something that is not finite.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    before = logits_of(OnnxClassifier(data, source="the float32 file"), images)
    try:
        with silence():
            proto = convert_float_to_float16(onnx.load_from_string(data), keep_io_types=True)
            ONNXModel(proto).topological_sort()  # the casts of the inputs come in last
    except Exception as error:  # onnxruntime's errors share no other base
        raise ExportError(
            f"onnxruntime cannot convert the graph to float16 ({one_line(error)}); "
            "ship the float32 file"
        ) from error
    half = OnnxClassifier(finished(proto, source.metadata), source="the float16 graph")
    judged = judge(before, logits_of(half, images), labels)
    return Reduced(proto, FLOAT16, {"keep_io_types": True}, judged, ())
