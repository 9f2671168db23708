"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epdistill.cli.flags import (
    RUNS,
    JsonFlag,
    OutFlag,
    QuietFlag,
    RootFlag,
    RunsFlag,
    context_of,
)
from epdistill.cli.output import emit_json

TOPICS = ("dynamics", "distill")


def bench(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[dynamics|distill] [RUN]",
            help="A student's run, the newest without it; after the words dynamics and distill a "
            "teacher's, the small one that comes with the package without it.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Time untrained networks of this recipe instead of a run."),
    ] = None,
    student: Annotated[str | None, typer.Option("--student", help="With --recipe.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="dynamics: draw it as well.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time the student compiled.")
    ] = True,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Of torch and onnxruntime; torch's own without it."),
    ] = None,
    data_root: RootFlag = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=3, help="Most rounds.")] = None,
    out: OutFlag = None,
    runs: RunsFlag = RUNS,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Time teacher and student; `dynamics`: the relaxation's variants; `distill`: its cost."""
    from epdistill.cli.tables import bench_table, distilling_table, dynamics_table
    from epdistill.errors import RecipeError
    from epdistill.recipes import load_recipe
    from epdistill.workflows.training import inherit

    rest = list(words or [])
    topic = rest.pop(0) if rest and rest[0] in TOPICS else None
    if len(rest) > 1:
        raise RecipeError(f"received {len(rest)} runs ({' '.join(rest)}); expected one at most")
    run = Path(rest[0]) if rest else None
    chosen = None
    if recipe:
        given = load_recipe(recipe).model_dump(exclude_unset=True)
        chosen = inherit(given, {"student.name": student}, recipe)
    context = context_of(runs, data_root, False, "cpu", quiet)
    if topic == "distill":
        from epdistill.workflows.distilling_cost import NAME, distilling_cost

        cost = distilling_cost(context, run=run, recipe=chosen, out=out, rounds=rounds or 15)
        if json:
            emit_json({"distill": str(cost.folder / NAME), **cost.content})
        else:
            distilling_table(cost)
        return
    if topic == "dynamics":
        from epdistill.workflows.dynamics import dynamics

        measured = dynamics(context, run=run, recipe=chosen, out=out, rounds=rounds or 7, plot=plot)
        if json:
            path = str(measured.folder / "dynamics.json")
            emit_json({"dynamics": path, **measured.content})
        else:
            dynamics_table(measured)
        return
    from epdistill.workflows.benchmark import bench as work

    done = work(
        context, run=run, recipe=chosen, out=out, rounds=rounds or 200, threads=threads,
        compiled=compiled,
    )  # fmt: skip
    if json:
        emit_json({"bench": str(done.folder / "bench.json"), **done.content})
    else:
        bench_table(done)
