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

TOPICS = ("dynamics", "distill", "serve", "load")


def bench(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[dynamics|distill|serve|load] [RUN]...",
            help="A student's run, the newest without it, and exported runs to time beside it; "
            "after dynamics or distill a teacher's, "
            "the small one that comes with the package without it; after serve or load an "
            "exported file, the newest without it.",
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
    clients: Annotated[int, typer.Option("--clients", min=1, help="load: asking at once.")] = 64,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="load: how long.")] = 60.0,
    out: OutFlag = None,
    runs: RunsFlag = RUNS,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Time teacher and student in one run.

    With a first word something else: `dynamics`, the variants of the relaxation; `distill`, the
    price of a teacher in training; `serve`, the server against onnxruntime alone; `load`, the
    server under many clients, answers checked.
    """
    from epdistill.api.common import with_student
    from epdistill.cli.tables import bench_table, distilling_table, dynamics_table
    from epdistill.errors import RecipeError

    rest = list(words or [])
    about = rest.pop(0) if rest and rest[0] in TOPICS else ""
    if about and len(rest) > 1:
        raise RecipeError(f"received {len(rest)} runs ({' '.join(rest)}); expected one at most")
    run = Path(rest[0]) if rest else None
    chosen = with_student(recipe, student)
    context = context_of(runs, data_root, False, "cpu", quiet)
    if about == "distill":
        from epdistill.workflows.distilling_cost import NAME, distilling_cost

        cost = distilling_cost(context, run=run, recipe=chosen, out=out, rounds=rounds or 15)
        if json:
            emit_json({"distill": str(cost.folder / NAME), **cost.content})
        else:
            distilling_table(cost)
        return
    if about == "dynamics":
        from epdistill.workflows.dynamics import dynamics

        measured = dynamics(context, run=run, recipe=chosen, out=out, rounds=rounds or 7, plot=plot)
        if json:
            path = str(measured.folder / "dynamics.json")
            emit_json({"dynamics": path, **measured.content})
        else:
            dynamics_table(measured)
        return
    if about in ("serve", "load"):
        from epdistill.cli.bench_serving import load_table, serving_table

        if about == "serve":
            from epdistill.workflows.serving_speed import bench_serve

            done = bench_serve(
                context, model=run, recipe=chosen, out=out, rounds=rounds or 200, threads=threads
            )
        else:
            from epdistill.workflows.serving_load import load

            done = load(
                context, model=run, recipe=chosen, out=out, clients=clients, seconds=seconds,
                threads=threads,
            )  # fmt: skip
        if json:
            emit_json({"bench": str(done.folder / "bench.json"), **done.content})
        else:
            (serving_table if about == "serve" else load_table)(done)
        return
    from epdistill.workflows.benchmark import bench as work

    done = work(
        context, run=run, recipe=chosen, out=out, rounds=rounds or 200, threads=threads,
        compiled=compiled, beside=[Path(other) for other in rest[1:]],
    )  # fmt: skip
    if json:
        emit_json({"bench": str(done.folder / "bench.json"), **done.content})
    else:
        bench_table(done)
