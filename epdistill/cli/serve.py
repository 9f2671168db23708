"""The command `serve`. Needs neither torch nor anything that imports it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epdistill.cli.output import emit_json, show_table

if TYPE_CHECKING:
    from epdistill.export.serving.models import ServedModel

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MODEL.onnx|shipped]...",
            help="Exported files, or the one that comes with the package; the newest without any.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8000,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", show_default=False,
            help="onnxruntime's execution provider, the preferred one first; CPU without any.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads per model; all cores, with ray 1."),
    ] = None,
    batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Most images in a batch.")
    ] = 64,
    delay: Annotated[
        float, typer.Option("--delay-ms", min=0, help="Longest wait for others to share a batch.")
    ] = 2.0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Most images waiting per model.")
    ] = 1024,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0.001, help="Seconds until a request is given up.")
    ] = 10.0,
    body: Annotated[
        int, typer.Option("--max-body-mib", min=1, help="Largest request, MiB.")
    ] = 64,
    linger: Annotated[
        float | None,
        typer.Option(
            "--linger", min=0, help="Seconds of serving on after SIGTERM, 1 without it; not of ray."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="uvicorn, one process; or ray, replicas on Ray Serve.")
    ] = "uvicorn",
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, help="Of --engine ray; 1 without it.")
    ] = None,
    ray_options: Annotated[
        Path | None,
        typer.Option(
            "--ray-options", metavar="FILE.toml", help="Ray's options of a deployment."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of all runs.")] = Path("runs"),
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, when ready.")
    ] = False,
) -> None:  # fmt: skip
    """Serve exported models: Open Inference Protocol, picture upload, a page to play with.

    A token in the environment variable EPDISTILL_TOKEN is asked of clients.
    """
    from epdistill.export.serving.settings import limits_from
    from epdistill.export.serving.start import TOKEN, check_engine, start
    from epdistill.export.serving.start import ray_options as options_of

    check_engine(engine, replicas, ray_options, linger)
    token = os.environ.get(TOKEN) or None
    exposed = token is None and host not in _LOOPBACK

    def announce(
        loaded: Mapping[str, ServedModel], paths: Sequence[Path], url: str, more: Mapping[str, Any]
    ) -> None:
        if exposed:
            _warn(f"anyone who reaches {host} may use this server: set {TOKEN} to ask for a token")
        _announce(loaded, paths, url, more, as_json=json)

    start(
        models or [],
        runs=runs,
        host=host,
        port=port,
        limits=limits_from(
            batch=batch, delay_ms=delay, queue=queue, deadline=deadline, body_mib=body,
            linger=linger,
        ),
        providers=[_full_name(name) for name in provider or ["CPU"]],
        threads=threads,
        token=token,
        engine=engine,
        options=options_of(replicas, ray_options),
        announce=announce,
    )  # fmt: skip


def _announce(
    loaded: Mapping[str, ServedModel],
    paths: Sequence[Path],
    url: str,
    more: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    if as_json:
        models = [
            {"name": name, "path": str(path), "sha256": model.manifest.sha256}
            for path, (name, model) in zip(paths, loaded.items(), strict=True)
        ]
        emit_json({"url": url, "models": models, **more})
    else:
        rows = [
            [
                name,
                " x ".join(map(str, model.classifier.input_shape)),
                str(len(model.manifest.classes)),
            ]
            for name, model in loaded.items()
        ]
        show_table(url, ["model", "image", "classes"], rows, None)
    sys.stdout.flush()


def _full_name(provider: str) -> str:
    """`CUDA` for `CUDAExecutionProvider`."""
    suffix = "ExecutionProvider"
    return provider if provider.endswith(suffix) else provider + suffix


def _warn(message: str) -> None:
    typer.echo(f"epdistill: {message}", err=True)
