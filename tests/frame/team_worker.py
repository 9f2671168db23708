"""One process of a team (or alone): trains a little and leaves its parameters.

    python team_worker.py JSON    started once per rank, with torchrun's environment

It is a program and not a test, for every rank needs an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from epdistill.augment import Augmentation
from epdistill.cli.output import fail
from epdistill.data import DataSet, load
from epdistill.distributed import Team
from epdistill.errors import EpdistillError
from epdistill.launch import join, leave, speaks
from epdistill.recipes import Recipe, load_recipe
from epdistill.training import Batch, fit


def task_of(kind: str, recipe: Recipe, data: DataSet, team: Team, norm: bool = True) -> Any:
    """`norm` False: a student whose BatchNorm layers are replaced."""
    from epdistill.students.distill import DistillTask, build_student
    from epdistill.teachers.baselines.registry import build_baseline
    from epdistill.teachers.baselines.tasks import TASKS
    from epdistill.teachers.teach import TeachTask, build_teacher

    if kind == "baseline":
        model = build_baseline(recipe, data).double()
        return TASKS[recipe.model](model, recipe, data.validation, team)
    teacher = build_teacher(recipe, data).double()
    if kind == "teacher":
        return TeachTask(teacher, recipe, data.validation, print, team)
    student = build_student(recipe, teacher).double()
    if not norm:
        for stage in student.backbone.stages:
            stage[1] = torch.nn.GroupNorm(1, stage[1].num_features).double()
    return DistillTask(student, teacher, recipe, data.validation, team=team)


def double(task: Any) -> None:
    """Give the task its images in float64."""
    step = task.step

    def wider(batch: Batch) -> dict[str, float]:
        fields = {**vars(batch), "images": batch.images.double()}
        return step(Batch(**fields))

    task.step = wider


def perturb(task: Any, rank: int) -> None:
    """What rank 0's parameters must replace."""
    if rank:
        with torch.no_grad():
            for parameter in task.optimiser.param_groups[0]["params"]:
                parameter.add_(rank)


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    team = join()
    out = Path(order["out"])
    data = load("digits", limit=order.get("limit"))
    recipe = load_recipe("digits", order["recipe"], {})
    task = task_of(order["kind"], recipe, data, team, order.get("norm", True))
    perturb(task, team.rank)
    double(task)
    if "die" in order and team.rank == order["die"]["rank"]:
        step = task.step

        def dying(batch: Batch) -> dict[str, float]:
            if batch.step == order["die"]["step"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(batch)

        task.step = dying
    folder = out / "run" if team.first else out / f"unused-{team.rank}"
    folder.mkdir(exist_ok=True)
    row = fit(
        task,
        data.train,
        folder,
        title="t",
        epochs=order["epochs"],
        batch_size=order["batch"],
        augmentation=Augmentation(1, True, "zeros"),
        seed=3,
        device=torch.device("cpu"),
        checkpoint_seconds=0.0,
        team=team,
    )
    state = {name: value.contiguous().clone() for name, value in task.state().items()}
    save_file(state, out / f"rank{team.rank}.safetensors", {"row": json.dumps(row)})
    if not team.first:
        assert not list(folder.iterdir()), "only rank 0 may write"


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
        leave()
        sys.stderr.flush()
        os._exit(0)
    except EpdistillError as error:
        if speaks():
            fail(str(error), 2)
        sys.stderr.flush()
        os._exit(2)
