"""What a long command says and leaves behind when it is stopped, and who may go on with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from epdistill.checkpoints import last_step
from epdistill.disk import alone, trouble
from epdistill.errors import DiskError, RunError
from epdistill.runs import CONFIG, Run, open_run, sweep

if TYPE_CHECKING:
    from epdistill.workflows.context import Context

COMMANDS = {"teacher": "teach", "student": "distill"}


def resume_command(command: str, folder: Path) -> str:
    """What to type to go on with the work in a folder."""
    return f"epdistill {command} --resume --out {folder}"


@contextmanager
def told(command: str, kept: Callable[[], str]) -> Iterator[None]:
    """Say of a full disk, anywhere inside, what is kept and how to go on.

    Args:
        command: What to type.
        kept: Says what is kept; asked when it has happened.

    Raises:
        DiskError: With both of them.
    """
    try:
        yield
    except DiskError as error:
        raise error.going_on(kept(), command) from error
    except OSError as error:
        found = trouble(error)
        if found is None:
            raise
        raise found.going_on(kept(), command) from error


@contextmanager
def training_in(folder: Path, kind: str) -> Iterator[None]:
    """Hold a run's folder alone, and tell what is kept of it if the disk is full.

    Args:
        folder: The run's.
        kind: `"teacher"` or `"student"`.

    Raises:
        RunError: Another process holds it.
        DiskError: The disk is full.
    """

    def kept() -> str:
        step = last_step(folder)
        return (
            "there is no checkpoint yet, it starts again from the beginning"
            if step is None
            else f"the last checkpoint, at step {step}, is intact"
        )

    with told(resume_command(COMMANDS[kind], folder), kept):
        if os.environ.get("RANK", "0") != "0":  # one process of many writes for all of them
            yield
            return
        with alone(folder) as ours:
            if not ours:
                raise RunError(
                    f"another process is training in {folder}; expected to be alone there: wait "
                    "for it to end, or name another folder with --out"
                )
            sweep(folder)
            yield


def offer_run(context: Context, kind: str) -> None:
    """One line about the newest run of a kind, if it is unfinished and nobody works on it."""
    newest: Run | None = None
    for path in context.runs.glob(f"*/{CONFIG}"):
        with suppress(RunError):
            run = open_run(path.parent, kind)
            if newest is None or run.config["created"] > newest.config["created"]:
                newest = run
    if newest is None or newest.config.get("finished"):
        return
    with alone(newest.path) as free:
        if free:
            offer(context, COMMANDS[kind], newest.path)


def offer(context: Context, command: str, folder: Path) -> None:
    """One line that says how to go on with something unfinished instead of starting anew."""
    context.reporter.line(
        f"{folder} is unfinished; this begins anew, {resume_command(command, folder)} continues it"
    )
