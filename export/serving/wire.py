"""A tensor client that costs next to nothing: bytes made beforehand, sockets, no library.

For measuring and for load: what a client spends on JSON, headers and objects would be
counted as the server's. Users take `tritonclient` or plain HTTP instead.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from epdistill.errors import ExportError
from epdistill.export.serving.tensors import LENGTH_HEADER

_END = b"\r\n\r\n"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Reply:
    """An answer as it came.

    Attributes:
        status: Of HTTP.
        headers: By name in lower case.
        body: After the headers.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    def logits(self, classes: int) -> npt.NDArray[np.float32]:
        """float32 (N, classes): what follows the JSON of a binary answer."""
        start = int(self.headers[LENGTH_HEADER.encode()])
        return np.frombuffer(self.body, "<f4", offset=start).reshape(-1, classes)

    def seconds(self, part: str) -> float:
        """One entry of the header `Server-Timing`."""
        for entry in self.headers[b"server-timing"].decode().split(","):
            name, _, value = entry.strip().partition(";dur=")
            if name == part:
                return float(value) / 1e3
        raise KeyError(part)


def infer_bytes(model: str, tensor_name: str, tensor: npt.NDArray[Any]) -> bytes:
    """A whole request, header and all: binary tensor in, binary logits out.

    Args:
        model: Its name on the server.
        tensor_name: Of the input.
        tensor: float32 or uint8 (N, ...).
    """
    raw = np.ascontiguousarray(tensor).tobytes()
    entry = {
        "name": tensor_name,
        "datatype": "UINT8" if tensor.dtype == np.uint8 else "FP32",
        "shape": list(tensor.shape),
        "parameters": {"binary_data_size": len(raw)},
    }
    head = orjson.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}})
    lines = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"{LENGTH_HEADER}: {len(head)}\r\nContent-Length: {len(head) + len(raw)}\r\n\r\n"
    )
    return lines.encode() + head + raw


def get_bytes(path: str) -> bytes:
    """A whole GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class Connection:
    """One connection that is kept open, one request at a time.

    Args:
        address: Host and port.
        timeout: Seconds without a byte, after which the server counts as hung.
    """

    def __init__(self, address: tuple[str, int], timeout: float = 60.0) -> None:
        self._socket = socket.create_connection(address, timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, request: bytes) -> Reply:
        """Send a request and wait for the whole answer.

        Raises:
            OSError: The connection broke, or nothing came within the timeout.
            ExportError: The server hung up before the answer was whole.
        """
        self._socket.sendall(request)
        received = bytearray()
        while (end := received.find(_END)) < 0:
            self._more(received)
        status, *lines = bytes(received[:end]).split(b"\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        size = end + len(_END) + int(headers.get(b"content-length", 0))
        while len(received) < size:
            self._more(received)
        return Reply(int(status.split(b" ", 2)[1]), headers, bytes(received[end + len(_END) :]))

    def _more(self, received: bytearray) -> None:
        part = self._socket.recv(_CHUNK)
        if not part:
            raise ExportError(
                f"the server hung up after {len(received)} bytes; expected a whole answer"
            )
        received += part
