"""Every error a user can cause, one small tree.

    EpdistillError            exit code 2, printed as one line, never a traceback
    +- RecipeError            a recipe file or a flag holds something impossible
    +- DataError              a data set is missing, broken or does not fit
    +- RunError               a run folder is missing, of the wrong kind, or damaged
    +- DiskError              a disk is full, read-only or broken
    +- ExportError            an export could not be made or did not pass its gate
    |  +- ParityError         the exported graph does not compute what the model computes
    +- RequestError           a request that the server refuses, with an HTTP status
    +- EvaluationError        an attack or a model broke the rules of evaluation
    +- DivergedError          training left the finite numbers
    +- InterruptedByUserError Ctrl-C; exit code 130

Messages say what was received, what was expected, and what to do.
"""

from __future__ import annotations


class EpdistillError(Exception):
    """A mistake the user can mend; `str(error)` is one line meant for them."""

    exit_code: int = 2


class RecipeError(EpdistillError):
    """An unknown recipe or key, or a value out of range."""


class DataError(EpdistillError):
    """A data set that is missing, damaged, or unusable for the task."""


class RunError(EpdistillError):
    """A run folder that is missing, of the wrong kind, or damaged."""


class DiskError(EpdistillError):
    """A disk that takes no more; whatever was complete before is kept.

    Attributes:
        what: Which file, why, and how much room is left.
        remedy: What to do about it.
    """

    def __init__(
        self,
        what: str,
        remedy: str,
        kept: str = "what was complete before is kept",
        command: str = "the same command again",
    ) -> None:
        super().__init__(f"{what}; {kept}: {remedy}, then type {command}")
        self.what = what
        self.remedy = remedy

    def going_on(self, kept: str, command: str) -> DiskError:
        """The same trouble, told by someone who knows what is kept and how to continue."""
        return DiskError(self.what, self.remedy, kept, command)


class ExportError(EpdistillError):
    """An export that could not be made or read."""


class ParityError(ExportError):
    """The exported graph computes something else than the model; nothing was written."""


class RequestError(EpdistillError):
    """A request that the server refuses.

    Attributes:
        status: The HTTP status of the answer, 4xx or 5xx.
        retry: Whether the same request may succeed a little later.
    """

    def __init__(self, status: int, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.retry = retry


class EvaluationError(EpdistillError):
    """A model or an attack that breaks the rules of an honest evaluation."""


class DivergedError(EpdistillError):
    """Training left the finite numbers; the last good state is kept."""


class LostTouchError(EpdistillError):
    """Another process of a distributed job has failed, was killed, or is out of reach."""


class InterruptedByUserError(EpdistillError):
    """Ctrl-C; whatever was finished before is kept."""

    exit_code = 130

    def __str__(self) -> str:
        """What became of the work."""
        return "interrupted; what was finished is kept, --resume continues a training"
