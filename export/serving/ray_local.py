"""A Ray of our own on this machine, from its start to a graceful end.

Ray starts about ten processes that talk over TCP. Here they do so on the loopback address;
one port per replica, which Ray opens everywhere, asks for a token made for this run. Only
Ray's HTTP proxy listens where it is told to. Nothing is reported to Ray's collector.
"""

from __future__ import annotations

import http.client
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from epdistill.errors import ExportError
from epdistill.export.runtime import available_cores
from epdistill.export.serving.replicas import Plan

# Ray's variables, where the user has not set them.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",  # it goes to standard output
    # Off, a Ray keeps to the loopback address, on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    # Seconds; a busy machine needs more than 5 to import all that Ray's proxy wants.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
}
_WATCH_SECONDS = 5.0
_START_SECONDS = 300.0


class _Stop(BaseException):
    """SIGTERM or Ctrl-C."""


def serve(
    plan: Plan,
    options: Mapping[str, Any],
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is open and return.

    A second signal ends at once.

    Args:
        plan: Of every replica.
        options: As for `deployed`.
        host: Address that Ray's proxy listens on.
        port: A free one there.
        announce: Called once, when requests are answered, with the folder of Ray's logs.

    Raises:
        ExportError: Ray is not installed or refuses the options, or it or a replica does
            not start.
    """
    _set_environment()
    try:
        import ray
        from ray import serve as ray_serve

        from epdistill.export.serving.ray_engine import (
            GRACE_SECONDS,
            NAME,
            deployed,
            one_line,
        )
    except ModuleNotFoundError as error:
        raise ExportError(
            f"--engine ray needs the package {error.name}; expected the extra: "
            "type `pip install 'epdistill[ray]'`"
        ) from error

    app = deployed(plan, options)
    needed = _needed(plan, options)
    out = sys.stdout  # is for what is announced; Ray prints there what it thinks of
    with redirect_stdout(sys.stderr), _signals() as listen, _ray(needed) as session:
        listen()  # Ray has put a handler of its own
        _check_resources(needed)
        proxy = {
            "host": host,
            "port": port,
            "request_timeout_s": plan.limits.deadline + GRACE_SECONDS,
        }
        logs = {"log_level": "WARNING", "enable_access_log": False}
        try:
            with suppress(TimeoutError):  # of a slow machine; its proxy is still coming
                ray_serve.start(proxy_location="HeadOnly", http_options=proxy, logging_config=logs)
            ray_serve.run(app, name=NAME)
            _wait_ready(host, port)
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            raise ExportError(
                f"Ray did not start the replicas ({one_line(error)}); expected it to: "
                f"see its logs in {session}"
            ) from error
        with redirect_stdout(out):
            announce(session)
        try:
            while _alive():
                time.sleep(_WATCH_SECONDS)
        except _Stop:
            # What replicas have accepted is finished; Ray's own shutdown would cut it off.
            ray_serve.delete(NAME)
            raise
        raise ExportError(
            f"Ray's process on this machine ended by itself; expected it to run: see its logs "
            f"in {session}, and start again"
        )


def _set_environment() -> None:
    """To be called before Ray is imported, which reads some of it then."""
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in {**_ENVIRONMENT, **token}.items():
        os.environ.setdefault(name, value)


def _needed(plan: Plan, options: Mapping[str, Any]) -> dict[str, float]:
    """What the first replicas reserve together, by Ray's names of resources."""
    actor = {"num_cpus": plan.threads, **options.get("ray_actor_options", {})}
    scaling = options.get("autoscaling_config") or {}
    first = options.get("num_replicas", scaling.get("initial_replicas"))
    if not isinstance(first, int):
        first = scaling.get("min_replicas", 1)
    each = {"CPU": actor["num_cpus"], "GPU": actor.get("num_gpus", 0)}
    each |= actor.get("resources", {})
    return {name: first * amount for name, amount in each.items()}


def _wait_ready(host: str, port: int) -> None:
    """Wait until Ray's proxy answers.

    Raises:
        TimeoutError: It does not.
    """
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        connection = http.client.HTTPConnection(host, port, timeout=_START_SECONDS)
        with suppress(OSError, http.client.HTTPException), closing(connection):
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"its proxy does not answer after {_START_SECONDS:g} s")


def _alive() -> bool:
    """Whether Ray knows this machine to work."""
    import ray

    return any(node["Alive"] for node in ray.nodes())


def _check_resources(needed: Mapping[str, float]) -> None:
    """Refuse what Ray would wait for without end."""
    import ray

    there = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > there.get(name, 0):
            raise ExportError(
                f"the replicas need {amount:g} {name}; this machine has {there.get(name, 0):g}: "
                "choose fewer replicas, or less in ray_actor_options"
            )


@contextmanager
def _ray(needed: Mapping[str, float]) -> Iterator[str]:
    """Ray's processes, which end with the block; the folder of their logs."""
    import ray

    from epdistill.export.serving.ray_engine import one_line

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        try:
            context = ray.init(
                address="local",
                # A processor is a matter of bookkeeping: who asks for more replicas gets them.
                num_cpus=max(available_cores(), int(-(-needed["CPU"] // 1))),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ExportError(
                f"Ray does not start here ({one_line(error)}); expected it to: "
                "mend that, or serve without --engine ray"
            ) from error
        yield str(Path(context.address_info["session_dir"]) / "logs")
    finally:
        ray.shutdown()


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """SIGTERM and Ctrl-C end the block, as if its work were done."""

    def stop(_: int, frame: FrameType | None) -> None:
        raise _Stop

    def listen() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listen()
    try:
        yield listen
    except _Stop:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
