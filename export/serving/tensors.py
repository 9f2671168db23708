"""Inference requests and answers of the Open Inference Protocol v2.

Tensors are JSON numbers, or follow the JSON as raw little-endian bytes (Triton's binary
tensor data extension): `binary_data_size` in a tensor's parameters says how many, and the
header `Inference-Header-Content-Length` where the JSON ends.

Source: the protocol's REST specification (kserve/open-inference-protocol), and Triton's
protocol extensions, "Binary Tensor Data".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from epdistill.errors import RequestError
from epdistill.export.serving.models import VERSION, ServedModel
from epdistill.export.serving.settings import Limits

LENGTH_HEADER = "inference-header-content-length"
_KINDS = {"FP32": "iuf", "UINT8": "iu"}


@dataclass(frozen=True)
class InferRequest:
    """A request for inference that was found to be in order.

    Attributes:
        tensor: (N, ...) as the model takes it.
        id: What the client calls the request, to be repeated in the answer.
        binary: The client wants the logits as raw bytes.
    """

    tensor: npt.NDArray[Any]
    id: str | None
    binary: bool


def read_infer(body: bytes, header: str | None, model: ServedModel, limits: Limits) -> InferRequest:
    """Read a request, refusing everything that is not exactly right.

    Args:
        body: The whole body.
        header: The value of `Inference-Header-Content-Length`, None without it.
        model: Whose input is expected.
        limits: `batch` and `json_bytes` apply.

    Raises:
        RequestError: 400 or 413, saying what was received and expected.
    """
    length = _json_length(header, len(body))
    if length > limits.json_bytes:
        raise RequestError(
            413,
            f"received {length} bytes of JSON; expected at most {limits.json_bytes}: "
            "send the tensor as binary data, or fewer images",
        )
    try:
        content = orjson.loads(memoryview(body)[:length])
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the request is not valid JSON ({error})") from error
    request = _object(content, "the request")
    identity = request.get("id")
    if not isinstance(identity, str | None):
        raise RequestError(400, "received an id that is no string; expected a string, or none")
    given = request.get("inputs")
    if not isinstance(given, list) or len(given) != 1:
        count = len(given) if isinstance(given, list) else "no list of"
        name = model.classifier.signature.input
        raise RequestError(400, f"received {count} inputs; expected a list of one, {name!r}")
    tensor = _input(_object(given[0], "the input"), body, length, model, limits)
    return InferRequest(tensor, identity, _wants_binary(request, model))


def write_infer(
    request: InferRequest, logits: npt.NDArray[np.float32], model: ServedModel
) -> tuple[bytes, int | None]:
    """The answer's body, and where its JSON ends when bytes follow.

    Raises:
        RequestError: 500; the logits hold what JSON cannot: NaN or an infinity.
    """
    output: dict[str, Any] = {
        "name": model.classifier.signature.output,
        "datatype": "FP32",
        "shape": list(logits.shape),
    }
    content = {"model_name": model.name, "model_version": VERSION, "outputs": [output]}
    if request.id is not None:
        content["id"] = request.id
    if request.binary:
        raw = np.ascontiguousarray(logits, "<f4").tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        head = orjson.dumps(content)
        return head + raw, len(head)
    if not np.isfinite(logits).all():
        raise RequestError(
            500, "the model's answer is not finite, which JSON cannot hold; ask for binary data"
        )
    output["data"] = np.ascontiguousarray(logits.reshape(-1))
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), None


def _json_length(header: str | None, total: int) -> int:
    if header is None:
        return total
    # Digits alone: int() would take signs, spaces and underscores as well.
    if not (header.isascii() and header.isdigit() and len(header) < 20) or int(header) > total:
        raise RequestError(
            400,
            f"received {LENGTH_HEADER} {header[:40]!r} with a body of {total} bytes; "
            "expected the length of the JSON at its beginning",
        )
    return int(header)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(400, f"{what} is a JSON {type(value).__name__}; expected an object")
    return value


def _parameters(holder: dict[str, Any], what: str) -> dict[str, Any]:
    return _object(holder.get("parameters", {}), f"the parameters of {what}")


def _input(
    given: dict[str, Any], body: bytes, length: int, model: ServedModel, limits: Limits
) -> npt.NDArray[Any]:
    """The tensor (N, ...) of the one input."""
    name = model.classifier.signature.input
    if given.get("name") != name:
        raise RequestError(400, f"received the input {_short(given.get('name'))}; expected {name}")
    if given.get("datatype") != model.datatype:
        raise RequestError(
            400,
            f"received datatype {_short(given.get('datatype'))} for {name}; "
            f"expected {model.datatype}",
        )
    shape = _shape(given.get("shape"), model, limits)
    parameters = _parameters(given, name)
    rest = len(body) - length
    if "binary_data_size" in parameters:
        # Checked against the bytes that are there, so a lie allocates nothing.
        expected = math.prod(shape) * np.dtype(model.dtype).itemsize
        size = parameters["binary_data_size"]
        if isinstance(size, bool) or size != expected or rest != expected or "data" in given:
            raise RequestError(
                400,
                f"received binary_data_size {_short(size)} and {rest} bytes after the JSON for "
                f"shape {list(shape)}; expected {expected} of both, and no data in the JSON",
            )
        tensor = np.frombuffer(body, model.dtype, offset=length).reshape(shape)
    else:
        if rest:
            raise RequestError(
                400, f"received {rest} bytes after the JSON; expected none without binary_data_size"
            )
        tensor = _numbers(given.get("data"), shape, model)
    if model.datatype == "FP32" and not np.isfinite(tensor).all():
        raise RequestError(400, f"received NaN or an infinity in {name}; expected finite numbers")
    return tensor


def _shape(given: Any, model: ServedModel, limits: Limits) -> tuple[int, ...]:
    """The declared shape, of a batch between 1 and the limit."""
    expected = model.item_shape
    whole = isinstance(given, list) and all(type(size) is int for size in given)
    if not whole or tuple(given[1:]) != expected or given[0] < 1:
        shown = ", ".join(str(size) for size in expected)
        raise RequestError(400, f"received shape {_short(given)}; expected [N, {shown}], N >= 1")
    if given[0] > limits.batch:
        raise RequestError(
            400, f"received {given[0]} images; expected at most {limits.batch} in one request"
        )
    return tuple(given)


def _numbers(data: Any, shape: tuple[int, ...], model: ServedModel) -> npt.NDArray[Any]:
    """The tensor of JSON numbers, flat or nested as its shape."""
    if not isinstance(data, list):
        raise RequestError(400, "received no list of data; expected numbers, flat or nested")
    try:
        values = np.asarray(data)
    except ValueError as error:  # lists of different lengths, or nested too deeply
        raise RequestError(
            400, "received data nested unevenly; expected it flat, or nested as its shape"
        ) from error
    if values.dtype.kind not in _KINDS[model.datatype] or values.shape not in (
        shape,
        (math.prod(shape),),
    ):
        raise RequestError(
            400,
            f"received data of shape {list(values.shape)} and kind {values.dtype.name}; expected "
            f"{math.prod(shape)} numbers of type {model.datatype}, flat or nested as {list(shape)}",
        )
    if model.datatype == "UINT8" and (values.min() < 0 or values.max() > 255):
        raise RequestError(400, "received data outside 0..255; expected UINT8")
    with np.errstate(over="ignore"):  # becomes an infinity, which is refused
        return values.astype(model.dtype).reshape(shape)


def _wants_binary(request: dict[str, Any], model: ServedModel) -> bool:
    """Whether the logits are to be sent as bytes: as their own parameter says, else the request's.

    Raises:
        RequestError: 400; other outputs than the model's are asked for, or its classification.
    """
    default = _flag(_parameters(request, "the request"), "binary_data_output", False)
    outputs = request.get("outputs") or []
    name = model.classifier.signature.output
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise RequestError(400, f"received other outputs; expected a list of {name!r} at most")
    if not outputs:
        return default
    wanted = _object(outputs[0], "the output")
    if wanted.get("name") != name:
        raise RequestError(
            400, f"received the output {_short(wanted.get('name'))}; expected {name}"
        )
    parameters = _parameters(wanted, name)
    if "classification" in parameters:
        raise RequestError(400, "received classification; expected none: /v1/classify does that")
    return _flag(parameters, "binary_data", default)


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(400, f"received {name} {_short(value)}; expected true or false")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
