"""uvicorn's HTTP protocol, with a time limit on headers, answers sent in one piece, a soft end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# At the end a connection on which nothing is open gets as long to send a request.
_GRACE_SECONDS = 0.5


def protocol(header_seconds: float, ending: Callable[[], bool]) -> type[H11Protocol]:
    """The protocol's class.

    Args:
        header_seconds: uvicorn waits for a header forever; here the connection is closed.
        ending: Whether the server ends. uvicorn tells its connections so, but not those that
            it has just accepted and does not know yet: they ask.
    """

    class Protocol(H11Protocol):
        _header: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            joined: Any = _Joined(transport, self.loop)
            super().connection_made(joined)
            self._wait()
            if ending():
                self.shutdown()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:  # a header has come
                self._stop_waiting()
            elif self.timeout_keep_alive_task is None:
                self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._wait()  # the next header has begun already

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def shutdown(self) -> None:
            """The server ends: what is open is answered, and what is on its way is taken."""
            if self.cycle is None or self.cycle.response_complete:
                self.loop.call_later(_GRACE_SECONDS, self._end)  # a request may be in the air
            else:
                super().shutdown()

        def _end(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()

        def _wait(self) -> None:
            if self._header is None:
                self._header = self.loop.call_later(header_seconds, self._hang_up)

        def _stop_waiting(self) -> None:
            if self._header is not None:
                self._header.cancel()
                self._header = None

        def _hang_up(self) -> None:
            self._header = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Protocol


class _Joined:
    """A transport that sends what is written within one step of the event loop as one piece.

    uvicorn writes an answer's header and its body one after the other: two calls of the
    system, two packets, and a client that wakes up twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self.is_closing = transport.is_closing
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))
