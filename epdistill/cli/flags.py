"""The flags that mean the same for every command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from epdistill.workflows.context import Context

RecipeFlag = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Bundled recipe, TOML file, or a run's folder.", show_default=False
    ),
]
DataFlag = Annotated[
    str | None,
    typer.Option(
        "--data", help="digits, mnist, fashion-mnist, cifar10, cifar100, svhn or folder:PATH."
    ),
]
RootFlag = Annotated[
    Path | None, typer.Option("--data-root", help="Folder with downloaded data sets.")
]
DownloadFlag = Annotated[bool, typer.Option("--download", help="Fetch the data set if missing.")]
SizeFlag = Annotated[
    int | None, typer.Option("--image-size", help="Resize the images of a folder to this side.")
]
StreamFlag = Annotated[
    bool | None,
    typer.Option(
        "--stream/--in-memory",
        help="Decode a folder's images when needed; by itself if they fill a quarter of memory.",
        show_default=False,
    ),
]
WorkersFlag = Annotated[
    int | None, typer.Option("--workers", min=0, help="Processes that decode streamed images.")
]
EpochsFlag = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the data.")]
SeedFlag = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")]
DeviceFlag = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
PrecisionFlag = Annotated[
    str | None, typer.Option("--precision", help="float32, bfloat16 or float64.")
]
OutFlag = Annotated[Path | None, typer.Option("--out", help="Where to write; numbered by itself.")]
ResumeFlag = Annotated[
    bool, typer.Option("--resume", help="Continue --out, or the newest unfinished run.")
]
RunsFlag = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
TrackFlag = Annotated[
    list[str] | None,
    typer.Option("--track", help="Tell the figures also to: tensorboard.", show_default=False),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No progress.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
RUNS = Path("runs")


def context_of(
    runs: Path,
    root: Path | None,
    download: bool,
    device: str,
    quiet: bool,
    track: Sequence[str] | None = None,
    *,
    together: bool = False,
) -> Context:
    """The context that the shared flags ask for.

    Args:
        runs: Folder of all runs.
        root: Where downloaded data sets lie.
        download: Whether a missing one may be fetched.
        device: As the flag.
        quiet: As the flag.
        track: As the flag.
        together: Whether the command can be shared out over torchrun's processes.

    Raises:
        RecipeError: It cannot, and torchrun has started several; or a tracker is unknown.
    """
    from epdistill.console import Reporter
    from epdistill.errors import RecipeError
    from epdistill.launch import join, local_device, wanted
    from epdistill.workflows.context import Context

    if wanted() > 1 and not together:
        raise RecipeError(
            f"{wanted()} processes for a command that one does; expected torchrun with teach, "
            "distill or evaluate: start the others without it"
        )
    team = join()
    reporter = Reporter(quiet=quiet or not team.first)
    return Context(runs, root, download, local_device(device), reporter, team, tuple(track or ()))


def without_recipe(
    resume: bool, recipe: str | None, overrides: Mapping[str, Any], what: str
) -> None:
    """Refuse flags of a recipe beside `--resume`.

    Args:
        resume: Whether that was given.
        recipe: `--recipe`.
        overrides: What other flags change in it; None where they were not given.
        what: Goes on.

    Raises:
        RecipeError: Some were given.
    """
    from epdistill.errors import RecipeError

    given = [name for name, value in {"--recipe": recipe, **overrides}.items() if value is not None]
    if resume and given:
        raise RecipeError(
            f"--resume with {', '.join(given)}; expected none of these: the recipe is that of the "
            f"{what} that goes on"
        )


def overrides_of(section: str, **values: Any) -> dict[str, Any]:
    """Flags as recipe keys; the shared ones keep their place."""
    places = {"epochs": f"{section}.epochs", "data": "data.name"}
    places |= {name: f"data.{name}" for name in ("image_size", "stream", "workers")}
    return {places.get(name, name): value for name, value in values.items()}
