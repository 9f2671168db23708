"""Running the application on uvicorn, from the socket to a graceful end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from epdistill.errors import ExportError
from epdistill.export.serving.app import create_app
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.protocol import protocol

_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: A name or an address.
        port: 0 for any free one.

    Raises:
        ExportError: It is taken, not allowed, or no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ExportError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); expected an address and "
            "a free port of this machine: choose others with --host and --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    engine: Engine, listener: socket.socket, *, token: str | None, announce: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was accepted and return.

    At the first signal the server stops being ready, and says in every answer that the
    connection ends; for `Limits.linger` seconds it still takes requests. Then it stops
    listening and finishes what is open. A second signal ends at once.

    Args:
        engine: What is served.
        listener: See `bind`.
        token: See `create_app`.
        announce: Called once, when requests are answered.
    """
    limits = engine.limits
    # The server's name is nobody's business.
    config = uvicorn.Config(
        create_app(engine, token),
        http=protocol(limits.header_seconds, lambda: server.should_exit),
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks who the client is
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=int(limits.deadline) + 5,
    )
    server = _Server(config, engine, announce)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server with an end in two steps."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._announce = engine, announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._late: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            self._accept_rest(listener)
        await super().shutdown(sockets)  # closes them before anything else happens

    def _accept_rest(self, listener: socket.socket) -> None:
        """Take the connections that wait in the system's queue: closing would cut them off."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # there are no more
                return
            connection.setblocking(False)
            task = loop.create_task(loop.connect_accepted_socket(self._connected, connection))
            self._late.add(task)
            task.add_done_callback(self._late.discard)

    def _connected(self) -> asyncio.Protocol:
        """uvicorn's protocol for one connection, as its own listening makes it."""
        made: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return made(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._engine.draining:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self._engine.draining = True
            self._loop.call_soon_threadsafe(
                self._loop.call_later, self._engine.limits.linger, self._stop
            )

    def _stop(self) -> None:
        self.should_exit = True
