"""Which exported file a measurement of the server is about, and where its threads run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from epdistill.errors import ExportError
from epdistill.export.runtime import available_cores
from epdistill.recipes import Recipe
from epdistill.workflows.evaluation import EXPORTED


@contextmanager
def served_file(
    model: Path | None, recipe: Recipe | None, runs: Path
) -> Iterator[tuple[Path, str]]:
    """The file and what results call it.

    Args:
        model: An `.onnx` file, or a run that was exported; the newest export without it.
        recipe: An untrained student of this recipe instead, which is gone after the block.
        runs: Folder of all runs.

    Raises:
        ExportError: There is no such file.
    """
    from epdistill.export.serving.models import newest_export

    if recipe is not None:
        from epdistill.workflows.bench_models import export_untrained

        with tempfile.TemporaryDirectory() as folder:
            path = export_untrained(recipe, Path(folder))[0]
            yield path, f"untrained {recipe.student.name} of recipe {recipe.name}"
        return
    path = model or newest_export(runs)
    path = path / EXPORTED if path.is_dir() else path
    yield path, str(path)


@dataclass(frozen=True)
class Placement:
    """Who runs where.

    Attributes:
        threads: Of onnxruntime, in the server and beside it.
        server: Cores of the server and of onnxruntime beside it; None where the system
            cannot pin threads.
        client: The core of the client alone; None where it shares the others.
    """

    threads: int
    server: tuple[int, ...] | None
    client: int | None

    def pin(self, *, client: bool) -> None:
        """Keep the calling thread, and threads that it starts, where it belongs."""
        if self.server is not None:
            alone = client and self.client is not None
            os.sched_setaffinity(0, [self.client] if alone else self.server)  # type: ignore[list-item]


def place(threads: int | None) -> Placement:
    """Give the client the last core and the server the others, where there are enough.

    Args:
        threads: Of onnxruntime; all cores but the client's without it.

    Raises:
        ExportError: More threads than cores.
    """
    count = available_cores()
    threads = max(1, count - 1) if threads is None else threads
    if threads > count:
        raise ExportError(f"received {threads} threads; expected at most {count}, one per core")
    if not hasattr(os, "sched_getaffinity"):
        return Placement(threads, None, None)
    cores = sorted(os.sched_getaffinity(0))
    if threads == count:
        return Placement(threads, tuple(cores), None)
    return Placement(threads, tuple(cores[:-1]), cores[-1])
