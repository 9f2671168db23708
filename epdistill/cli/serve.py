"""The command `serve`. Needs neither torch nor anything that imports it."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epdistill.cli.output import emit_json, show_table
from epdistill.errors import ExportError

if TYPE_CHECKING:
    from epdistill.export.serving.models import ServedModel

UVICORN, RAY = "uvicorn", "ray"
TOKEN = "EPDISTILL_TOKEN"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MODEL.onnx]...", help="Exported files; the newest without any.",
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
    ] = UVICORN,
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
    _check_engine(engine, replicas, ray_options, linger)
    try:
        from epdistill.export.serving.engine import Engine
        from epdistill.export.serving.models import load_models, newest_export
        from epdistill.export.serving.ray_local import serve as work_on_ray
        from epdistill.export.serving.replicas import planned
        from epdistill.export.serving.server import bind, url_of
        from epdistill.export.serving.server import serve as work
        from epdistill.export.serving.settings import Limits
    except ModuleNotFoundError as error:
        raise ExportError(
            f"serving needs the package {error.name}; expected the extra: "
            "type `pip install 'epdistill[serve]'`"
        ) from error

    mebi = body << 20
    limits = Limits(
        batch=batch, delay=delay / 1e3, queue=max(queue, batch), deadline=deadline,
        body_bytes=mebi, held_bytes=max(Limits.held_bytes, mebi),
        linger=Limits.linger if linger is None else linger,
    )  # fmt: skip
    chosen = models or [newest_export(runs)]
    providers = [_full_name(name) for name in provider or ["CPU"]]
    threads = threads or (1 if engine == RAY else None)
    loaded = load_models(chosen, threads=threads, providers=providers)
    listener = bind(host, port)
    token = os.environ.get(TOKEN) or None
    if token is None and host not in _LOOPBACK:
        _warn(f"anyone who reaches {host} may use this server: set {TOKEN} to ask for a token")
    url = url_of(listener)

    def announce(**more: Any) -> None:
        _announce(loaded, chosen, url, more, as_json=json)

    if engine == RAY:
        plan = planned(
            chosen, threads=threads or 1, providers=providers, limits=limits, token=token
        )
        free = listener.getsockname()[1]
        listener.close()  # Ray's proxy binds it itself
        work_on_ray(
            plan,
            _ray_options(replicas, ray_options),
            host=host,
            port=free,
            announce=lambda logs: announce(ray_logs=logs),
        )
    else:
        work(Engine(loaded, limits), listener, token=token, announce=announce)


def _check_engine(
    engine: str, replicas: int | None, options: Path | None, linger: float | None
) -> None:
    """Refuse flags that the engine does not have."""
    if engine not in (UVICORN, RAY):
        raise ExportError(f"received --engine {engine}; expected {UVICORN} or {RAY}")
    if engine != RAY and (replicas is not None or options is not None):
        raise ExportError("--replicas and --ray-options are of --engine ray: add it")
    if engine == RAY and linger is not None:
        raise ExportError("--linger is not of --engine ray, whose proxy ends in its own way")


def _ray_options(replicas: int | None, path: Path | None) -> dict[str, Any]:
    """What a file says, and the number of replicas."""
    options: dict[str, Any] = {}
    if path is not None:
        try:
            options = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:  # ValueError: bad TOML, bad UTF-8
            raise ExportError(
                f"cannot read --ray-options {path} ({error}); expected a TOML file"
            ) from error
    return options if replicas is None else {**options, "num_replicas": replicas}


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
