"""The command `results`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epdistill.cli.flags import JsonFlag
from epdistill.cli.output import emit_json, show_table

RECORDS, PAGE = Path("docs/results"), Path("RESULTS.md")


def results(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Runs, evaluations, ablations, benchmarks to record first.", metavar="FOLDER..."
        ),
    ] = None,
    records: Annotated[Path, typer.Option("--records", help="Folder of the records.")] = RECORDS,
    page: Annotated[Path, typer.Option("--page", help="The Markdown file.")] = PAGE,
    json: JsonFlag = False,
) -> None:
    """Keep results as small sealed records, and write one page of all that is recorded."""
    from epdistill.workflows.keeping import keep

    done = keep(folders or [], records, page)
    if json:
        emit_json(done.to_json())
        return
    rows = [
        ["recorded now", str(len(done.recorded))],
        ["records", str(done.records)],
        ["pictures", str(len(done.pictures))],
    ]
    show_table(str(done.page), ["results", "count"], rows, None)
