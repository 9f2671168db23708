"""The same application as a deployment of Ray Serve: every replica is a process of its own.

What a replica runs is `Plan.build`, which verifies its files. How many replicas there are,
how they scale and how requests are shared out is Ray's business.

On a cluster that exists, Ray's own configuration names
`epdistill.export.serving.ray_engine:application` (docs/scale-out.md); `ray_local` runs a
deployment on this machine alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.deployment import Application
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epdistill.errors import ExportError
from epdistill.export.runtime import DEFAULT_PROVIDER
from epdistill.export.serving.replicas import Plan, planned
from epdistill.export.serving.settings import Limits

NAME = "epdistill"
TOKEN = "EPDISTILL_TOKEN"
# In every answer: which replica gave it.
REPLICA_HEADER = "epdistill-replica"
# What Ray waits beyond a request's deadline, which begins only in the replica.
GRACE_SECONDS = 5.0


def deployed(plan: Plan, options: Mapping[str, Any]) -> Application:
    """A plan as an application of Ray Serve.

    Args:
        plan: Of every replica.
        options: Ray's, as for its `Deployment.options`. They go before the defaults: a
            processor is reserved per thread, and as many requests are open and queued as a
            replica takes.

    Raises:
        ExportError: Ray refuses the options.
    """

    def build() -> FastAPI:
        app = plan.build()
        app.add_middleware(_Tagged, tag=serve.get_replica_context().replica_id.unique_id)
        return app

    defaults = {
        "name": NAME,
        "max_ongoing_requests": plan.limits.requests,
        "max_queued_requests": plan.limits.requests,
        "graceful_shutdown_timeout_s": plan.limits.deadline + GRACE_SECONDS,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    try:
        actor = {"num_cpus": plan.threads, **options.get("ray_actor_options", {})}
        chosen = {**defaults, **options, "ray_actor_options": actor}
        deployment = serve.deployment(serve.ingress(build)()).options(**chosen)
    except (TypeError, ValueError) as error:  # pydantic's is a ValueError
        raise ExportError(
            f"Ray refuses the options {', '.join(options)} ({one_line(error)}); expected those of "
            "its Deployment.options: mend them"
        ) from error
    return deployment.bind()


def application(args: Mapping[str, Any]) -> Application:
    """The `import_path` of Ray's own configuration; replicas and scaling stand there.

    Args:
        args: `models`, a list of files; where the defaults will not do also `threads`,
            `providers` and `limits`, an object with attributes of `Limits`. The token comes
            from the environment variable EPDISTILL_TOKEN.

    Raises:
        ExportError: Something else was given.
    """
    given = dict(args)
    try:
        paths = [Path(name) for name in given.pop("models")]
        settings: dict[str, Any] = {
            "limits": Limits(**given.pop("limits", {})),
            "threads": int(given.pop("threads", 1)),
            "providers": tuple(given.pop("providers", (DEFAULT_PROVIDER,))),
        }
        if given:
            raise TypeError(f"unknown: {', '.join(given)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"received the arguments {dict(args)} ({one_line(error)}); expected models, a list of "
            ".onnx files, and at most threads, providers and limits"
        ) from error
    return deployed(planned(paths, **settings, token=os.environ.get(TOKEN) or None), {})


def one_line(error: Exception) -> str:
    """An error of Ray's for people: its last line says what happened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:300]


class _Tagged:
    """ASGI middleware: every answer says which replica gave it."""

    def __init__(self, app: ASGIApp, tag: str) -> None:
        self._app = app
        self._header = (REPLICA_HEADER.encode(), tag.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], self._header]
            await send(message)

        await self._app(scope, receive, tagged)
