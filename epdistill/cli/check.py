"""The command `check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epdistill.cli.flags import RUNS, JsonFlag, RunsFlag
from epdistill.cli.output import emit_json, show_table


def check(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs and evaluations; all runs without.", metavar="RUN..."),
    ] = None,
    runs: RunsFlag = RUNS,
    json: JsonFlag = False,
) -> None:
    """Verify that every file of runs and evaluations is as it was written."""
    from epdistill.errors import RunError
    from epdistill.workflows.checking import DAMAGED, INTACT, UNKNOWN
    from epdistill.workflows.checking import check as work

    found = work(folders or [runs])
    counts = {
        state: sum(one.state == state for one in found) for state in (INTACT, UNKNOWN, DAMAGED)
    }
    wrong = [one for one in found if one.state != INTACT]
    if json:
        rows = [{"path": str(one.path), "state": one.state, "why": one.why} for one in wrong]
        emit_json({"files": len(found), **counts, "findings": rows})
    else:
        title = ", ".join(f"{count} {state}" for state, count in counts.items())
        cells = [[str(one.path), one.state, one.why] for one in wrong]
        show_table(title, ["file", "state", "why"], cells, None, words=(0, 1, 2))
    damaged = [one for one in found if one.state == DAMAGED]
    if damaged:
        raise RunError(
            f"{len(damaged)} of {len(found)} files are not as they were written, first "
            f"{damaged[0].path} ({damaged[0].why}): restore them, or make them again"
        )
