"""Everything the command line does, as function calls: `epdistill.teach(...)` and so on.

    import epdistill

    teacher = epdistill.teach("digits", epochs=5)
    student = epdistill.distill(teacher.run.path, student="cnn", epochs=5)
    file = epdistill.export(student.run.path).result.path
    model = epdistill.load(file)

Arguments mean what the flags of the same name mean (docs/api.md has an example for each task),
paths may be text, and what a command prints as JSON is a field of what is returned. Errors are
children of `epdistill.errors.EpdistillError`, with the line that the command would print.

These settings are the same for all functions that take them:

    runs       folder of all runs, `./runs`
    out        where to write; a numbered folder under `runs` without it
    resume     continue `out`, or the newest unfinished one
    data_root  folder with downloaded data sets
    download   fetch a data set that is missing
    device     `auto`, `cpu`, `cuda` or `cuda:N`
    track      `("tensorboard",)`, or objects with `log(step, values)` (`epdistill.tracking`)
    quiet      no progress on standard error
"""

from epdistill.api.measuring import (
    bench,
    bench_distill,
    bench_dynamics,
    bench_load,
    bench_serve,
    check,
    check_theorem,
    evaluate,
)
from epdistill.api.shipping import export, load, predict, report, results, serve
from epdistill.api.training import ablate, distill, plan_ablation, run, teach

__all__ = [
    "ablate",
    "bench",
    "bench_distill",
    "bench_dynamics",
    "bench_load",
    "bench_serve",
    "check",
    "check_theorem",
    "distill",
    "evaluate",
    "export",
    "load",
    "plan_ablation",
    "predict",
    "report",
    "results",
    "run",
    "serve",
    "teach",
]
