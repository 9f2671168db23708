"""`epdistill check-theorem`: the gradients of a run, compared and written down."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epdistill.data import to_float
from epdistill.loading import load_epcnn
from epdistill.runs import atomic_write, new_run_folder, newest_run, open_run, write_json
from epdistill.workflows.context import Context, environment, require_finished

if TYPE_CHECKING:
    from epdistill.teachers.theorem import Theorem


@dataclass(frozen=True)
class Checked:
    """Where the comparison was written, and what it says.

    Attributes:
        folder: Holds theorem.json and theorem.png.
        theorem: The comparison.
        content: The content of theorem.json.
    """

    folder: Path
    theorem: Theorem
    content: dict[str, Any]


def check(
    context: Context, *, run: Path | None = None, images: int = 20, out: Path | None = None
) -> Checked:
    """Compare EP, BPTT and implicit gradients on validation images of a run, in float64.

    Args:
        context: Folders, device, reporter.
        run: A teacher's run; the newest one without it.
        images: How many images are offered; those that do not settle are left out.
        out: Folder for the results; numbered automatically without it.
    """
    from epdistill.teachers.theorem import check_theorem

    source = require_finished(
        open_run(run, "teacher") if run else newest_run(context.runs, "teacher")
    )
    model = load_epcnn(source)
    split = context.data_of(source).validation
    with context.reporter.bar("check-theorem", 1):
        found = check_theorem(model, to_float(split.images[:images]), split.labels[:images])
    content = {
        "run": source.name,
        **asdict(found),
        "tipped": {str(beta): count for beta, count in found.tipped.items()},
        "environment": environment(),
    }
    folder = new_run_folder(out, context.runs, "theorem")
    write_json(folder / "theorem.json", content)
    draw(found, folder / "theorem.png")
    return Checked(folder, found, content)


def draw(found: Theorem, path: Path) -> None:
    """Relative error over beta, and EP against BPTT over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row.parameter for row in found.comparisons))
    for name in names:
        rows = [
            (row.beta, row.relative_error)
            for row in found.comparisons
            if row.estimator == "ep" and row.parameter == name and row.beta is not None
        ]
        left.loglog(*zip(*rows, strict=True), "o-", label=name)
    left.set_xlabel("beta")
    left.set_ylabel("relative error of EP against the implicit gradient")
    left.set_title(f"beta to 0, {found.images} images")
    left.legend()
    left.grid(alpha=0.3)
    if found.moments:
        sweeps = [moment.sweep for moment in found.moments]
        for layer in range(len(found.moments[0].ep)):
            color = f"C{layer}"
            right.plot(
                sweeps, [m.bptt[layer] for m in found.moments], color=color,
                label=f"BPTT, weight {layer + 1}",
            )  # fmt: skip
            right.plot(sweeps, [m.ep[layer] for m in found.moments], "o", ms=3.5, color=color)
        right.set_title(f"over time, synchronous map, {found.synchronous_images} images (dots: EP)")
        right.set_xlabel("sweeps")
        right.set_ylabel("norm of the weight gradient")
        right.legend()
        right.grid(alpha=0.3)
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no image settles under the synchronous map", ha="center")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    atomic_write(path, picture.getvalue())
