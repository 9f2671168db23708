"""What a person sees of a training while it runs: two lines that stay in place.

    teach ━━━━━━━━━━━━━━━━╸━━━━━━━ 302/440  0:00:41 ETA 0:00:19  472 images/s
    loss 0.183  accuracy 94.6 %  sweeps 31.2  residual 9.4e-05  settled 99.8 %

Images per second and the time left come from the clock and go to the eye alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_PERCENT = {
    "accuracy": "accuracy",
    "converged": "settled",
    "settled": "settled",
    "tipped": "tipped",
}
_SHORT = {"sweeps": ".1f", "residual": ".1e"}
REFRESHES = 4  # per second


class Throughput(ProgressColumn):
    """Images per second over the last steps."""

    def render(self, task: Task) -> Text:
        """The rate, or nothing before there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed * task.fields['images']:,.0f} images/s")


class View:
    """A running training on the screen; without a terminal behind it, nothing is drawn."""

    def __init__(self, progress: Progress | None, task: TaskID | None, values: Text) -> None:
        self._progress, self._task, self._values = progress, task, values

    def step(self, values: Mapping[str, float]) -> None:
        """One step on; `values` are the means of the epoch so far."""
        if self._progress is None or self._task is None:
            return
        self._progress.advance(self._task)
        self._values.plain = describe(values)


@contextmanager
def view(console: Console, title: str, total: int, done: int, images: int) -> Iterator[View]:
    """Both lines for the duration of a `with`.

    Args:
        console: Where they are drawn; one that is no terminal gets nothing.
        title: Before the bar.
        total: Steps in all.
        done: Steps done before.
        images: Per step.
    """
    if console.quiet or not console.is_terminal:
        yield View(None, None, Text())
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        Throughput(),
    )
    task = progress.add_task(title, total=total, completed=done, images=images)
    values = Text(style="dim")
    shown = Group(progress, values)
    with Live(shown, console=console, transient=True, refresh_per_second=REFRESHES):
        yield View(progress, task, values)


def describe(values: Mapping[str, float]) -> str:
    """The figures of a training as one line: shares in percent, the residual in powers of ten."""
    parts = []
    for name, value in values.items():
        if name in _PERCENT:
            parts.append(f"{_PERCENT[name]} {100 * value:.1f} %")
        else:
            parts.append(f"{name} {value:{_SHORT.get(name, '.4g')}}")
    return "  ".join(parts)
