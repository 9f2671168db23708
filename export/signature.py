"""What goes into an image classifier's graph and what comes out, read off its declarations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epdistill.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

CLASSES_KEY = "epdistill.classes"


@dataclass(frozen=True)
class Signature:
    """The one input and the one output of a graph.

    Attributes:
        input: Name of the input.
        image_shape: (C, H, W) of one image.
        pixels: The input is uint8 (batch, H, W, C), values 0..255; otherwise float32
            (batch, C, H, W) in [0,1].
        output: Name of the output, float32 (batch, K).
        classes: Names of the K classes in the order of the logits.
    """

    input: str
    image_shape: tuple[int, int, int]
    pixels: bool
    output: str
    classes: tuple[str, ...]


def read_signature(proto: ModelProto, source: str) -> Signature:
    """The signature of a parsed model; without names in its metadata the classes are "0".."K-1".

    Args:
        proto: The model.
        source: How messages call it.

    Raises:
        ExportError: It is no image classifier with a free batch.
    """
    name, shape, pixels = _image_input(proto, source)
    output, count = _logits_output(proto, source)
    metadata = {item.key: item.value for item in proto.metadata_props}
    return Signature(name, shape, pixels, output, _classes(metadata, count, source))


def _sizes(value: ValueInfoProto) -> tuple[int | None, ...]:
    """The declared dimensions; None for one that is free."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _only(values: Sequence[ValueInfoProto], what: str, source: str) -> ValueInfoProto:
    if len(values) != 1:
        names = ", ".join(value.name for value in values)
        raise ExportError(
            f"{source} has {len(values)} {what}s ({names}); expected one: export a classifier"
        )
    return values[0]


def _image_input(proto: ModelProto, source: str) -> tuple[str, tuple[int, int, int], bool]:
    """Name and (C, H, W) of the only input, and whether it takes bytes, channels last."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in proto.graph.initializer}
    real = [value for value in proto.graph.input if value.name not in weights]
    value = _only(real, "input", source)
    kind = value.type.tensor_type.elem_type
    match _sizes(value):
        case (None, int(a), int(b), int(c)) if kind == TensorProto.FLOAT:
            return value.name, (a, b, c), False
        case (None, int(a), int(b), int(c)) if kind == TensorProto.UINT8:
            return value.name, (c, a, b), True
        case (int(batch), _, _, _):
            raise ExportError(
                f"{source} takes batches of exactly {batch}; expected a free batch dimension: "
                "export it again with a dynamic batch"
            )
        case sizes:
            raise ExportError(
                f"{source} has the input {value.name} with dimensions {_shown(sizes)}; expected "
                "float32 (batch, C, H, W) or uint8 (batch, H, W, C) with fixed C, H, W: "
                "export an image classifier"
            )


def _logits_output(proto: ModelProto, source: str) -> tuple[str, int]:
    """Name and number of classes of the only output."""
    from onnx import TensorProto

    value = _only(proto.graph.output, "output", source)
    match _sizes(value):
        case (None, int(classes)) if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            return value.name, classes
        case (int(batch), _):
            raise ExportError(
                f"{source} answers batches of exactly {batch}; expected a free batch dimension: "
                "export it again with a dynamic batch"
            )
        case sizes:
            raise ExportError(
                f"{source} has the output {value.name} with dimensions {_shown(sizes)}; expected "
                "float32 (batch, K) logits: export a classifier"
            )


def _shown(sizes: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in sizes) + ")"


def _classes(metadata: Mapping[str, str], outputs: int, source: str) -> tuple[str, ...]:
    if CLASSES_KEY not in metadata:
        return tuple(str(number) for number in range(outputs))
    try:
        names = json.loads(metadata[CLASSES_KEY])
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError(
            f"{source} has unreadable metadata {CLASSES_KEY}; expected a JSON list of names: "
            "export it again"
        )
    if len(names) != outputs:
        raise ExportError(
            f"{source} names {len(names)} classes for {outputs} logits; expected one name per logit"
        )
    return tuple(names)
