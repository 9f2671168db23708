"""Where the figures of a training go: `metrics.jsonl` always, other places behind one protocol.

A tracker is anything with `log(step, values)`. TensorBoard is one that comes along
(`--track tensorboard`, with the extra `epdistill[tensorboard]`); from Python any object
of one's own will do:

    class Printer:
        def log(self, step, values):
            print(step, values)

    epdistill.teach(track=[Printer()])

Trackers only listen: one that fails is told of and left out, and the training goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from epdistill.errors import RecipeError
from epdistill.runs import append_metrics

TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD,)
# A training tells its trackers about so often within all its epochs; steps count, never the clock.
MOMENTS = 500


@runtime_checkable
class Tracker(Protocol):
    """Something that is told the figures of a training."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures after a step.

        Args:
            step: Steps done since the training began, over all its processes.
            values: By name, as `train.loss` and `validation.accuracy` (after an epoch, as in
                metrics.jsonl) or `running.loss` (within one: the mean of the epoch so far).
        """


Track = str | Tracker


class TensorBoard:
    """Event files in the run's folder `tensorboard`, for `tensorboard --logdir runs`.

    Args:
        folder: The run's.
        after: The step that the training goes on from; what a killed process wrote beyond it is
            declared void, so that a resumed run has every step once.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = after + 1 if after else None
        self._writer: Any = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the figures; `train.loss` becomes `train/loss`."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace(".", "/"), value, step)
        # What a checkpoint has behind it must be on the disk: it is not written again.
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


def check(asked: Sequence[Track]) -> None:
    """Refuse trackers that could only fail later.

    Raises:
        RecipeError: An unknown name, something without `log`, or a package that is missing.
    """
    for item in asked:
        if not isinstance(item, str):
            if not isinstance(item, Tracker):
                raise RecipeError(
                    f"track = {item!r}; expected {', '.join(TRACKERS)} or an object with "
                    "log(step, values)"
                )
        elif item not in TRACKERS:
            raise RecipeError(f"track {item!r}; expected {', '.join(TRACKERS)}")
        elif importlib.util.find_spec("tensorboard") is None:
            raise RecipeError(
                "track tensorboard needs the package tensorboard, which is not installed; expected "
                "the extra: type `pip install 'epdistill[tensorboard]'`"
            )


@contextmanager
def tracking(
    asked: Sequence[Track], folder: Path, after: int, tell: Callable[[str], None]
) -> Iterator[Listeners]:
    """All trackers of a training for the duration of a `with`.

    Args:
        asked: Names and objects, as `check` passes them.
        folder: The run's.
        after: The step that the training goes on from.
        tell: Hears of a tracker that fails.
    """
    own = [TensorBoard(folder, after) for item in asked if item == TENSORBOARD]
    given = [item for item in asked if not isinstance(item, str)]
    try:
        yield Listeners(folder, [*own, *given], tell)
    finally:
        for tracker in own:
            tracker.close()


class Listeners:
    """metrics.jsonl and the trackers of one training."""

    def __init__(
        self, folder: Path, trackers: Sequence[Tracker], tell: Callable[[str], None]
    ) -> None:
        self._folder, self._trackers, self._tell = folder, list(trackers), tell

    def epoch(self, row: Mapping[str, float]) -> None:
        """The row of an epoch: appended to metrics.jsonl, then told to all."""
        append_metrics(self._folder, row)
        step = int(row["step"])
        self._log(step, {name: value for name, value in row.items() if name != "step"})

    def moment(self, step: int, total: int, means: Mapping[str, float]) -> None:
        """The means of the present epoch so far; about every 500th part of it all is told."""
        if self._trackers and step % max(1, total // MOMENTS) == 0:
            self._log(step, {f"running.{name}": value for name, value in means.items()})

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, values)
            except Exception as error:  # other people's code; hours of training are worth more
                self._trackers.remove(tracker)
                self._tell(
                    f"{type(tracker).__name__} failed at step {step} ({error}); the training goes "
                    "on without it"
                )
