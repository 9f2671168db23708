"""`epdistill ablate`: the same student under every control, under the same attacks.

Every cell is a run of its own, every evaluation a folder of its own; each goes on by itself
where it was stopped. Any number of processes may work on one folder, in any order: each
takes the next part that is ready and that nobody else holds.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epdistill.errors import DiskError, EpdistillError, RunError
from epdistill.recipes import Recipe
from epdistill.recipes.loading import validate
from epdistill.runs import new_run_folder, write_json
from epdistill.sealed import read_sealed
from epdistill.workflows.ablation_plan import Plan, plan_for
from epdistill.workflows.ablation_rehearsal import costs, rehearse
from epdistill.workflows.ablation_results import JSON_NAME, content_of, found_so_far, write
from epdistill.workflows.ablation_work import Part, Workplace, adopt, parts_of, training
from epdistill.workflows.claims import claim
from epdistill.workflows.context import Context
from epdistill.workflows.evaluation import VALIDATION
from epdistill.workflows.survival import offer, resume_command, told

PLAN = "plan.json"
STEM = "ablation"
# Seconds between two looks at what other processes are doing.
WAIT = 2.0


@dataclass(frozen=True)
class Asked:
    """What is to be compared; a field of None is left to the recipe, or to what was begun.

    Attributes:
        rows: Their names.
        seeds: Of every row.
        split: `validation`, for choices, or `test`, for what is reported.
        teachers: Finished runs that stand for cells of the same recipe.
    """

    rows: tuple[str, ...] | None = None
    seeds: int | None = None
    split: str | None = None
    teachers: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Ablated:
    """Where an ablation was written, and what it says.

    Attributes:
        folder: Holds ablation.json, ablation.csv and the pictures of its split.
        content: The content of ablation.json.
    """

    folder: Path
    content: dict[str, Any]


def ablate(
    recipe: Recipe | None,
    context: Context,
    *,
    asked: Asked = Asked(),
    out: Path | None = None,
    resume: bool = False,
) -> Ablated:
    """Train and attack every row, or what is left of that.

    Args:
        recipe: The base; with `resume` that of the folder counts.
        context: Folders, device, reporter.
        asked: What is to be compared.
        out: The folder; numbered automatically without it.
        resume: Work on in `out`, or in the newest unfinished ablation, also beside others.

    Returns:
        Folder and table. What failed on the way stands in its `failed`; the rest was done.

    Raises:
        RecipeError: A row that cannot be built, told before any training.
        RunError: A folder that is no ablation's, or one that is and was not to be resumed.
    """
    place = _place(recipe, context, asked, out, resume)
    rehearse(place.plan, place.context)
    if not resume:
        stem = f"{place.plan.recipe.name}-{STEM}"
        if out is None:
            _offer(context)
        place = replace(place, folder=new_run_folder(out, context.runs, stem))
    again, line = resume_command("ablate", place.folder), context.reporter.line
    with told(again, lambda: "every part up to its last checkpoint is kept"):
        _note(place)
        line(f"{place.folder}: {len(place.plan.entries())} rows and seeds on {place.split} images")
        line(f"if interrupted: {again}")
        failed = _work_through(place)
        content = content_of(place, found_so_far(place), failed)
        write(place, content, pictures=True)
        if content["complete"]:
            shutil.rmtree(place.crafted, ignore_errors=True)
    return Ablated(place.output, content)


def planned(
    recipe: Recipe | None,
    context: Context,
    *,
    asked: Asked = Asked(),
    out: Path | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """What `ablate` would do with the same arguments, cell by cell; writes and trains nothing.

    Returns:
        Per cell `cell` and `label` (its name with and without seed), `rows` (that judge it),
        `keys` (changed in the base), `seed`, `trained` and `judged` (whether that is done), and
        as a rough guess `train_seconds` and `attack_seconds` of one process here.
    """
    place = _place(recipe, context, asked, out, resume)
    guesses, entries = costs(place.plan, place.context), place.plan.entries()
    found, seen = [], set[str]()
    for cell in place.plan.cells():
        judging = [entry for entry in entries if entry.cell.fingerprint == cell.fingerprint]
        # A sender's images are made with the first cell that they are tried on, and kept.
        attacked = {cell.fingerprint: cell} | {
            e.sender.fingerprint: e.sender for e in judging if e.sender.fingerprint not in seen
        }
        seen |= {entry.sender.fingerprint for entry in judging}
        found.append(
            {
                "cell": cell.name,
                "label": cell.label,
                "rows": [entry.row.name for entry in judging],
                "keys": dict(cell.keys),
                "seed": cell.recipe.seed,
                "trained": place.trained(cell),
                "judged": place.judged(cell),
                "train_seconds": guesses[cell.kin].train,
                "attack_seconds": sum(guesses[one.kin].attack for one in attacked.values())
                if judging
                else 0.0,
            }
        )
    return found


def _place(
    recipe: Recipe | None, context: Context, asked: Asked, out: Path | None, resume: bool
) -> Workplace:
    """What is asked for: of a folder that is still to be made, or of one to work on in."""
    if resume:
        folder = out if out is not None else _unfinished(context)
        plan, split, teachers, root = _noted(folder)
        context = replace(context, data_root=context.data_root or root)
        if asked.rows or asked.seeds:
            plan = plan_for(plan.recipe, asked.rows or tuple(plan.seeds), asked.seeds)
    else:
        assert recipe is not None
        if out is not None and (out / PLAN).exists():
            raise RunError(
                f"--out {out} already holds an ablation; expected another folder, or --resume to "
                "work on in this one"
            )
        folder, plan = out or context.runs / STEM, plan_for(recipe, asked.rows, asked.seeds)
        split, teachers = VALIDATION, []
    adopted = adopt([*teachers, *(asked.teachers or ())], plan)
    return Workplace(folder, plan, asked.split or split, context, adopted)


def _noted(folder: Path) -> tuple[Plan, str, list[Path], Path | None]:
    """Plan, split, adopted teachers and place of the data of an ablation that was begun.

    Raises:
        RunError: The folder is not that of an ablation.
    """
    try:
        noted = read_sealed(folder / PLAN)
        plan = Plan(validate(noted["recipe"], str(folder)), dict(noted["seeds"]))
        root = None if noted["data_root"] is None else Path(noted["data_root"])
        return plan, str(noted["split"]), [Path(path) for path in noted["teachers"]], root
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / PLAN} cannot be read ({error}); expected the folder of an ablation: type "
            "`epdistill ablate` without --resume"
        ) from error


def _note(place: Workplace) -> None:
    """Write down what `_noted` reads."""
    root = place.context.data_root
    content = {
        "recipe": place.plan.recipe.model_dump(mode="json"),
        "data_root": None if root is None else str(root.absolute()),
        "seeds": dict(place.plan.seeds),
        "split": place.split,
        "teachers": [str(path) for path in place.adopted.values()],
    }
    write_json(place.folder / PLAN, content)


def _unfinished(context: Context) -> Path:
    """The newest ablation whose table is not complete.

    Raises:
        RunError: There is none.
    """
    found = [path for path in context.runs.glob(f"*/{PLAN}") if not _complete(path)]
    if not found:
        raise RunError(
            f"no unfinished ablation under {context.runs}; expected one to --resume: name its "
            "folder with --out"
        )
    return max(found, key=_age).parent


def _age(path: Path) -> tuple[float, Path]:
    return path.stat().st_mtime, path


def _complete(path: Path) -> bool:
    """Whether the table that a plan is about is complete; one that cannot be read is not."""
    try:
        table = path.parent / read_sealed(path)["split"] / JSON_NAME
        return bool(read_sealed(table)["complete"])
    except (OSError, ValueError, KeyError):
        return False


def _offer(context: Context) -> None:
    """Tell of the newest ablation if its table is not complete."""
    newest = max(context.runs.glob(f"*/{PLAN}"), key=_age, default=None)
    if newest is not None and not _complete(newest):
        offer(context, "ablate", newest.parent)


def _work_through(place: Workplace) -> dict[str, str]:
    """Do what is ready and free, until nothing is left; returns what failed, and why."""
    line = place.context.reporter.line
    parts = parts_of(place)
    pending, failed, waiting = parts, dict[str, str](), False

    def settle(part: Part) -> bool:
        """Whether a part is over, done by us or by others, or never to be."""
        if part.done():
            return True
        missing = [cell for cell in part.needs if not place.trained(cell)]
        if any(training(cell) in failed for cell in missing):
            failed[part.name] = "what it needs could not be trained"
            return True
        if missing:
            return False
        with claim(place.folder / "claims" / part.name) as ours:
            if not ours:
                return False
            if not part.done():
                line(f"[bold]{parts.index(part) + 1}/{len(parts)}[/bold] {part.title}")
                try:
                    part.work()
                except DiskError:  # nothing else could be written either
                    raise
                except EpdistillError as error:  # the others should be done all the same
                    line(f"[red]{part.title}:[/red] {error}")
                    failed[part.name] = str(error)
                    return True
        # An unfinished table is a table too.
        write(place, content_of(place, found_so_far(place), failed), pictures=False)
        return True

    while pending:
        left = [part for part in pending if not settle(part)]
        if len(left) == len(pending):
            if not waiting:
                line(f"waiting for other processes: {', '.join(part.title for part in left)}")
            time.sleep(WAIT)
        waiting = len(left) == len(pending)
        pending = left
    return failed
