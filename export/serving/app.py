"""The ASGI application: the Open Inference Protocol v2, image upload, metrics, the playground.

Source of the routes, fields and statuses: the protocol's REST specification
(kserve/open-inference-protocol). Where it leaves room, both bodies and statuses of
the health routes speak: 200 with `true`, 503 with `false`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from epdistill import __version__
from epdistill.errors import DataError, RequestError
from epdistill.export.serving import page, pictures
from epdistill.export.serving.batching import Answer
from epdistill.export.serving.corruptions import CORRUPTIONS
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.guard import Guard, error_response, refusal
from epdistill.export.serving.metrics import CONTENT_TYPE
from epdistill.export.serving.models import VERSION, ServedModel
from epdistill.export.serving.tensors import LENGTH_HEADER, read_infer, write_infer

# A body of up to this size is read without holding up the event loop.
_SMALL = 64 << 10


def create_app(engine: Engine, token: str | None = None) -> FastAPI:
    """The application on an engine.

    Args:
        engine: Its models are served while the application's lifespan lasts.
        token: Asked of clients as `Authorization: Bearer`, None asks for nothing.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    # The automatic documentation pages load scripts from elsewhere; there are none here.
    app = FastAPI(
        title="epdistill", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, engine=engine, token=token)
    _add_errors(app)
    _add_protocol(app, engine)
    _add_people(app, engine)
    return app


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _timing(answer: Answer, total: float) -> str:
    """The value of `Server-Timing`: milliseconds of waiting, of onnxruntime, and of all."""
    return (
        f"queue;dur={1e3 * answer.queued:.4f}, model;dur={1e3 * answer.computed:.4f}, "
        f"total;dur={1e3 * total:.4f}"
    )


def _add_errors(app: FastAPI) -> None:
    """Every error is the protocol's object, also those that the framework finds."""

    async def refused(_: Request, error: Exception) -> Response:
        return refusal(error if isinstance(error, RequestError) else RequestError(400, str(error)))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return error_response(400, f"{first['loc'][-1]}: {first['msg']}")

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, str(error.detail), error.headers)

    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(500, "internal error; the server's log says more")

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(DataError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _add_protocol(app: FastAPI, engine: Engine) -> None:
    """The Open Inference Protocol v2, and `/metrics`."""

    async def infer(request: Request) -> Response:
        start = time.monotonic()
        until = start + engine.limits.deadline
        served = engine.find(**request.path_params)
        header = request.headers.get(LENGTH_HEADER)
        async with engine.intake.body(request) as body:
            if len(body) <= _SMALL:
                asked = read_infer(body, header, served, engine.limits)
            else:
                loop = asyncio.get_running_loop()
                asked = await loop.run_in_executor(
                    engine.workers, read_infer, body, header, served, engine.limits
                )
            answer = await engine.compute(request, served, asked.tensor, until)
            content, length = write_infer(asked, answer.logits, served)
        headers = {"server-timing": _timing(answer, time.monotonic() - start)}
        if length is None:
            return Response(content, headers=headers, media_type="application/json")
        headers[LENGTH_HEADER] = str(length)
        return Response(content, headers=headers, media_type="application/octet-stream")

    # The route that must be fast: first in the order, and without the framework's reading
    # of parameters, a third of its time.
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        app.router.add_route(path, infer, methods=["POST"], include_in_schema=False)

    @app.get("/v2")
    async def server() -> Response:
        extensions = ["binary_tensor_data"]
        return _json({"name": "epdistill", "version": __version__, "extensions": extensions})

    @app.get("/v2/health/live")
    async def live() -> Response:
        return _json({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return _json({"ready": engine.ready}, 200 if engine.ready else 503)

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def model(name: str, version: str = VERSION) -> Response:
        return _json(_metadata(engine.find(name, version)))

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> Response:
        engine.find(name, version)
        body = {"name": name, "ready": engine.ready}
        return _json(body, 200 if engine.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _metadata(model: ServedModel) -> dict[str, Any]:
    signature = model.classifier.signature
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": signature.input, "datatype": model.datatype, "shape": [-1, *model.item_shape]}
        ],
        "outputs": [
            {"name": signature.output, "datatype": "FP32", "shape": [-1, len(signature.classes)]}
        ],
    }


def _add_people(app: FastAPI, engine: Engine) -> None:
    """What needs no tensor client: pictures in, labels out; and the playground."""

    @app.get("/v1/about")
    async def about() -> Response:
        return _json(
            {
                "models": [_described(model) for model in engine.models.values()],
                "corruptions": list(CORRUPTIONS),
                "samples": page.samples(),
            }
        )

    @app.post("/v1/classify")
    async def classify(
        request: Request,
        model: str | None = None,
        top: Annotated[int, Query(ge=1)] = 5,
        corruption: str | None = None,
        severity: Annotated[int, Query(ge=1, le=5)] = 1,
        seed: Annotated[int, Query(ge=0)] = 0,
        show: bool = False,
    ) -> Response:
        start = time.monotonic()
        until = start + engine.limits.deadline
        served = engine.find(model)
        change = pictures.Change(corruption, severity, seed)
        async with engine.intake.body(request) as body:
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(
                engine.workers, pictures.read, body, served.classifier.input_shape, change
            )
            prepared = time.monotonic()
            tensor = pictures.to_tensor(pixels, served)
            answer = await engine.compute(request, served, tensor, until)
        content = {
            "model": served.name,
            **pictures.named(answer.logits, served.classifier.classes, top),
            "milliseconds": {
                "decode": 1e3 * (prepared - start),
                "queue": 1e3 * answer.queued,
                "model": 1e3 * answer.computed,
            },
        }
        if show:
            content["seen"] = pictures.data_url(pixels)
        return _json(content)

    @app.get("/")
    async def playground() -> Response:
        return page.file("index.html")

    @app.get("/page/{name:path}")
    async def static(name: str) -> Response:
        return page.file(name)


def _described(model: ServedModel) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "name": model.name,
        "classes": list(model.classifier.classes),
        "image_shape": list(model.classifier.input_shape),
        "kind": manifest.kind,
        "precision": manifest.precision,
        "size_bytes": manifest.size_bytes,
        "sha256": manifest.sha256,
    }
