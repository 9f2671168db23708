"""How all of it is made again: commands, seeds, versions, machine."""

from __future__ import annotations

from collections.abc import Sequence

from epdistill.page.elements import commands, paragraph, section, table
from epdistill.runs import Run, machine_of


def making(runs: Sequence[Run], lines: Sequence[str]) -> str:
    """The commands in their order, and what each run was made with.

    Args:
        runs: The runs.
        lines: The commands.
    """
    rows = []
    for run in runs:
        environment = run.config["environment"]
        rows.append(
            [
                run.name,
                machine_of(environment),
                str(environment["torch"]),
                str(environment["epdistill"]),
                str(run.config["finished"])[:19].replace("T", " "),
                str(run.config["weights_sha256"])[:16],
            ]
        )
    head = ["run", "processor", "torch", "epdistill", "finished (UTC)", "SHA-256 of the weights"]
    text = (
        "The same machine, versions and number of threads give the same weights, bit for bit; "
        "elsewhere they may round differently. Whole recipes stand in the runs' config.json."
    )
    return section(
        "again", "Make it again", commands(lines), paragraph(text), table("Made with", head, rows)
    )
