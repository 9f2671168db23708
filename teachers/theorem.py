"""Does Equilibrium Propagation compute the gradient it should? EP against BPTT against implicit.

Two statements are checked, per layer and in float64. As beta -> 0 the symmetric
estimator tends to the gradient through the equilibrium (Scellier & Bengio 2017).
And with the synchronous map, EP after k nudged sweeps is BPTT through the last k
sweeps, for every k (Ernoult et al. 2019, "Updates of Equilibrium Prop Match
Gradients of Backprop Through Time").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from epdistill.errors import RecipeError
from epdistill.teachers.energy import Network, States
from epdistill.teachers.learning import Gradients, ep_step, phi_difference
from epdistill.teachers.model import EPCNN
from epdistill.teachers.phase import pools_at
from epdistill.teachers.relaxation import relax
from epdistill.teachers.rules import bptt_step, implicit_step
from epdistill.teachers.schedule import Schedule, make_nudge

BETAS = (0.5, 0.1, 0.01, 1e-3, 1e-4)


@dataclass(frozen=True)
class Comparison:
    """One parameter's gradient by one estimator against the implicit one.

    Attributes:
        estimator: `ep` or `bptt`.
        beta: Nudging strength, or None for BPTT.
        parameter: `weight 1`.. from the image upwards, `readout` last.
        relative_error: ||g - g_implicit|| / ||g_implicit||.
        cosine: Of the angle between the two.
        sign_agreement: Share of entries of equal sign, among those that are not 0 in both.
    """

    estimator: str
    beta: float | None
    parameter: str
    relative_error: float
    cosine: float
    sign_agreement: float


@dataclass(frozen=True)
class Moment:
    """EP against BPTT after k sweeps of the synchronous map.

    Attributes:
        sweep: k.
        ep: ||EP gradient|| per layer, weights only.
        bptt: ||BPTT gradient|| per layer.
        relative_error: ||EP - BPTT|| / ||BPTT|| per layer.
    """

    sweep: int
    ep: tuple[float, ...]
    bptt: tuple[float, ...]
    relative_error: tuple[float, ...]


@dataclass(frozen=True)
class Theorem:
    """What the check found.

    Attributes:
        images: How many images took part: those that settle under both maps.
        offered: How many were offered.
        residual: Largest residual of a free phase that took part.
        adjoint_residual: Largest relative residual of the implicit solve.
        comparisons: Over estimators, betas and layers.
        tipped: Images pushed into another basin, by beta.
        moments: Over time, with the synchronous map; empty if no image settles under it.
        synchronous_images: How many images settle under the synchronous map.
    """

    images: int
    offered: int
    residual: float
    adjoint_residual: float
    comparisons: tuple[Comparison, ...]
    tipped: dict[float, int]
    moments: tuple[Moment, ...]
    synchronous_images: int


def compare(
    name: str, beta: float | None, parameter: str, found: Tensor, truth: Tensor
) -> Comparison:
    """Relative error, cosine and sign agreement of two tensors of one shape."""
    a, b = found.flatten(), truth.flatten()
    norm = float(b.norm())
    live = (a != 0) | (b != 0)
    same = (a.sign() == b.sign())[live]
    return Comparison(
        name,
        beta,
        parameter,
        float((a - b).norm()) / norm if norm else float(bool(live.any())),
        float(a @ b) / (float(a.norm()) * norm) if norm and float(a.norm()) else float(norm == 0),
        float(same.double().mean()) if len(same) else 1.0,
    )


def _named(gradients: Gradients) -> list[tuple[str, Tensor]]:
    named = [(f"weight {n}", weight) for n, weight in enumerate(gradients.weights, start=1)]
    if gradients.readout_weight is not None:
        named.append(("readout", gradients.readout_weight))
    return named


def check_theorem(
    model: EPCNN,
    images: Tensor,
    labels: Tensor,
    *,
    betas: Sequence[float] = BETAS,
    sweeps: int = 4000,
    time: int = 30,
    tolerance: float = 1e-11,
) -> Theorem:
    """Compare the three gradients on a model, in float64.

    Args:
        model: A teacher; it is copied.
        images: (N, C, H, W) in [0,1].
        labels: (N,) int64.
        betas: Nudging strengths of the first statement.
        sweeps: The most sweeps of any phase.
        time: Sweeps of the second statement; BPTT keeps them all in memory.
        tolerance: Residual at which a phase counts as settled.

    Raises:
        RecipeError: No image settles, so there is nothing to compare.
    """
    import copy

    double = copy.deepcopy(model).double()
    network, x = double.network(), double.normalise(images.double())
    schedule = model.schedule.with_(
        kind="red-black", tolerance=tolerance, sweeps=sweeps, precision="full"
    )
    settled = relax(network, x, schedule).certificate.converged
    if not bool(settled.any()):
        raise RecipeError(
            f"none of {len(images)} images settles to {tolerance:g} within {sweeps} sweeps; "
            "expected at least one: give more sweeps"
        )
    x, labels = x[settled], labels[settled]
    truth = implicit_step(network, x, labels, free=schedule, tolerance=1e-12, iterations=5000)
    wanted = _named(truth.gradients)
    rows, tipped = [], {}
    through_time = bptt_step(network, x, labels, free=schedule, sweeps=300).gradients
    for (name, found), (_, true) in zip(_named(through_time), wanted, strict=True):
        rows.append(compare("bptt", None, name, found, true))
    for beta in betas:
        step = ep_step(network, x, labels, beta=beta, free=schedule, nudged=schedule)
        assert step.tipped is not None
        tipped[beta] = int(step.tipped.sum())
        for (name, found), (_, true) in zip(_named(step.gradients), wanted, strict=True):
            rows.append(compare("ep", beta, name, found, true))
    moments, count = over_time(network, x, labels, sweeps=sweeps, time=time, tolerance=tolerance)
    return Theorem(
        len(x),
        len(images),
        float(truth.free.certificate.residual.max()),
        float(truth.adjoint_residual.max()) if truth.adjoint_residual is not None else 0.0,
        tuple(rows),
        tipped,
        moments,
        count,
    )


def over_time(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    sweeps: int,
    time: int,
    tolerance: float,
    beta: float = 1e-4,
) -> tuple[tuple[Moment, ...], int]:
    """EP after k nudged sweeps against BPTT through k sweeps, both with the synchronous map.

    Only images that settle under the synchronous map take part (it may cycle on others).

    Returns:
        One row per k, and how many images took part.
    """
    still = Schedule("synchronous", 1.0, tolerance, sweeps)
    rest = relax(network, images, still)
    keep = rest.certificate.converged
    count = int(keep.sum())
    if count == 0:
        return (), 0
    x, y = images[keep], labels[keep]
    start = [state[keep] for state in rest.states]
    drive = network.pool(1, network.drive(1, x))
    fixed = Schedule("synchronous", 1.0, 0.0, time)
    paths: list[list[States]] = []
    for sign in (1, -1):
        path: list[States] = []
        relax(
            network, x, fixed, start=start, drive=drive,
            nudge=make_nudge(network, y, sign * beta, bounded=False),
            watch=lambda _, states, path=path: path.append(list(states)),  # type: ignore[misc]
        )  # fmt: skip
        paths.append(path)
    moments = []
    for k in range(1, time + 1):
        high, low = paths[0][k], paths[1][k]
        weights, _ = phi_difference(
            network, x, high, low, pools_at(network, high, drive), pools_at(network, low, drive)
        )
        ours = [-weight / (2 * beta * count) for weight in weights]
        theirs = bptt_step(network, x, y, free=fixed, sweeps=k, start=start).gradients.weights
        moments.append(
            Moment(
                k,
                tuple(float(g.norm()) for g in ours),
                tuple(float(g.norm()) for g in theirs),
                tuple(
                    float((a - b).norm() / b.norm()) if float(b.norm()) else float(a.norm())
                    for a, b in zip(ours, theirs, strict=True)
                ),
            )
        )
    return tuple(moments), count
