"""How a command speaks: one closing table and the next command, or one JSON object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def fail(message: str, code: int) -> int:
    """One line on standard error; returns the exit code."""
    line = " ".join(message.split())
    with suppress(OSError):  # standard error may lie on the disk that is full
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"[bold red]epdistill:[/bold red] {escape(line)}"
        )
    return code


def another_speaks() -> bool:
    """Whether this is one of torchrun's processes and not the first."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def emit_json(content: dict[str, Any]) -> None:
    """Exactly one JSON object on standard output."""
    if another_speaks():
        return
    sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")


def show_table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    next_command: str | None,
    *,
    words: Sequence[int] = (0,),
) -> None:
    """The closing table and what to type next, on standard output.

    Args:
        title: Above the table.
        head: The columns' names.
        rows: The cells.
        next_command: What to type next, if anything.
        words: The columns of words, set to the left; figures go to the right.
    """
    if another_speaks():
        return
    console = Console(highlight=False)
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index in words else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    if next_command:
        console.print(f"next: [bold]{escape(next_command)}[/bold]", soft_wrap=True)
