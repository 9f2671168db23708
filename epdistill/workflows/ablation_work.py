"""The work of an ablation: where its parts lie, and how each is done or gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from epdistill.errors import RecipeError
from epdistill.nested import leaves
from epdistill.recipes.loading import validate
from epdistill.robustness.journal import begun
from epdistill.robustness.results import JSON_NAME as RESULTS
from epdistill.runs import CONFIG, Run, open_run, write_json
from epdistill.teachers.pretrained import named
from epdistill.workflows.ablation_plan import Cell, Entry, Plan, teacher_facts, with_teachers
from epdistill.workflows.context import Context, require_finished
from epdistill.workflows.evaluation import TEST, evaluate
from epdistill.workflows.request import Asked
from epdistill.workflows.training import distill, teach

FIDELITY = "fidelity.json"
_SHOWN = 3


@dataclass(frozen=True)
class Workplace:
    """The folder of an ablation.

    `cells/` holds the runs, one each, `validation/` and `test/` what was found on those
    images (with one evaluation per cell in `models/`), `claims/` who works on what.

    Attributes:
        folder: All of it.
        plan: What is compared.
        split: On which images.
        context: Folders, device, reporter.
        adopted: Finished runs from elsewhere, by the fingerprint of the cell they stand for.
    """

    folder: Path
    plan: Plan
    split: str
    context: Context
    adopted: Mapping[str, Path] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """Where tables and pictures go."""
        return self.folder / self.split

    @property
    def crafted(self) -> Path:
        """Where the images lie that were made on senders."""
        return self.output / "crafted"

    def path(self, cell: Cell) -> Path:
        """A cell's run; also one that was made under another row's name."""
        if cell.fingerprint in self.adopted:
            return self.adopted[cell.fingerprint]
        found = sorted((self.folder / "cells").glob(f"*-{cell.fingerprint}"))
        return found[0] if found else self.folder / "cells" / cell.name

    def evaluation(self, cell: Cell) -> Path:
        """What was found out about a cell."""
        found = sorted((self.output / "models").glob(f"*-{cell.fingerprint}"))
        return found[0] if found else self.output / "models" / cell.name

    def trained(self, cell: Cell) -> bool:
        """Whether a cell's run is finished."""
        path = self.path(cell)
        return (path / CONFIG).is_file() and bool(open_run(path).config.get("finished"))

    def judged(self, cell: Cell) -> bool:
        """Whether a cell's evaluation is finished."""
        return (self.evaluation(cell) / RESULTS).is_file()

    def train(self, cell: Cell) -> None:
        """Train a cell, or go on with it; its teacher must be finished."""
        folder = self.path(cell)
        resume = (folder / CONFIG).is_file()
        if cell.teacher is None:
            teach(cell.recipe, self.context, out=folder, resume=resume)
        else:
            teacher = self.path(cell.teacher)
            distill(cell.recipe, self.context, teacher=teacher, out=folder, resume=resume)

    def judge(self, entry: Entry) -> None:
        """Attack a cell, or go on with it, and tell how near a student is to its teacher."""
        cell, folder = entry.cell, self.evaluation(entry.cell)
        folder.mkdir(parents=True, exist_ok=True)
        run = open_run(self.path(cell))
        if cell.teacher is not None and not (folder / FIDELITY).is_file():
            write_json(folder / FIDELITY, self._fidelity(run, cell))
        sender = self.path(entry.sender)
        models = dict.fromkeys((run.path, sender))
        base = self.plan.recipe
        how = base.evaluate.model_copy(update={"linf": base.ablate.linf, "l2": base.ablate.l2})
        asked = Asked(
            suite=base.ablate.suite, limit=base.ablate.limit, seed=base.seed, split=self.split
        )
        resume = begun(folder)
        evaluate(
            list(models), self.context, asked=asked, recipe=how, out=folder, resume=resume,
            lent=(sender, self.crafted),
        )  # fmt: skip

    def _fidelity(self, run: Run, cell: Cell) -> dict[str, Any]:
        """As a run tells it of the test images, on the images of this ablation."""
        if self.split == TEST:
            return dict(run.config["results"]["fidelity"])
        from epdistill.loading import load_student, load_teacher
        from epdistill.students.fidelity import fidelities

        assert cell.teacher is not None
        device = self.context.torch_device()
        teacher = load_teacher(open_run(self.path(cell.teacher))).to(device)
        student = load_student(run).to(device)
        images = self.context.data_of(run).validation
        return fidelities(student, teacher, images, cell.recipe.student, cell.recipe.seed)


@dataclass(frozen=True)
class Part:
    """A piece of work that one process does at a time.

    Attributes:
        name: Names its claim too.
        title: For people.
        needs: The cells that must have been trained before.
        done: Whether there is nothing left to do.
        work: Does it, or goes on with it.
    """

    name: str
    title: str
    needs: tuple[Cell, ...]
    done: Callable[[], bool]
    work: Callable[[], None]


def training(cell: Cell) -> str:
    """The name of the part that trains a cell."""
    return f"train-{cell.fingerprint}"


def parts_of(place: Workplace) -> list[Part]:
    """Everything there is to do: seed by seed, each evaluation as soon as it can be made."""
    parts: dict[str, Part] = {}

    def add(part: Part) -> None:
        parts.setdefault(part.name, part)

    def train(cell: Cell) -> None:
        needs = () if cell.teacher is None else (cell.teacher,)
        done, work = partial(place.trained, cell), partial(place.train, cell)
        add(Part(training(cell), f"train {cell.name}", needs, done, work))

    for entry in place.plan.entries():
        cell = entry.cell
        for wanted in with_teachers(entry.sender, cell):
            train(wanted)
        done, work = partial(place.judged, cell), partial(place.judge, entry)
        name = f"{place.split}-{cell.fingerprint}"
        add(Part(name, f"attack {cell.name}", (cell, entry.sender), done, work))
    return list(parts.values())


def adopt(paths: Sequence[Path], plan: Plan) -> dict[str, Path]:
    """Finished teachers from elsewhere, by the fingerprint of the cell they stand for.

    Args:
        paths: Their runs, or `shipped`.
        plan: What is compared.

    Raises:
        RunError: Not the folder of a finished teacher.
        RecipeError: No cell of the plan has its recipe.
    """
    teachers = [cell for cell in plan.cells() if cell.teacher is None]
    adopted = {}
    for path in paths:
        run = require_finished(open_run(named(path), "teacher"))
        own = Cell(run.name, validate(run.config["recipe"], str(run.path)))
        if own.fingerprint not in {cell.fingerprint for cell in teachers}:
            differences = [_differences(own, cell) for cell in teachers]
            raise RecipeError(
                f"--teacher {path} has the recipe of no cell; nearest in "
                f"{', '.join(min(differences, key=len)[:_SHOWN])}: expected a teacher that this "
                "plan would train itself: see --plan"
            )
        adopted[own.fingerprint] = run.path.absolute()
    return adopted


def _differences(run: Cell, cell: Cell) -> list[str]:
    """In which keys a run differs from a cell, in words."""
    was, now = (dict(leaves(teacher_facts(one.recipe))) for one in (run, cell))
    return [
        f"{key} = {was.get(key)!r}, not {now.get(key)!r}"
        for key in dict.fromkeys((*now, *was))
        if was.get(key) != now.get(key)
    ]
