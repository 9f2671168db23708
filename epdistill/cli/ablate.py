"""The command `ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epdistill.cli.flags import (
    RUNS,
    DataFlag,
    DeviceFlag,
    DownloadFlag,
    EpochsFlag,
    JsonFlag,
    OutFlag,
    PrecisionFlag,
    QuietFlag,
    RecipeFlag,
    ResumeFlag,
    RootFlag,
    RunsFlag,
    SeedFlag,
    SizeFlag,
    TrackFlag,
    context_of,
    overrides_of,
    without_recipe,
)
from epdistill.cli.output import emit_json, show_table

if TYPE_CHECKING:
    from epdistill.workflows.ablation import Ablated


def ablate(
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="Names with commas between; all without it, see --plan."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Of every row; by the recipe without it.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="validation (for choices; without it) or test (for what is reported)."
        ),
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            "--teacher",
            help="A finished teacher of the same recipe, or `shipped`; may be repeated.",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be done, and train nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Images attacked.")] = None,
    recipe: RecipeFlag = None,
    data: DataFlag = None,
    data_root: RootFlag = None,
    download: DownloadFlag = False,
    image_size: SizeFlag = None,
    epochs: EpochsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = None,
    out: OutFlag = None,
    resume: ResumeFlag = False,
    runs: RunsFlag = RUNS,
    track: TrackFlag = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train the same student under every control, and attack all of them alike."""
    from epdistill.errors import RecipeError, RunError
    from epdistill.recipes import load_recipe, recipe_for
    from epdistill.workflows.ablation import Asked, planned
    from epdistill.workflows.ablation import ablate as work
    from epdistill.workflows.ablation_results import JSON_NAME
    from epdistill.workflows.evaluation import TEST, VALIDATION
    from epdistill.workflows.request import names_of

    if split not in (None, TEST, VALIDATION):
        raise RecipeError(f"--split {split}; expected {VALIDATION} or {TEST}")
    overrides = overrides_of(
        "teacher", data=data, image_size=image_size, epochs=epochs, seed=seed, precision=precision
    )
    overrides |= {
        "student.epochs": epochs, "baselines.adv_cnn.epochs": epochs, "ablate.limit": limit
    }  # fmt: skip
    without_recipe(resume, recipe, overrides, "ablation")
    names = None if rows is None else names_of(rows)
    asked = Asked(names, seeds, split, tuple(teacher) if teacher else None)
    context = context_of(runs, data_root, download, device, quiet, track)
    base = None if resume else load_recipe(recipe or recipe_for(data), overrides)
    if plan:
        found = planned(base, context, asked=asked, out=out, resume=resume)
        if json:
            emit_json({"cells": found})
        else:
            _plan_table(found)
        return
    done = work(base, context, asked=asked, out=out, resume=resume)
    if json:
        emit_json({"ablation": str(done.folder / JSON_NAME), **done.content})
    else:
        _tables(done)
    if failed := done.content["failed"]:
        name, reason = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} parts could not be done, first {name}: {reason}; the rest is in the "
            f"table: mend it, then epdistill ablate --resume --out {done.folder.parent}"
        )


def _plan_table(cells: list[dict[str, Any]]) -> None:
    """What is trained, what that changes in the recipe, and about how long it takes."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        kinds.setdefault(cell["label"], []).append(cell)

    def left(some: list[dict[str, Any]], what: str, done: str) -> str:
        todo = [cell[what] for cell in some if not cell[done]]
        return f"{len(todo)} x {max(todo) / 60:.1f}" if todo else "done"

    rows = [
        [
            label,
            "\n".join(f"{key} = {value}" for key, value in some[0]["keys"].items()),
            ", ".join(str(cell["seed"]) for cell in some),
            left(some, "train_seconds", "trained"),
            left(some, "attack_seconds", "judged") if some[0]["rows"] else "",
        ]
        for label, some in kinds.items()
    ]
    total = sum(
        cell["train_seconds"] * (not cell["trained"])
        + cell["attack_seconds"] * (not cell["judged"])
        for cell in cells
    )
    show_table(
        f"{len(cells)} trainings, about {total / 60:.0f} minutes left in one process (timed on "
        "untrained networks)",
        ["trained", "recipe keys changed", "seeds", "training, min", "attacks, min"],
        rows,
        None,
        words=(0, 1),
    )


def _tables(done: Ablated) -> None:
    """Accuracy per norm, fidelity, and the differences to the references."""
    from epdistill.workflows.ablation_tables import tables
    from epdistill.workflows.evaluation import TEST, VALIDATION

    found = tables(done.content)
    for number, (title, head, rows) in enumerate(found, start=1):
        following = None
        if number == len(found) and done.content["split"] == VALIDATION:
            following = f"epdistill ablate --resume --out {done.folder.parent} --split {TEST}"
        shown = f"{done.folder}: {title}" if number == 1 else title
        show_table(shown, head, rows, following)
