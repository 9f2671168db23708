"""What an evaluation is asked for, its suite, and how an interrupted one is found again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epdistill.errors import DiskError, EvaluationError, RecipeError
from epdistill.recipes import EvaluateRecipe
from epdistill.runs import new_run_folder
from epdistill.workflows.context import Context
from epdistill.workflows.survival import offer

if TYPE_CHECKING:
    from epdistill.robustness.journal import Journal
    from epdistill.robustness.suites import QuickSuite, TemporalSettings

STEM = "evaluate"


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated; a field of None is left to the suite, the recipe or the journal.

    Attributes:
        models: Run folders and `.onnx` files; without any, the newest student, its
            teacher and its exported file.
        suite: `quick`, `paper` or `full`; `quick` when None.
        limit: Test images, overriding the recipe.
        subset: `first` or `random`.
        seed: Of the choice of images and of every attack; the first run's own when None.
        diagnose: Look for masked gradients, and at basins, also where the suite does not.
        corruptions: A folder with the official CIFAR-10-C arrays.
        split: `test`, or `validation` for what choices are made on; `test` when None.
        horizons: Sweep over horizons also where the suite does not.
        linf: Radii of the Linf balls of `quick` and `full`, overriding the recipe.
        l2: Radii of the L2 balls, likewise.
        steps: PGD steps of `quick` and `full`, likewise.
        attacks: Names of the attacks of `quick` and `full` that are run, and nothing else of
            `full` but the corruptions; all when None.
    """

    models: tuple[Path, ...] = ()
    suite: str | None = None
    limit: int | None = None
    subset: str | None = None
    seed: int | None = None
    diagnose: bool | None = None
    corruptions: Path | None = None
    split: str | None = None
    horizons: bool | None = None
    linf: tuple[float, ...] | None = None
    l2: tuple[float, ...] | None = None
    steps: int | None = None
    attacks: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        content = asdict(self)
        content["models"] = [str(path) for path in self.models]
        content["corruptions"] = None if self.corruptions is None else str(self.corruptions)
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Asked:
        """What `to_json` was called on; further keys are left alone."""
        names = [field.name for field in fields(cls)]
        given = {name: content[name] for name in names if name in content}
        given["models"] = tuple(Path(path) for path in given["models"])
        given["corruptions"] = Path(given["corruptions"]) if given["corruptions"] else None
        for name in ("linf", "l2", "attacks"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)

    def over(self, before: Asked) -> Asked:
        """What is asked for now, and what was asked for before where nothing is."""
        now = {field.name: getattr(self, field.name) for field in fields(self)}
        news = {key: value for key, value in now.items() if value not in (None, ())}
        return replace(before, **news)


def radii(text: str, flag: str) -> tuple[float, ...]:
    """The radii of a flag, with commas between, each a number or a fraction: `0.01,8/255`.

    Raises:
        RecipeError: Something else, or one that is not above 0.
    """
    try:
        found = tuple(sorted({float(Fraction(part.strip())) for part in text.split(",")}))
    except (ValueError, ZeroDivisionError):
        found = ()
    if not found or found[0] <= 0:
        raise RecipeError(
            f"{flag} {text}; expected numbers above 0 with commas between, as 0.5,1 or 2/255,8/255"
        )
    return found


def names_of(text: str) -> tuple[str, ...]:
    """The names in a flag, with commas between, in their order and each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def with_strengths(how: EvaluateRecipe, asked: Asked, suite: str) -> EvaluateRecipe:
    """The recipe with the radii and PGD steps that were asked for.

    Raises:
        EvaluationError: Some were, for the suite `paper`, whose radii are the published ones
            and whose steps are the recipe's.
    """
    found = {key: getattr(asked, key) for key in ("linf", "l2", "steps")}
    changed = {key: value for key, value in found.items() if value is not None}
    if changed and suite == "paper":
        raise EvaluationError(
            f"{changed} with --suite paper, which has its own; expected radii and steps with quick "
            "or full"
        )
    if suite == "full" and "steps" in changed:
        changed["full"] = how.full.model_copy(update={"steps": changed.pop("steps")})
    return how.model_copy(update=changed)


def chosen_suite(
    name: str,
    how: EvaluateRecipe,
    *,
    horizons: bool = False,
    attacks: tuple[str, ...] | None = None,
) -> QuickSuite:
    """A suite by name, with the recipe's radii and budgets.

    Args:
        name: `quick`, `paper` or `full`.
        how: Radii and budgets.
        horizons: Sweep over horizons, with the suite's own steps; `full` always does, but where
            some attacks alone are wanted.
        attacks: Their names; None for all that the suite has.

    Raises:
        EvaluationError: An unknown suite, an attack that it has not, or some of `paper`, whose
            table is the published one.
    """
    suite = _suite(name, how)
    if attacks is not None:
        if name == "paper":
            raise EvaluationError(
                f"attacks {', '.join(attacks)} with --suite paper, which has its own; expected "
                "them with quick or full"
            )
        suite = replace(suite, only=attacks, horizons=None)
    if not horizons or suite.horizons is not None:
        return suite
    return replace(suite, horizons=_horizons(how, suite.pgd.steps))


def _horizons(how: EvaluateRecipe, steps: int) -> TemporalSettings:
    from epdistill.robustness.attacks import PGDSettings
    from epdistill.robustness.suites import TemporalSettings

    full = how.full
    return TemporalSettings(
        attack_sweeps=full.attack_sweeps,
        prediction_sweeps=full.prediction_sweeps,
        pgd=PGDSettings(steps=steps),
        images=full.temporal_images,
    )


def _suite(name: str, how: EvaluateRecipe) -> QuickSuite:
    from epdistill.robustness.attacks import PGDSettings, SquareSettings
    from epdistill.robustness.suites import find_suite

    if name == "full":
        return _full_suite(how)
    if name == "paper":
        from epdistill.robustness.paper import PaperSuite

        paper = how.paper
        return PaperSuite(
            pgd=PGDSettings(steps=paper.steps, restarts=paper.restarts),
            square=SquareSettings(queries=paper.queries),
            cw_steps=paper.cw_steps,
            cw_lr=paper.cw_lr,
        )
    return replace(
        find_suite(name),
        linf=tuple(how.linf),
        l2=tuple(how.l2),
        pgd=PGDSettings(steps=how.steps),
        square=SquareSettings(queries=how.queries),
    )


def _full_suite(how: EvaluateRecipe) -> QuickSuite:
    from epdistill.robustness.attacks import (
        APGDSettings,
        CWSettings,
        DeepFoolSettings,
        NoiseSettings,
        PGDSettings,
        SquareSettings,
    )
    from epdistill.robustness.full import FullSuite

    full = how.full
    return FullSuite(
        linf=tuple(how.linf),
        l2=tuple(how.l2),
        pgd=PGDSettings(steps=full.steps, restarts=full.restarts),
        square=SquareSettings(queries=full.queries),
        apgd=APGDSettings(steps=full.apgd_steps),
        carlini_wagner=CWSettings(steps=full.cw_steps, binary_search_steps=full.cw_searches),
        deepfool=DeepFoolSettings(steps=full.deepfool_steps),
        noise=NoiseSettings(samples=full.noise_samples),
        hop_skip_jump_queries=full.hop_skip_jump_queries,
        hop_skip_jump_images=full.hop_skip_jump_images,
        autoattack_images=full.autoattack_images,
        horizons=_horizons(how, full.steps),
        diagnosed_images=full.diagnosed_images,
    )


def unfinished_evaluation(context: Context, out: Path | None) -> Path:
    """The folder that `--resume` continues: `out`, or the newest unfinished evaluation.

    Raises:
        EvaluationError: There is none.
    """
    if out is not None:
        return out
    from epdistill.robustness.journal import NAME, begun

    found = [path for path in context.runs.glob(f"*/{NAME}") if begun(path.parent)]
    if not found:
        raise EvaluationError(
            f"no unfinished evaluation under {context.runs}; expected one to --resume: name its "
            "folder with --out, or leave --resume out"
        )
    return max(found, key=lambda path: (path.stat().st_mtime, path)).parent


def open_journal(
    header: Mapping[str, Any], context: Context, out: Path | None, resumed: Path | None
) -> tuple[Path, Journal]:
    """The folder of an evaluation and its journal, new or resumed.

    Args:
        header: What is evaluated; a journal about something else is refused.
        context: Where runs lie.
        out: A folder to begin in; numbered automatically without it.
        resumed: The folder to go on in.

    Raises:
        EvaluationError: A folder that holds results already, or cannot be resumed.
    """
    from epdistill.robustness.journal import Journal
    from epdistill.robustness.results import JSON_NAME

    if resumed is not None:
        return resumed, Journal.resume(resumed, header)
    if out is not None and (out / JSON_NAME).exists():
        raise EvaluationError(
            f"--out {out} already holds results, which are never overwritten; expected another "
            "folder: name one, or move this one away"
        )
    if out is None:
        _offer(context)
    folder = new_run_folder(out, context.runs, STEM)
    try:
        return folder, Journal.create(folder, header)
    except DiskError:
        forget(folder)
        raise


def _offer(context: Context) -> None:
    """Tell of the newest evaluation if it was stopped and nobody goes on with it."""
    from epdistill.robustness.journal import NAME, begun, in_use
    from epdistill.robustness.results import JSON_NAME

    found = [path for name in (NAME, JSON_NAME) for path in context.runs.glob(f"*/{name}")]
    newest = max(found, key=lambda path: (path.stat().st_mtime, path), default=None)
    if newest is not None and newest.name == NAME:
        folder = newest.parent
        if begun(folder) and not in_use(folder):
            offer(context, "evaluate", folder)


def open_together(
    header: Mapping[str, Any], context: Context, out: Path | None, resumed: Path | None
) -> tuple[Path, Journal]:
    """`open_journal` by rank 0; the others learn of its folder and of the units it knows."""
    from epdistill.robustness.journal import Journal

    team = context.team
    if team.size == 1:
        return open_journal(header, context, out, resumed)
    if team.first:
        folder, journal = open_journal(header, context, out, resumed)
        team.tell(json.dumps([str(folder), dict(journal.units)]).encode())
        return folder, journal
    place, known = json.loads(team.tell(b""))
    return Path(place), Journal.of(known)


def forget(folder: Path) -> None:
    """Take back a folder in which nothing was found out."""
    from epdistill.robustness.journal import remove

    remove(folder)
    if not any(folder.iterdir()):
        folder.rmdir()
