"""Request bodies, bounded in size, in memory over all requests, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from epdistill.errors import RequestError
from epdistill.export.serving.settings import Limits

# nginx's status for a client that hung up; nobody is there to read it, but it is counted.
CLIENT_GONE = 499


class Intake:
    """Reads bodies and keeps account of the bytes they hold.

    Args:
        limits: `body_bytes`, `held_bytes` and `deadline` apply.

    Attributes:
        held: Bytes of all bodies held now.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, accounted for until the block ends.

        Raises:
            RequestError: 413, too large; 408, too slow; 503, too much held already; 415,
                compressed; 499, the client hung up.
        """
        chunks: list[bytes] = []
        try:
            await self._receive(request, chunks)
            yield b"".join(chunks)
        finally:
            self.held -= sum(map(len, chunks))

    async def _receive(self, request: Request, chunks: list[bytes]) -> None:
        """Fill `chunks`, which are accounted for as they come."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, "received a compressed body; expected it as it is")
        self._check_size(int(request.headers.get("content-length", 0)))
        size, more = 0, True
        try:
            async with asyncio.timeout(self._limits.deadline):
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(CLIENT_GONE, "the client hung up")
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    chunks.append(chunk)
                    size += len(chunk)
                    self.held += len(chunk)
                    self._check_size(size)
                    if self.held > self._limits.held_bytes:
                        raise RequestError(
                            503, "too many bytes are held already; try again later", retry=True
                        )
        except TimeoutError as error:
            raise RequestError(
                408,
                f"received {size} bytes of the body in {self._limits.deadline:g} s; "
                "expected all of it: send faster, or fewer images",
            ) from error

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise RequestError(
                413,
                f"received a body of {size} bytes or more; expected at most "
                f"{self._limits.body_bytes}: send fewer images",
            )
