"""What all functions of the interface share: paths, recipes, the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epdistill.recipes import Recipe
    from epdistill.tracking import Track
    from epdistill.workflows.context import Context

Place = str | Path
RUNS = "runs"


def context_of(
    runs: Place,
    data_root: Place | None,
    download: bool,
    device: str,
    quiet: bool,
    track: Sequence[Track] = (),
) -> Context:
    """Where runs and data lie, on what is computed, and who is told."""
    from epdistill.console import Reporter
    from epdistill.workflows.context import Context

    reporter = Reporter(quiet=quiet)
    return Context(Path(runs), path_of(data_root), download, device, reporter, track=tuple(track))


def recipe_of(source: Place | None, data: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of a name, a file or a run, with some keys changed."""
    from epdistill.recipes import load_recipe, recipe_for

    return load_recipe(recipe_for(data) if source is None else str(source), overrides)


def with_student(recipe: Place | None, student: str | None) -> Recipe | None:
    """A recipe, perhaps with another student, for networks that are timed untrained."""
    from epdistill.workflows.training import inherit

    if recipe is None:
        return None
    given = recipe_of(recipe, None, {}).model_dump(exclude_unset=True)
    return inherit(given, {"student.name": student}, str(recipe))


def shared_keys(
    section: str,
    data: str | None,
    image_size: int | None,
    epochs: int | None,
    seed: int | None,
    precision: str | None,
) -> dict[str, Any]:
    """The arguments that stand for keys of every recipe."""
    return {
        f"{section}.epochs": epochs,
        "data.name": data,
        "data.image_size": image_size,
        "seed": seed,
        "precision": precision,
    }


def path_of(place: Place | None) -> Path | None:
    """A path, given as one or as text."""
    return None if place is None else Path(place)


def paths_of(places: Place | Sequence[Place]) -> list[Path]:
    """Paths, given as one or several."""
    return [Path(places)] if isinstance(places, str | Path) else [Path(path) for path in places]
