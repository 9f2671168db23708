"""What a person sees while a command works: progress with ETA, lines, tables.

Everything goes to standard error; standard output is for the result (the closing
table, or with `--json` exactly one JSON object).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from epdistill.live import View, view


class Bar:
    """One running progress bar; without a terminal behind it, nothing is drawn."""

    def __init__(self, progress: Progress | None, task: int | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move on by `count` and show `note` beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, note=note)  # type: ignore[arg-type]

    def at(self, done: int, total: int, note: str = "") -> None:
        """Set the position outright."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, note=note)  # type: ignore[arg-type]


class Reporter:
    """Progress bars and lines on standard error, or silence."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def line(self, text: str) -> None:
        """One line of news; where it cannot be told, the work goes on all the same."""
        with suppress(OSError):
            self.console.print(text, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A progress bar with elapsed and remaining time for the duration of a `with`."""
        if self.quiet or not self.console.is_terminal:
            yield Bar(None, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            yield Bar(progress, task)

    def training(
        self, title: str, total: int, done: int, images: int
    ) -> AbstractContextManager[View]:
        """A bar with the figures below it, images per second and ETA; see `epdistill.live`."""
        return view(self.console, title, total, done, images)


SILENT = Reporter(quiet=True)
