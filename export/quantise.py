"""Static int8 quantisation (QDQ, unsigned activations), searched and held to a bound.

Unsigned activations, since x86's VNNI multiplies u8 by s8. Of per-tensor and per-channel
weights, and of ranges by extremes and by percentiles, none is best for every network, so
all are tried; where none keeps the accuracy, once more with the first and the last layer
in float32. Ranges come from training images; the choice and the loss are of validation
images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from epdistill.errors import ExportError, ParityError
from epdistill.export.manifest import INT8, Manifest
from epdistill.export.reduced import Judged, Labels, Reduced, finished, judge, logits_of
from epdistill.export.runtime import Array, OnnxClassifier
from epdistill.export.tracing import one_line, silence

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

CALIBRATION_IMAGES = 256
_READ = 32  # images per call of the calibration
# Layers with weights, and what can stay in int8 between them: a Relu goes into the range of
# what stands before it. The rest stays in float32.
_LAYERS = ("Conv", "Gemm", "MatMul")
_OPERATORS = (*_LAYERS, "Add", "AveragePool", "Clip", "GlobalAveragePool", "MaxPool", "Relu")


@dataclass(frozen=True)
class Setting:
    """One way to quantise.

    Attributes:
        per_channel: A scale per output channel of the weights, rather than one.
        calibration: `"minmax"`: ranges are the extremes seen; `"percentile"`: what all but
            the outermost activations lie in.
        float_ends: The first and the last layer stay in float32.
    """

    per_channel: bool
    calibration: str
    float_ends: bool


SEARCHED = tuple(
    Setting(per_channel, calibration, False)
    for calibration in ("minmax", "percentile")
    for per_channel in (True, False)
)


class _Reader:
    """Feeds images to onnxruntime's calibration, a few at a time."""

    def __init__(self, classifier: OnnxClassifier, images: Array) -> None:
        self._feeds = [
            classifier.feed(images[start : start + _READ]) for start in range(0, len(images), _READ)
        ]
        self._left = iter(self._feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with these batches: onnxruntime bounds its memory this way."""
        self._left = iter(self._feeds[start_index:end_index])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next batch by input name, None after the last."""
        return next(self._left, None)


def quantise(
    data: bytes,
    source: Manifest,
    *,
    calibration: Array,
    images: Array,
    labels: Labels,
    max_drop: float,
    searched: Sequence[Setting] = SEARCHED,
) -> Reduced:
    """The best int8 version of a float32 file.

    The settings that stay within `max_drop` come first, then the smallest divergence from
    the float32 probabilities, which tells settings apart where the accuracy of a few
    hundred images cannot.

    Args:
        data: The float32 file.
        source: Its manifest.
        calibration: Training images (N, C, H, W) in [0,1]; some hundreds.
        images: Validation images, likewise.
        labels: Their classes, (N,).
        max_drop: Points of top-1 accuracy that may be lost.
        searched: What is tried first.

    Raises:
        ExportError: onnxruntime cannot quantise the graph.
    """
    original = OnnxClassifier(data, source="the float32 file")
    before = logits_of(original, images)
    tried: list[tuple[Setting, Judged, ModelProto]] = []

    def try_all(settings: Sequence[Setting]) -> None:
        for setting in settings:
            proto = _quantised(prepared, original, calibration, setting)
            int8 = finished(proto, source.metadata)
            after = logits_of(OnnxClassifier(int8, source="the int8 graph"), images)
            tried.append((setting, judge(before, after, labels), proto))

    def rank(trial: tuple[Setting, Judged, ModelProto]) -> tuple[bool, float]:
        return trial[1].drop_points > max_drop, trial[1].divergence

    with tempfile.TemporaryDirectory() as folder:
        prepared = _prepared(data, Path(folder))
        try_all(searched)
        if rank(min(tried, key=rank))[0]:
            try_all([Setting(item.per_channel, item.calibration, True) for item in searched])
    setting, judged, proto = min(tried, key=rank)
    trials = tuple(
        {**asdict(item), "drop_points": found.drop_points, "divergence": found.divergence}
        for item, found, _ in tried
    )
    how = {**asdict(setting), "calibration_images": len(calibration)}
    return Reduced(proto, INT8, how, judged, trials)


def _prepared(data: bytes, folder: Path) -> Path:
    """The model with BatchNorms folded into convolutions and every shape known."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    given, prepared = folder / "float.onnx", folder / "prepared.onnx"
    given.write_bytes(data)
    try:
        with silence():
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
    except Exception as error:  # onnxruntime's errors share no other base
        raise _failed(error) from error
    return prepared


def _quantised(
    prepared: Path, classifier: OnnxClassifier, calibration: Array, setting: Setting
) -> ModelProto:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    out = prepared.with_name("int8.onnx")
    try:
        with silence():
            quantize_static(
                str(prepared),
                str(out),
                _Reader(classifier, calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_OPERATORS),
                per_channel=setting.per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_ends(onnx.load(prepared)) if setting.float_ends else [],
                calibrate_method=methods[setting.calibration],
                extra_options={
                    # Logits in 256 steps would make ties of near answers.
                    "OpTypesToExcludeOutputQuantization": ["Gemm"],
                    "CalibStridedMinMax": 1,
                },
            )
    except Exception as error:  # onnxruntime's errors share no other base
        raise _failed(error) from error
    return onnx.load(out)


def _ends(proto: ModelProto) -> list[str]:
    """Names of the first and the last layer with weights."""
    weights = {tensor.name for tensor in proto.graph.initializer}

    def has_weights(node: NodeProto) -> bool:
        return node.op_type in _LAYERS and node.input[1] in weights

    names = [node.name for node in proto.graph.node if has_weights(node)]
    if not names:
        raise ParityError("the graph has no layer with weights; expected a network")
    return [names[0], names[-1]]


def _failed(error: Exception) -> ExportError:
    return ExportError(
        f"onnxruntime cannot quantise the graph ({one_line(error)}); expected convolutions and "
        "matrix products: ship the float32 file"
    )


def calibration_choice(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of `count` training images the ranges are taken from: at most 256, increasing."""
    order = np.random.default_rng(seed).permutation(count)[:CALIBRATION_IMAGES]
    return np.sort(order)
