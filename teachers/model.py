"""The EP-CNN as an `nn.Module`: images in [0,1] in, logits out, attackable by any library."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from epdistill.errors import RecipeError
from epdistill.teachers.architecture import Architecture
from epdistill.teachers.energy import Network, States
from epdistill.teachers.estimate import estimate_adjoint
from epdistill.teachers.implicit import image_gradient, solve_adjoint
from epdistill.teachers.relaxation import relax, unrolled
from epdistill.teachers.schedule import Relaxed, Schedule
from epdistill.teachers.targets import Shape, Targets

GradientKind = Literal["implicit", "ep", "unrolled-first", "unrolled-last"]


@dataclass(frozen=True)
class InputGradient:
    """How the gradient of the logits in the images is computed.

    Attributes:
        kind: `"implicit"`: through the equilibrium, constant memory;
            `"ep"`: estimated from two nudged phases of `sweeps` sweeps, constant memory;
            `"unrolled-first"`: through `sweeps` sweeps from zero states, and the
            logits are those after that many sweeps (the published attack);
            `"unrolled-last"`: relax first, then through `sweeps` more sweeps.
        sweeps: Length of the unroll or of each nudged phase; unused by `"implicit"`.
        beta: Length of the force of each nudged phase; `"ep"` only.
    """

    kind: GradientKind = "implicit"
    sweeps: int = 30
    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse unknown kinds and empty unrolls."""
        kinds = get_args(GradientKind)
        if self.kind not in kinds:
            raise RecipeError(f"input gradient {self.kind!r}; expected one of {', '.join(kinds)}")
        if self.sweeps < 1 or not self.beta > 0:
            raise RecipeError(
                f"{self.sweeps} sweeps and beta {self.beta}; expected at least 1 and above 0"
            )


class _Equilibrium(torch.autograd.Function):
    """images -> s_L (and s_{L-1} for the mse readout), differentiated at the fixed point."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: EPCNN) -> tuple[Tensor, Tensor]:
        network = model.network()
        states = relax(network, images, model.schedule).states
        ctx.model, ctx.states = model, states
        ctx.save_for_backward(images)
        below = states[-2] if len(states) > 1 else images
        return states[-1].clone(), below.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        network = ctx.model.network()
        gradient = [torch.zeros_like(s) for s in ctx.states]
        gradient[-1] = grads[0]
        if len(gradient) > 1:
            gradient[-2] = grads[1]
        how, schedule = ctx.model.input_gradient, ctx.model.schedule
        if how.kind == "ep":
            nudged = replace(schedule, tolerance=0.0, sweeps=how.sweeps)
            lowest, drive = estimate_adjoint(
                network, images, ctx.states, gradient, beta=how.beta, schedule=nudged
            )
        else:
            adjoint, pooled = solve_adjoint(network, images, ctx.states, gradient)
            ctx.model.adjoint_residual = adjoint.residual
            lowest, drive = adjoint.states[0], pooled[0]
        return image_gradient(network, images, lowest, drive), None


class EPCNN(nn.Module):
    """An energy-based convnet whose answer is the fixed point of a relaxation.

    The forward pass relaxes the states of every image from zero and reads the
    logits off the settled state; normalisation happens inside. Gradients flow to
    the images as `input_gradient` says, and to the readout; the convolutions are
    taught by `epdistill.teachers.learning`.

    Args:
        architecture: Shapes, activation, readout, normalisation.
        schedule: The relaxation that defines the answer; part of the model.
        init_scale: Factor on PyTorch's default initialisation U(+-1/sqrt(fan_in)) of the
            convolutions' weights (1 is the published choice); or one per layer and one for
            the readout, where there is one.

    Raises:
        RecipeError: Another number of factors.
    """

    mean: Tensor
    std: Tensor
    stochastic = False

    def __init__(
        self,
        architecture: Architecture,
        schedule: Schedule | None = None,
        *,
        init_scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.schedule = schedule or Schedule()
        self.input_gradient = InputGradient()
        self.adjoint_residual: Tensor | None = None
        below = architecture.in_channels
        self.layers = nn.ModuleList()
        for layer in architecture.layers:
            self.layers.append(
                nn.Conv2d(below, layer.channels, layer.kernel, layer.stride, layer.padding)
            )
            below = layer.channels
        channels, height, width = architecture.shapes[-1]
        self.readout = (
            nn.Linear(channels * height * width, architecture.classes)
            if architecture.readout == "cross-entropy"
            else None
        )
        with torch.no_grad():
            for module, factor in zip(*self._scaled(init_scale), strict=True):
                module.weight.mul_(factor)  # type: ignore[operator]
        shape = (1, architecture.in_channels, 1, 1)
        self.register_buffer("mean", torch.tensor(architecture.mean).view(shape))
        self.register_buffer("std", torch.tensor(architecture.std).view(shape))

    def _scaled(self, scale: float | Sequence[float]) -> tuple[list[nn.Module], list[float]]:
        """Which weights are scaled at the start, and by how much."""
        if isinstance(scale, (int, float)):
            return list(self.layers), [float(scale)] * len(self.layers)
        modules = [*self.layers, *([] if self.readout is None else [self.readout])]
        if len(scale) != len(modules):
            raise RecipeError(
                f"{len(scale)} factors in init_scale for {len(modules)} layers (a linear readout "
                f"is the last); expected 1 or {len(modules)}"
            )
        return modules, list(scale)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(channels, height, width) of every state."""
        return tuple(self.architecture.shapes)

    @property
    def in_channels(self) -> int:
        """Image channels."""
        return self.architecture.in_channels

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.architecture.image_size

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.architecture.classes

    def normalise(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0,1] -> what the energy sees."""
        return (images - self.mean) / self.std

    def network(self) -> Network:
        """The present parameters as the dynamics read them (detached)."""
        weights = [m.weight.detach() for m in self.layers]  # type: ignore[operator]
        return Network(
            self.architecture,
            tuple(w.contiguous(memory_format=torch.channels_last) for w in weights),
            tuple(m.bias.detach() for m in self.layers),  # type: ignore[operator]
            None if self.readout is None else self.readout.weight.detach(),
            None if self.readout is None else self.readout.bias.detach(),
        )

    def relax(self, images: Tensor, schedule: Schedule | None = None) -> Relaxed:
        """The fixed points of images (N, C, H, W) in [0,1], with their certificate."""
        return relax(self.network(), self.normalise(images.detach()), schedule or self.schedule)

    def targets(self, images: Tensor) -> Targets:
        """The fixed points of images (N, C, H, W) in [0,1], and what is read off them."""
        network, x = self.network(), self.normalise(images.detach())
        relaxed = relax(network, x, self.schedule)
        certificate = relaxed.certificate
        settled = certificate.converged
        if self.schedule.tolerance == 0:
            # A fixed number of sweeps promises nothing; every state is the target.
            settled = torch.ones_like(settled)
        logits = network.answer(x, relaxed.states)
        return Targets(relaxed.states, logits, settled, certificate.sweeps)

    def linear_readout(self) -> tuple[Tensor, Tensor]:
        """V (classes, d) and c (classes,), detached, of logits = V vec(s_L) + c.

        A settling output layer is itself the answer: the identity.
        """
        if self.readout is not None:
            return self.readout.weight.detach(), self.readout.bias.detach()
        identity = torch.eye(self.classes).to(self.mean)
        return identity, torch.zeros_like(identity[0])

    def with_gradient(self, kind: GradientKind, sweeps: int = 30, beta: float = 0.1) -> EPCNN:
        """A view of this model (same parameters) with another input gradient."""
        view = copy.copy(self)
        view.input_gradient = InputGradient(kind, sweeps, beta)
        return view

    def with_schedule(self, schedule: Schedule) -> EPCNN:
        """A view of this model (same parameters) that relaxes by another schedule."""
        view = copy.copy(self)
        view.schedule = schedule
        return view

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), float in [0,1] -> logits (N, classes)."""
        x = self.normalise(images)
        if not (torch.is_grad_enabled() and x.requires_grad):
            states = relax(self.network(), x.detach(), self.schedule).states
        elif self.input_gradient.kind in ("implicit", "ep"):
            top, below = _Equilibrium.apply(x, self)
            return self._read(top, below)
        else:
            states = self._unrolled(x)
        return self._read(states[-1], states[-2] if len(states) > 1 else x)

    def _unrolled(self, x: Tensor) -> States:
        schedule = replace(self.schedule, tolerance=0.0, sweeps=self.input_gradient.sweeps)
        start = None
        if self.input_gradient.kind == "unrolled-last":
            start = relax(self.network(), x.detach(), self.schedule).states
        return unrolled(self.network(), x, schedule, start=start)

    def _read(self, top: Tensor, below: Tensor) -> Tensor:
        if self.readout is not None:
            logits: Tensor = self.readout(top.flatten(1))
            return logits
        last = self.layers[-1]
        drive: Tensor = last(below)
        return drive.flatten(1)
