"""Measuring: attacks, timings, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from epdistill.api.common import RUNS, Place, context_of, path_of, paths_of, with_student

if TYPE_CHECKING:
    from epdistill.workflows.benchmark import Benched
    from epdistill.workflows.checking import Finding
    from epdistill.workflows.distilling_cost import DistillingCost
    from epdistill.workflows.dynamics import Dynamics
    from epdistill.workflows.evaluation import Evaluated
    from epdistill.workflows.theorem import Checked


def evaluate(
    models: Place | Sequence[Place] = (),
    *,
    suite: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    diagnose: bool = False,
    horizons: bool = False,
    corruptions: Place | None = None,
    linf: Sequence[float] | None = None,
    l2: Sequence[float] | None = None,
    steps: int | None = None,
    attacks: Sequence[str] | None = None,
    split: str | None = None,
    seed: int | None = None,
    out: Place | None = None,
    resume: bool = False,
    runs: Place = RUNS,
    data_root: Place | None = None,
    download: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> Evaluated:
    """Attack and corrupt models side by side; the worst case per image counts.

    Args:
        models: Runs, `.onnx` files, or `shipped` for teacher and file of this package; the newest
            without any.
        suite: `quick` (the default), `paper` or `full`.
        limit: Test images.
        subset: Which ones: `first` or `random`.
        diagnose: Look for masked gradients, and fit the uncertainty exponent of teachers;
            `full` always does.
        horizons: Sweep attack and prediction horizons of teachers; `full` always does.
        corruptions: Folder with the CIFAR-10-C arrays.
        linf: Radii, on pixels in [0,1]; those of the recipe without it.
        l2: Likewise.
        steps: PGD steps of `quick` and `full`; those of the recipe without it.
        attacks: Names of attacks of `quick` and `full`, to run these alone; all without it.
        split: `test` (without it) or `validation`.
        seed: Of the choice of images and of every attack.
        out, resume, runs, data_root, download, device, quiet: See the module.

    Returns:
        The folder and the content of results.json (docs/results-schema.md).
    """
    from epdistill.workflows.evaluation import evaluate as work
    from epdistill.workflows.request import Asked

    asked = Asked(
        (), suite, limit, subset, seed, diagnose or None, path_of(corruptions), split,
        horizons or None, None if linf is None else tuple(sorted(linf)),
        None if l2 is None else tuple(sorted(l2)), steps,
        None if attacks is None else tuple(attacks),
    )  # fmt: skip
    place = context_of(runs, data_root, download, device, quiet)
    return work(paths_of(models), place, asked=asked, out=path_of(out), resume=resume)


def bench(
    run: Place | None = None,
    *,
    recipe: Place | None = None,
    student: str | None = None,
    rounds: int = 200,
    threads: int | None = None,
    compiled: bool = True,
    beside: Sequence[Place] = (),
    out: Place | None = None,
    runs: Place = RUNS,
    data_root: Place | None = None,
    quiet: bool = False,
) -> Benched:
    """Time teacher, student and exported file per image, interleaved, in one run.

    Args:
        run: A student's run; the newest without it.
        recipe: Time untrained networks of this recipe instead of a run.
        student: With `recipe`: another student.
        rounds: Most rounds.
        threads: Of torch and onnxruntime; torch's own number without it.
        compiled: Also time the student under torch.compile.
        beside: Further exported runs, also of baselines, that are timed in the same rounds.
        out, runs, data_root, quiet: See the module.

    Returns:
        The folder and the content of bench.json (docs/bench-schema.md).
    """
    from epdistill.workflows.benchmark import bench as work

    return work(
        context_of(runs, data_root, False, "cpu", quiet),
        run=path_of(run),
        recipe=with_student(recipe, student),
        out=path_of(out),
        rounds=rounds,
        threads=threads,
        compiled=compiled,
        beside=paths_of(beside),
    )


def bench_dynamics(
    run: Place | None = None,
    *,
    recipe: Place | None = None,
    rounds: int = 7,
    plot: bool = False,
    out: Place | None = None,
    runs: Place = RUNS,
    data_root: Place | None = None,
    quiet: bool = False,
) -> Dynamics:
    """The relaxation's variants beside the published algorithm (`epdistill bench dynamics`).

    Args:
        run: A teacher's run; the small one that comes with the package without it.
        recipe: Time an untrained network of this recipe instead.
        rounds: Most rounds.
        plot: Draw it as well.
        out, runs, data_root, quiet: See the module.
    """
    from epdistill.workflows.dynamics import dynamics as work

    place = context_of(runs, data_root, False, "cpu", quiet)
    chosen = with_student(recipe, None)
    return work(place, run=path_of(run), recipe=chosen, out=path_of(out), rounds=rounds, plot=plot)


def bench_distill(
    run: Place | None = None,
    *,
    recipe: Place | None = None,
    student: str | None = None,
    rounds: int = 15,
    out: Place | None = None,
    runs: Place = RUNS,
    data_root: Place | None = None,
    quiet: bool = False,
) -> DistillingCost:
    """A training step with a teacher beside one on labels alone (`epdistill bench distill`).

    Args:
        run: A teacher's run; the small one that comes with the package without it.
        recipe: Whose student is trained; the teacher's own recipe without it.
        student: With `recipe`: another student.
        rounds: Most rounds.
        out, runs, data_root, quiet: See the module.
    """
    from epdistill.workflows.distilling_cost import distilling_cost as work

    place = context_of(runs, data_root, False, "cpu", quiet)
    chosen = with_student(recipe, student)
    return work(place, run=path_of(run), recipe=chosen, out=path_of(out), rounds=rounds)


def bench_serve(
    model: Place | None = None,
    *,
    recipe: Place | None = None,
    student: str | None = None,
    rounds: int = 200,
    threads: int | None = None,
    out: Place | None = None,
    runs: Place = RUNS,
    quiet: bool = False,
) -> Benched:
    """The server beside onnxruntime alone (`epdistill bench serve`).

    Args:
        model: An exported file, or a run with one; the newest without it.
        recipe: An untrained network of this recipe instead.
        student: With `recipe`: another student.
        rounds: Most rounds.
        threads: Of onnxruntime, in the server and beside it; all cores but one without it.
        out, runs, quiet: See the module.
    """
    from epdistill.workflows.serving_speed import bench_serve as work

    place, chosen = context_of(runs, None, False, "cpu", quiet), with_student(recipe, student)
    return work(
        place, model=path_of(model), recipe=chosen, out=path_of(out), rounds=rounds,
        threads=threads,
    )  # fmt: skip


def bench_load(
    model: Place | None = None,
    *,
    recipe: Place | None = None,
    student: str | None = None,
    clients: int = 64,
    seconds: float = 60.0,
    threads: int | None = None,
    out: Place | None = None,
    runs: Place = RUNS,
    quiet: bool = False,
) -> Benched:
    """The server under many clients, every answer checked (`epdistill bench load`).

    Args:
        model, recipe, student: As for `bench_serve`.
        clients: Connections at once.
        seconds: For how long.
        threads: Of onnxruntime; all cores without it.
        out, runs, quiet: See the module.
    """
    from epdistill.workflows.serving_load import load as work

    place, chosen = context_of(runs, None, False, "cpu", quiet), with_student(recipe, student)
    return work(
        place, model=path_of(model), recipe=chosen, out=path_of(out), clients=clients,
        seconds=seconds, threads=threads,
    )  # fmt: skip


def check(folders: Place | Sequence[Place] = (), *, runs: Place = RUNS) -> list[Finding]:
    """Whether every file of runs and evaluations is as it was written (docs/runs.md).

    Args:
        folders: Runs, evaluations, or folders of many; `runs` without any.
        runs: See the module.

    Returns:
        One finding per file: its `path`, `state` and `why`.
    """
    from epdistill.workflows.checking import check as work

    return work(paths_of(folders) or [Path(runs)])


def check_theorem(
    run: Place | None = None,
    *,
    images: int = 20,
    out: Place | None = None,
    runs: Place = RUNS,
    data_root: Place | None = None,
    quiet: bool = False,
) -> Checked:
    """EP against BPTT and the implicit gradient, layer by layer, in float64.

    Args:
        run: A teacher's run; the newest without it.
        images: Validation images.
        out, runs, data_root, quiet: See the module.

    Returns:
        The folder, the comparison, and the content of theorem.json.
    """
    from epdistill.workflows.theorem import check as work

    place = context_of(runs, data_root, False, "cpu", quiet)
    return work(place, run=path_of(run), images=images, out=path_of(out))
