"""What an ONNX graph may hold: checked before it is run, stripped before it is shipped.

A model file is input from outside. onnxruntime follows references to other
files (it accepts a hard-linked one that the `onnx` package rejects) and executes
whatever operators its build knows, so the parsed graph is judged first, and
onnxruntime is given the bytes that were judged, never the path again.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epdistill.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# The largest file worth opening: protobuf itself stops at 2 GiB, and checking
# holds the bytes, the parsed graph and the session in memory at once.
MAX_BYTES = 1 << 30
# More sweeps than any relaxation needs: a loop must come to an end.
MAX_TRIPS = 10_000

# Where a tensor keeps its values.
_NUMBERS = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data")
# A Python source path inside a string: what stack traces are made of.
_SOURCE_PATH = re.compile(rb"(?:[A-Za-z]:\\|/)[\w.\-/\\ ]*[\w\-]\.py\b")


def messages(root: Any) -> Iterator[Any]:
    """Yield `root` and every protobuf message below it, whatever field holds it.

    A walk over the descriptors, so that no corner (functions, subgraphs, sparse
    tensors, training info) is forgotten.
    """
    stack = [root]
    while stack:
        message = stack.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is None:
                continue
            if hasattr(value, "ListFields"):
                stack.append(value)
            else:
                stack.extend(value)


def parse_checked(data: bytes, source: str, *, loops: bool = False) -> ModelProto:
    """Parse the bytes of a model and refuse what this package does not run.

    Args:
        data: The whole file.
        source: How messages call it (a path).
        loops: Allow loops of a fixed length that do not contain others: a teacher's
            relaxation. To be set only where the manifest says so.

    Returns:
        The parsed model: self-contained, standard operators, no other control flow.

    Raises:
        ExportError: Not an ONNX model, cut short, too large, or it holds external
            data, another operator domain, or control flow.
    """
    from onnx import ModelProto, NodeProto, TensorProto

    if len(data) > MAX_BYTES:
        raise ExportError(
            f"{source} has {len(data)} bytes; expected at most {MAX_BYTES}: export a smaller model"
        )
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, from a package without types
        raise ExportError(
            f"{source} is not an ONNX file, or is cut short; export it again"
        ) from error
    if not proto.ir_version or not proto.graph.node or not proto.graph.output:
        raise ExportError(
            f"{source} holds no ONNX graph (empty, cut short, or another kind of file); "
            "export it again"
        )
    domains = {entry.domain for entry in proto.opset_import}
    for message in messages(proto):
        if isinstance(message, NodeProto):
            domains.add(message.domain)
            holds_graph = any(item.HasField("g") or item.graphs for item in message.attribute)
            controls = message.op_type in CONTROL_FLOW or holds_graph
            if controls and not (loops and message.op_type == "Loop"):
                raise ExportError(
                    f"{source} uses the control-flow operator {message.op_type}; "
                    "expected a feedforward graph: export a student"
                )
        elif isinstance(message, TensorProto) and (
            message.data_location == TensorProto.EXTERNAL or message.external_data
        ):
            raise ExportError(
                f"{source} keeps the tensor {message.name or '(unnamed)'} in another file; "
                "expected one self-contained file: export without external data"
            )
    unknown = sorted(domains - ALLOWED_DOMAINS)
    if unknown:
        raise ExportError(
            f"{source} uses operators of the domain {unknown[0]!r}; expected standard ONNX "
            "operators only: export without custom operators"
        )
    if loops:
        _check_loops(proto, source)
    return proto


def _check_loops(proto: ModelProto, source: str) -> None:
    """Refuse loops inside others, and those whose length the file does not fix."""
    from onnx import NodeProto, numpy_helper

    found = [m for m in messages(proto) if isinstance(m, NodeProto) and m.op_type == "Loop"]
    outer = [node for node in proto.graph.node if node.op_type == "Loop"]
    lengths = {tensor.name: tensor for tensor in proto.graph.initializer}
    lengths = {node.input[0]: lengths[node.input[0]] for node in outer if node.input[0] in lengths}
    trips = [int(numpy_helper.to_array(tensor).reshape(-1)[0]) for tensor in lengths.values()]
    fixed = all(node.input[0] in lengths for node in outer)
    if len(found) != len(outer) or not fixed or not all(0 < n <= MAX_TRIPS for n in trips):
        raise ExportError(
            f"{source} holds a loop that is nested or not of a fixed length of 1 to {MAX_TRIPS}; "
            "expected a teacher's relaxation: export it again"
        )


def strip_traces(proto: ModelProto) -> None:
    """Remove, in place, every doc string and all metadata below the model's own.

    The exporter writes the stack trace of each operation, with the absolute
    paths of the machine it ran on, and internal names of its passes into nodes,
    values and the graph. None of it is needed to run the model.
    """
    for message in messages(proto):
        fields = message.DESCRIPTOR.fields_by_name
        if "doc_string" in fields:
            message.ClearField("doc_string")
        if "metadata_props" in fields and message is not proto:
            message.ClearField("metadata_props")


def local_paths(data: bytes) -> list[str]:
    """Paths of this machine that stand anywhere in a model's text (weights are left out).

    Looked for: this process's working, home, temporary and installation folders,
    and anything that reads like the path of a Python source file.
    """
    from onnx import ModelProto, TensorProto

    proto = ModelProto.FromString(data)
    for message in messages(proto):
        if isinstance(message, TensorProto):  # random bytes can spell anything
            for name in _NUMBERS:
                message.ClearField(name)
    text = proto.SerializeToString()
    # Unlike Path.home() this gives "~" back, and does not raise, where there is none.
    home = Path(os.path.expanduser("~"))  # noqa: PTH111
    package = Path(__file__).resolve().parent.parent
    places = {Path.cwd(), home, Path(sys.prefix), Path(tempfile.gettempdir()), package}
    found = {
        str(place) for place in places if len(place.parts) > 1 and f"{place}/".encode() in text
    }
    found |= {match.group().decode(errors="replace") for match in _SOURCE_PATH.finditer(text)}
    return sorted(found)
