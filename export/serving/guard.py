"""What every request passes: the token, the limit of open requests, draining, counting."""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epdistill.errors import RequestError
from epdistill.export.serving.engine import Engine

# Without a token: probes, which orchestrators send bare, and the page, which holds no data.
_OPEN = ("/v2/health/", "/page/")
_RETRY_SECONDS = "1"


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The protocol's error object."""
    body = orjson.dumps({"error": message})
    return Response(body, status, dict(headers or {}), media_type="application/json")


def refusal(error: RequestError) -> Response:
    """The answer to a request that is refused."""
    headers = {}
    if error.retry:
        headers["retry-after"] = _RETRY_SECONDS
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 408:  # the rest of the body may never come
        headers["connection"] = "close"
    return error_response(error.status, str(error), headers)


class Guard:
    """ASGI middleware around the application.

    Args:
        app: The application.
        engine: Whose limits apply and whose counters count.
        token: What clients must send as `Authorization: Bearer`; None asks for nothing.
    """

    def __init__(self, app: ASGIApp, engine: Engine, token: str | None) -> None:
        self._app, self._engine = app, engine
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._engine.draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self._engine.open += 1
        try:
            refused = self._refused(scope)
            await (refused or self._app)(scope, receive, counted)
        finally:
            self._engine.open -= 1
            route = getattr(scope.get("endpoint"), "__name__", "none")
            self._engine.metrics.request(route, status, time.perf_counter() - start)

    def _refused(self, scope: Scope) -> Response | None:
        path: str = scope["path"]
        # The parser bounds what it has to keep; a header that came in one piece is bounded here.
        size = len(path) + len(scope["query_string"])
        for name, value in scope["headers"]:
            size += len(name) + len(value)
        if size > self._engine.limits.header_bytes:
            limit = self._engine.limits.header_bytes
            return refusal(
                RequestError(400, f"received a header of {size} bytes; expected at most {limit}")
            )
        # Probes are answered under load too: an overloaded server is alive.
        if path == "/" or path.startswith(_OPEN):
            return None
        if self._token is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._token):
                return refusal(
                    RequestError(401, "expected the server's token as Authorization: Bearer")
                )
        if self._engine.open > self._engine.limits.requests:
            return refusal(
                RequestError(503, "too many requests are open; try again later", retry=True)
            )
        return None
