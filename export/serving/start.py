"""Starting a server: the same for the command line and for Python, with either engine."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epdistill.errors import ExportError

if TYPE_CHECKING:
    from epdistill.export.serving.models import ServedModel
    from epdistill.export.serving.settings import Limits

UVICORN, RAY = "uvicorn", "ray"
TOKEN = "EPDISTILL_TOKEN"  # the environment variable
CPU = "CPUExecutionProvider"

# The models by name, their files, the URL, and what else is known.
Announce = Callable[[Mapping[str, "ServedModel"], Sequence[Path], str, Mapping[str, Any]], None]


def start(
    models: Sequence[Path],
    *,
    runs: Path,
    host: str,
    port: int,
    limits: Limits,
    providers: Sequence[str] = (CPU,),
    threads: int | None = None,
    token: str | None = None,
    engine: str = UVICORN,
    options: Mapping[str, Any] | None = None,
    announce: Announce = lambda models, paths, url, more: None,
) -> None:
    """Load and check the models, then serve them until SIGTERM or Ctrl-C.

    Args:
        models: Exported files, or `shipped`; the newest one below `runs` without any.
        runs: Folder of all runs.
        host: Address to listen on.
        port: 0 takes a free one.
        limits: Everything that bounds the server.
        providers: onnxruntime's execution providers, the preferred one first.
        threads: Per model; all cores without it, with ray 1.
        token: Asked of clients.
        engine: `uvicorn` or `ray`.
        options: Ray's own, of a deployment.
        announce: Called once requests are answered.

    Raises:
        ExportError: A file that is not served, a place to listen that is taken, or a package
            that is missing.
    """
    from epdistill.export.pretrained import named

    try:
        from epdistill.export.serving.engine import Engine
        from epdistill.export.serving.models import load_models, newest_export
        from epdistill.export.serving.ray_local import serve as serve_on_ray
        from epdistill.export.serving.replicas import planned
        from epdistill.export.serving.server import bind, serve, url_of
    except ModuleNotFoundError as error:
        raise ExportError(
            f"serving needs the package {error.name}; expected the extra: "
            "type `pip install 'epdistill[serve]'`"
        ) from error

    chosen = [named(model) for model in models] or [newest_export(runs)]
    threads = threads or (1 if engine == RAY else None)
    loaded = load_models(chosen, threads=threads, providers=providers)
    listener = bind(host, port)
    url = url_of(listener)
    if engine != RAY:
        ready = partial(announce, loaded, chosen, url, {})
        serve(Engine(loaded, limits), listener, token=token, announce=ready)
        return
    plan = planned(chosen, threads=threads or 1, providers=providers, limits=limits, token=token)
    free = listener.getsockname()[1]
    listener.close()  # Ray's proxy binds it itself
    serve_on_ray(
        plan,
        dict(options or {}),
        host=host,
        port=free,
        announce=lambda logs: announce(loaded, chosen, url, {"ray_logs": logs}),
    )


def check_engine(
    engine: str, replicas: int | None, options: Path | None, linger: float | None
) -> None:
    """Refuse settings that the engine does not have.

    Raises:
        ExportError: One of them.
    """
    if engine not in (UVICORN, RAY):
        raise ExportError(f"received --engine {engine}; expected {UVICORN} or {RAY}")
    if engine != RAY and (replicas is not None or options is not None):
        raise ExportError("--replicas and --ray-options are of --engine ray: add it")
    if engine == RAY and linger is not None:
        raise ExportError("--linger is not of --engine ray, whose proxy ends in its own way")


def ray_options(replicas: int | None, path: Path | None) -> dict[str, Any]:
    """What a TOML file says, and the number of replicas.

    Raises:
        ExportError: The file cannot be read.
    """
    options: dict[str, Any] = {}
    if path is not None:
        try:
            options = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:  # ValueError: bad TOML, bad UTF-8
            raise ExportError(
                f"cannot read --ray-options {path} ({error}); expected a TOML file"
            ) from error
    return options if replicas is None else {**options, "num_replicas": replicas}
