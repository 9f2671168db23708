"""`epdistill bench dynamics`: the relaxation's variants side by side, in one run, as ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.data import DataSet, to_float
from epdistill.errors import DataError
from epdistill.loading import load_epcnn
from epdistill.recipes import Recipe
from epdistill.runs import new_run_folder, open_run, write_json
from epdistill.workflows.context import Context, require_finished
from epdistill.workflows.shapes import stand_in

if TYPE_CHECKING:
    from epdistill.export.bench import BenchRow, Ratio
    from epdistill.teachers.energy import Network, States
    from epdistill.teachers.learning import Step
    from epdistill.teachers.model import EPCNN
    from epdistill.teachers.schedule import Schedule

BATCH = 64
UNROLL = 70
REFERENCE, FLOAT32 = "published", "red-black float32"
SETTLED_AT = 1e-4
# Free phases settle fastest at 1.4; nudged ones keep to their basin better at 1.2.
OMEGA, NUDGED_OMEGA = 1.4, 1.2
# What a float32 residual can be told from 0 by.
FLOOR = 1e-6
# Worst layer's cosine from which on a variant's gradient counts as right.
RIGHT = 0.99


@dataclass(frozen=True)
class Variant:
    """One way to do a teaching step.

    Attributes:
        name: As shown.
        free: Schedule of the free phase.
        nudged: Schedule of both nudged phases.
    """

    name: str
    free: Schedule
    nudged: Schedule


@dataclass(frozen=True)
class Dynamics:
    """Where the figures were written, and what they say.

    Attributes:
        folder: Holds dynamics.json, and dynamics.png if a plot was asked for.
        content: The content of dynamics.json.
    """

    folder: Path
    content: dict[str, Any]


def full_schedule(tolerance: float) -> Schedule:
    """Red-black in float32, settling to a residual of `tolerance`."""
    from epdistill.teachers.schedule import Schedule

    return Schedule(omega=OMEGA, tolerance=tolerance, sweeps=100)


def variants(network: Network, tolerance: float) -> list[Variant]:
    """Red-black in float32, and in mixed precision with shorter and longer nudged phases.

    Args:
        network: Where it lies decides whether there is a mixed precision.
        tolerance: Residual at which the free phases stop.
    """
    from epdistill.teachers.relaxation import is_mixed

    full = full_schedule(tolerance)
    mixed = full.with_(precision="mixed", coarse=10)
    lengths = (10, 20) if is_mixed(network, mixed) else ()

    def nudged(free: Schedule, sweeps: int) -> Schedule:
        return free.with_(tolerance=0.0, sweeps=sweeps, omega=NUDGED_OMEGA)

    return [
        Variant(FLOAT32, full, nudged(full, 15)),
        *(Variant(f"red-black mixed, {k} nudged", mixed, nudged(mixed, k)) for k in lengths),
    ]


def dynamics(
    context: Context,
    *,
    run: Path | None = None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    rounds: int = 7,
    max_seconds: float = 60.0,
    images: int = 1000,
    plot: bool = False,
) -> Dynamics:
    """Compare the published relaxation with ours on one model.

    Args:
        context: Folders, device, reporter.
        run: A teacher's run; the small teacher that comes with the package without it.
        recipe: Time a freshly initialised network of this recipe instead.
        out: Folder for the results; numbered automatically without it.
        rounds: Most measured calls of each variant.
        max_seconds: Time per variant, roughly; at least three calls are measured.
        images: Test images whose settling is counted.
        plot: Also draw dynamics.png.
    """
    from epdistill.export.bench import hardware

    model, data, label = _subject(context, run, recipe)
    x = to_float(data.test.images[:images])
    labels = data.test.labels[:images]
    line = context.reporter.line
    batch, target = x[:BATCH], labels[:BATCH]
    line(f"{label}: teaching steps and inference, batch {len(batch)}")
    content: dict[str, Any] = {
        "model": label,
        "channels": [layer.channels for layer in model.architecture.layers],
        "batch": len(batch),
        "beta": 0.5,
        "hardware": hardware(),
    }
    content.update(_teaching(model, batch, target, rounds, max_seconds))
    line("input gradients")
    content.update(_input_gradients(model, batch, target, rounds, max_seconds))
    line(f"settling of {len(x)} images")
    content.update(_settling(model, x))
    folder = new_run_folder(out, context.runs, "dynamics")
    write_json(folder / "dynamics.json", content)
    if plot:
        from epdistill.workflows.dynamics_plot import draw

        draw(model, x[:BATCH], labels[:BATCH], folder / "dynamics.png")
    return Dynamics(folder, content)


def _subject(
    context: Context, run: Path | None, recipe: Recipe | None
) -> tuple[EPCNN, DataSet, str]:
    if recipe is not None:
        from epdistill.teachers.teach import build_teacher

        data = stand_in(recipe, images=BATCH)
        return build_teacher(recipe, data).eval(), data, f"untrained network of {recipe.name}"
    if run is None:
        return shipped(context)
    source = require_finished(open_run(run, "teacher"))
    model = load_epcnn(source).float()
    if model.readout is None:
        raise DataError(f"{source.path} has an mse readout; expected a cross-entropy one")
    return model, context.data_of(source), source.name


def shipped(context: Context) -> tuple[EPCNN, DataSet, str]:
    """The teacher of the package, on CIFAR-10 if it is there and on noise otherwise."""
    from epdistill.recipes import load_recipe
    from epdistill.teachers.pretrained import shipped_teacher

    model, _ = shipped_teacher()
    recipe = load_recipe("cifar10-small", environment={})
    try:
        data = context.load_data(recipe.data, recipe.seed)
        return model, data, "shipped teacher on CIFAR-10 test images"
    except DataError as error:
        context.reporter.line(f"[dim]{error}")
        context.reporter.line("no CIFAR-10 here: timing on uniform noise (--data-root DIR)")
        return model, stand_in(recipe, images=256), "shipped teacher on uniform noise"


def _ratio(rows: Sequence[Ratio], name: str) -> dict[str, float]:
    (found,) = [row for row in rows if row.name == name]
    return {"ratio": found.speedup, "low": found.low, "high": found.high}


def _seconds(rows: Sequence[BenchRow]) -> dict[str, dict[str, float]]:
    return {
        row.name: {
            "median": row.timing.median,
            "q25": row.timing.q25,
            "q75": row.timing.q75,
            "repeats": row.timing.repeats,
        }
        for row in rows
    }


def _teaching(
    model: EPCNN, images: Tensor, labels: Tensor, rounds: int, max_seconds: float
) -> dict[str, Any]:
    """Teaching and inference speed, residuals and gradient cosines.

    Every variant's free phase goes on to the reference's residual. Of the mixed variants the
    fastest one with a right gradient speaks for all, or without one the most accurate; where
    there are none, float32 does.
    """
    from epdistill.export.bench import Contender, bench, ratios
    from epdistill.teachers.learning import ep_step
    from epdistill.teachers.reference import reference_gradients, reference_relax
    from epdistill.teachers.relaxation import relax, residuals

    network, x = model.network(), model.normalise(images)
    beta = 0.5
    reference_states, reference_found = reference_gradients(network, x, labels, beta=beta)
    reference_gap = residuals(network, x, reference_states)
    goal = max(float(reference_gap.median()), FLOOR)
    ours = variants(network, goal)

    def step(variant: Variant) -> Callable[[Tensor], Step]:
        return lambda _: ep_step(
            network, x, labels, beta=beta, free=variant.free, nudged=variant.nudged
        )

    contenders = [
        Contender(REFERENCE, lambda _: reference_gradients(network, x, labels, beta=beta)),
        *(Contender(variant.name, step(variant)) for variant in ours),
    ]
    size = len(images)
    rows = bench(
        contenders, images, batch_sizes=(size,), warmup=1, rounds=rounds, max_seconds=max_seconds
    )
    taught = ratios(rows, REFERENCE)
    steps = {variant.name: step(variant)(images) for variant in ours}
    cosines = {
        name: layer_cosines(
            list(found.gradients.weights), model, images, labels, found.free.states, beta
        )
        for name, found in steps.items()
    }
    reference_cosines = layer_cosines(
        reference_found, model, images, labels, reference_states, beta
    )
    speed = {row.name: row.speedup for row in taught}
    worst = {name: min(found) for name, found in cosines.items()}
    mixed = [name for name in worst if name != FLOAT32]
    fit = [name for name in mixed if worst[name] >= RIGHT]
    fallback = max(mixed, key=worst.__getitem__, default=FLOAT32)
    chosen = max(fit, key=speed.__getitem__, default=fallback)
    # Free phases do not differ between the mixed variants.
    free = {FLOAT32: ours[0].free, chosen: ours[-1].free}

    def infer(schedule: Schedule) -> Callable[[Tensor], object]:
        return lambda _: relax(network, x, schedule)

    inference = [
        Contender(REFERENCE, lambda _: reference_relax(network, x)),
        *(Contender(name, infer(schedule)) for name, schedule in free.items()),
    ]
    answered = bench(
        inference, images, batch_sizes=(size,), warmup=1, rounds=rounds, max_seconds=max_seconds
    )
    inferred = ratios(answered, REFERENCE)
    return {
        "teach_speedup": _ratio(taught, chosen),
        "teach_speedup_float32": _ratio(taught, FLOAT32),
        "teach_seconds": _seconds(rows),
        "teach_speedups": {name: _ratio(taught, name) for name in worst},
        "teach_variant": chosen,
        "infer_speedup": _ratio(inferred, chosen),
        "infer_speedup_float32": _ratio(inferred, FLOAT32),
        "infer_seconds": _seconds(answered),
        "infer_residual": goal,
        "gradient_cosine_min": min(worst[FLOAT32], worst[chosen]),
        "gradient_cosines": cosines,
        "reference_gradient_cosine_min": min(reference_cosines),
        "reference_gradient_cosines": reference_cosines,
        "residual": {
            name: _spread(found.free.certificate.residual) for name, found in steps.items()
        },
        "reference_residual": _spread(reference_gap),
        "sweeps": {
            name: float(found.free.certificate.sweeps.double().mean())
            for name, found in steps.items()
        },
        "tipped": {
            name: int(found.tipped.sum()) if found.tipped is not None else 0
            for name, found in steps.items()
        },
    }


def _spread(values: Tensor) -> dict[str, float]:
    low, median, high = values.double().quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {
        "median": float(median),
        "q25": float(low),
        "q75": float(high),
        "max": float(values.max()),
    }


def layer_cosines(
    found: Sequence[Tensor],
    model: EPCNN,
    images: Tensor,
    labels: Tensor,
    states: States,
    beta: float,
) -> list[float]:
    """Cosine of each layer's weight gradient with the settled float64 one at the same beta.

    The float64 gradient refines these very free states and then settles both
    nudges, without over-relaxation, so that it belongs to the same equilibrium.
    """
    import copy

    from epdistill.teachers.learning import phi_difference
    from epdistill.teachers.phase import pools_at
    from epdistill.teachers.relaxation import relax
    from epdistill.teachers.schedule import Schedule, make_nudge

    double = copy.deepcopy(model).double()
    network: Network = double.network()
    x = double.normalise(images.double())
    exact = Schedule(omega=1.0, tolerance=1e-9, sweeps=5000)
    rest = relax(network, x, exact, start=[state.double() for state in states])
    high, low = (
        relax(network, x, exact, start=rest.states, nudge=make_nudge(network, labels, b)).states
        for b in (beta, -beta)
    )
    drive = network.pool(1, network.drive(1, x))
    pools = [pools_at(network, end, drive) for end in (high, low)]
    weights, _ = phi_difference(network, x, high, low, pools[0], pools[1])
    return [
        float(F.cosine_similarity(-truth.flatten(), mine.double().flatten(), dim=0))
        for truth, mine in zip(weights, found, strict=True)
    ]


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `run` returns."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(kept.values())
    del result
    return total


def _input_gradients(
    model: EPCNN, images: Tensor, labels: Tensor, rounds: int, max_seconds: float
) -> dict[str, Any]:
    """The implicit input gradient against an unroll of 70 sweeps."""
    from epdistill.export.bench import Contender, bench, ratios

    def gradient(view: EPCNN) -> Tensor:
        x = images.clone().requires_grad_()
        loss = F.cross_entropy(view(x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]

    def memory(view: EPCNN) -> int:
        x = images.clone().requires_grad_()
        return saved_bytes(lambda: F.cross_entropy(view(x), labels))

    still = model.eval().requires_grad_(False)
    settled = full_schedule(SETTLED_AT)
    implicit = still.with_gradient("implicit").with_schedule(settled)
    unrolled = still.with_gradient("unrolled-first", UNROLL)
    name = f"unrolled {UNROLL}"
    rows = bench(
        [
            Contender(name, lambda _: gradient(unrolled)),
            Contender("implicit", lambda _: gradient(implicit)),
        ],
        images,
        batch_sizes=(len(images),),
        warmup=1,
        rounds=rounds,
        max_seconds=max_seconds,
    )
    gradient(implicit)
    residual = implicit.adjoint_residual
    assert residual is not None
    more = implicit.with_schedule(settled.with_(sweeps=2 * settled.sweeps))
    return {
        "implicit_gradient_speedup": _ratio(ratios(rows, name), "implicit"),
        "input_gradient_seconds": _seconds(rows),
        "implicit_residual": _spread(residual),
        "saved_bytes": {
            "implicit": memory(implicit),
            "implicit, twice the sweeps": memory(more),
            "unrolled 35": memory(still.with_gradient("unrolled-first", 35)),
            name: memory(unrolled),
        },
    }


def _settling(model: EPCNN, images: Tensor) -> dict[str, Any]:
    """Shares of images settled to 1e-4 by 100 and 250 sweeps, ours and published."""
    from epdistill.teachers.relaxation import relax
    from epdistill.teachers.schedule import PUBLISHED

    ours = full_schedule(SETTLED_AT).with_(sweeps=250)
    network = model.network()

    def share(schedule: Schedule) -> float:
        settled = 0
        for start in range(0, len(images), BATCH):
            x = model.normalise(images[start : start + BATCH])
            gap = relax(network, x, schedule).certificate.residual
            settled += int((gap <= SETTLED_AT).sum())
        return settled / len(images)

    return {
        "settled_at": SETTLED_AT,
        "settled_images": len(images),
        "converged_share": {
            "100": share(ours.with_(sweeps=100)),
            "250": share(ours),
        },
        "reference_converged_share": {
            "100": share(PUBLISHED.with_(sweeps=100)),
            "250": share(PUBLISHED),
        },
    }
