"""How states are relaxed, what is known about them afterwards, and what pulls at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.errors import RecipeError
from epdistill.teachers.energy import Network, Pooled, States

if TYPE_CHECKING:
    from epdistill.teachers.mixed import Base

Kind = Literal["red-black", "synchronous"]
Precision = Literal["full", "mixed"]


@dataclass(frozen=True)
class Schedule:
    """How a state is relaxed. The equilibrium is not unique, so this is part of the model.

    Attributes:
        kind: `"red-black"` or the published `"synchronous"`.
        omega: Over-relaxation, in (0, 2); red-black only.
        tolerance: An image is settled when its residual max |sigma(dPhi/ds) - s|
            is at most this; 0 runs `sweeps` sweeps for every image.
        sweeps: The most sweeps an image gets.
        check_every: Sweeps between two looks at the residual.
        precision: `"full"`: everything in the network's own dtype; `"mixed"`: float32
            networks relax `coarse` sweeps in bfloat16 and then only differences from
            a float32 base go through bfloat16 (see `epdistill.teachers.mixed`).
            Mixed is red-black only; a float64 network ignores it, and so does a device
            that has no bfloat16 of its own, where it would only cost time.
        coarse: Sweeps in plain bfloat16 before the differences; mixed only.
    """

    kind: Kind = "red-black"
    omega: float = 1.5
    tolerance: float = 1e-4
    sweeps: int = 250
    check_every: int = 5
    precision: Precision = "full"
    coarse: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot relax."""
        if self.kind not in ("red-black", "synchronous"):
            raise RecipeError(f"schedule {self.kind!r}; expected 'red-black' or 'synchronous'")
        if self.precision not in ("full", "mixed"):
            raise RecipeError(f"precision {self.precision!r}; expected 'full' or 'mixed'")
        if self.precision == "mixed" and self.kind != "red-black":
            raise RecipeError("mixed precision with the synchronous schedule; expected red-black")
        if not 0 < self.omega < 2:
            raise RecipeError(f"omega {self.omega}; expected a number between 0 and 2, exclusive")
        if self.sweeps < 1 or self.check_every < 1 or self.tolerance < 0:
            raise RecipeError(
                f"sweeps {self.sweeps}, check_every {self.check_every}, tolerance "
                f"{self.tolerance}; expected at least 1, 1 and 0"
            )

    def with_(self, **changes: Any) -> Schedule:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `Schedule(**content)` reads it back."""
        return asdict(self)


PUBLISHED = Schedule(kind="synchronous", omega=1.0, tolerance=0.0, sweeps=250)
"""The published free phase: 250 synchronous sweeps for every image."""


@dataclass(frozen=True)
class Certificate:
    """What is known about each image's state; every tensor has shape (N,).

    Attributes:
        residual: max over units of |sigma(dPhi/ds) - s| at the returned state.
        sweeps: int64, sweeps spent on the image.
        converged: bool, residual <= tolerance.
    """

    residual: Tensor
    sweeps: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Relaxed:
    """Where a relaxation ended.

    Attributes:
        states: s_1..s_L, each (N, C, h, w), in [0,1].
        certificate: What is known about them.
        pooled: P(u_1)..P(u_L) at these states where they are at hand: not if images
            were retired at different sweeps.
        base: In mixed precision, these states as evaluated by `make_base`, where at hand.
    """

    states: States
    certificate: Certificate
    pooled: list[Pooled] | None = field(default=None, repr=False)
    base: Base | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Nudge:
    """A pull of strength beta down (beta > 0) or up (beta < 0) the loss.

    Attributes:
        beta: Strength; the nudged energy is E + beta * loss.
        target: (N, classes) one-hot labels in the dtype of the states.
        bound: Upper bound on the curvature of beta * loss in s_L (0 for beta < 0):
            keeps the update a majorise-minimise step. See `make_nudge`.

    Both numbers may be scalar tensors, where sweeps are recorded and replayed.
    """

    beta: float | Tensor
    target: Tensor
    bound: float | Tensor = 0.0


@dataclass(frozen=True)
class Push:
    """A constant force on the states: the nudge of a loss that is linear in them.

    With E - sum_n <f_n, s_n> in place of E every update stays the exact minimiser, so
    nothing needs a bound.

    Attributes:
        forces: f_1..f_L, shaped like the states; None where a layer is left alone.
    """

    forces: Sequence[Tensor | None]


def make_nudge(network: Network, labels: Tensor, beta: float, *, bounded: bool = True) -> Nudge:
    """Build the nudge of a phase.

    For beta > 0 the cross-entropy, linearised at the current state, lies below
    the loss; adding its curvature bound (Boehning 1992) beta * lambda_max(V^T B V),
    B = (I - 11^T/K)/2, makes the quadratic model lie above it again.

    Args:
        network: The weights; the readout decides the loss.
        labels: (N,) int64.
        beta: Strength and sign.
        bounded: False leaves the bound out, as the published dynamics do.
    """
    classes = network.architecture.classes
    target = F.one_hot(labels, classes).to(network.weights[0].dtype)
    bound = 0.0
    if bounded and beta > 0 and network.readout_weight is not None:
        v = network.readout_weight.detach().cpu().double()  # as many rows as classes
        centred = v - v.mean(0, keepdim=True)  # B V up to the factor 1/2
        bound = beta * 0.5 * float(torch.linalg.eigvalsh(v @ centred.T).max())
    return Nudge(beta, target, bound)
