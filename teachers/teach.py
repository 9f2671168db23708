"""Teaching: an EP-CNN trained by Equilibrium Propagation on a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from epdistill.data import DataSet, Split, to_float
from epdistill.distributed import ALONE, Team
from epdistill.errors import DivergedError, RecipeError
from epdistill.recipes import Recipe
from epdistill.teachers.architecture import Architecture, LayerSpec, layers_for
from epdistill.teachers.health import Watch
from epdistill.teachers.learning import Gradients, Step, ep_step
from epdistill.teachers.model import EPCNN
from epdistill.teachers.rules import bptt_step, implicit_step
from epdistill.teachers.schedule import Schedule
from epdistill.training import Batch, cosine, model_state, restore_model, seed_of

EVALUATION_BATCH = 256
GOOD_EVERY = 50


def architecture_for(recipe: Recipe, data: DataSet) -> Architecture:
    """The architecture that a recipe asks for on a data set.

    Raises:
        RecipeError: The channels do not fit the image size, or mean/std the image channels.
    """
    teacher = recipe.teacher
    if teacher.layers is not None:
        layers = tuple(LayerSpec(**layer.model_dump()) for layer in teacher.layers)
    else:
        layers = layers_for(data.image_size, width=teacher.width, channels=teacher.channels)
    if teacher.readout == "mse":
        size = data.image_size
        for layer in layers:
            size = layer.out_size(size)
        layers = (*layers, LayerSpec(len(data.classes), max(size, 1), padding=0, pool="none"))
    mean = teacher.mean or data.mean
    std = tuple(value * teacher.std_scale for value in teacher.std or data.std)
    return Architecture(
        in_channels=data.channels,
        image_size=data.image_size,
        layers=layers,
        classes=len(data.classes),
        mean=tuple(mean),
        std=std,
        activation=teacher.activation,
        readout=teacher.readout,
    )


def build_teacher(recipe: Recipe, data: DataSet) -> EPCNN:
    """A freshly initialised EP-CNN; the same seed gives the same weights."""
    teacher = recipe.teacher
    schedule = Schedule(
        kind=teacher.schedule,
        omega=teacher.omega if teacher.schedule == "red-black" else 1.0,
        tolerance=teacher.tolerance,
        sweeps=teacher.sweeps,
        check_every=teacher.check_every,
        precision="mixed" if recipe.precision == "bfloat16" else "full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, 0))
        return EPCNN(architecture_for(recipe, data), schedule, init_scale=teacher.init_scale)


@dataclass(frozen=True)
class Accuracy:
    """What a relaxed classifier does on a split.

    Attributes:
        accuracy: Share of images answered rightly.
        sweeps: Mean sweeps per image.
        converged: Share of images settled to the schedule's tolerance.
        residual: Largest residual of any image.
    """

    accuracy: float
    sweeps: float
    converged: float
    residual: float


@torch.no_grad()
def measure(
    model: EPCNN, split: Split, *, batch_size: int = EVALUATION_BATCH, team: Team = ALONE
) -> Accuracy:
    """Accuracy and settling of a teacher on a split, every image once; batches are shared out."""
    device = model.mean.device
    network = model.network()

    def count(start: int) -> tuple[int, int, int, float]:
        images = to_float(split.images[start : start + batch_size].to(device)).to(model.mean.dtype)
        labels = split.labels[start : start + batch_size].to(device)
        relaxed = model.relax(images)
        logits = network.answer(model.normalise(images), relaxed.states)
        certificate = relaxed.certificate
        right = int((logits.argmax(1) == labels).sum())
        settled = int(certificate.converged.sum())
        return right, int(certificate.sweeps.sum()), settled, float(certificate.residual.max())

    found = team.share_out(range(0, len(split), batch_size), count)
    right, sweeps, converged = (sum(part[i] for part in found) for i in range(3))
    worst, n = max((part[3] for part in found), default=0.0), len(split)
    return Accuracy(right / n, sweeps / n, converged / n, worst)


class TeachTask:
    """Teaching an EP-CNN, by EP or another rule, as a task of the training loop."""

    def __init__(
        self,
        model: EPCNN,
        recipe: Recipe,
        validation: Split,
        tell: Callable[[str], None] = lambda _: None,
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.model, self.recipe, self.validation = model, recipe.teacher, validation
        teacher = recipe.teacher
        self.free = model.schedule.with_(
            sweeps=teacher.teach_sweeps or teacher.sweeps,
            tolerance=model.schedule.tolerance
            if teacher.teach_tolerance is None
            else teacher.teach_tolerance,
        )
        self.nudged = model.schedule.with_(
            sweeps=teacher.nudged_sweeps,
            tolerance=teacher.nudged_tolerance,
            omega=teacher.nudged_omega or model.schedule.omega,
        )
        modules = [*model.layers, *([model.readout] if model.readout is not None else [])]
        rates = teacher.learning_rates
        if len(rates) == 1:
            rates = rates * len(modules)
        if len(rates) != len(modules):
            raise RecipeError(
                f"{len(rates)} learning rates for {len(modules)} layers (the readout is the last); "
                f"expected 1 or {len(modules)}"
            )
        groups = [
            {"params": list(module.parameters()), "lr": rate, "base": rate}
            for module, rate in zip(modules, rates, strict=True)
        ]
        self.optimiser = torch.optim.SGD(
            groups, lr=rates[0], momentum=teacher.momentum, weight_decay=teacher.weight_decay
        )
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.tell = tell
        self.watch = Watch()
        self.good: dict[str, Tensor] | None = None
        self.backed_off = torch.zeros((), dtype=torch.int64)

    def _set_rates(self, batch: Batch) -> None:
        # Per epoch, as published; beyond `cosine_epochs` the rate stays at the floor.
        length = self.recipe.cosine_epochs or batch.epochs
        factor = 0.5 ** int(self.backed_off)
        for group in self.optimiser.param_groups:
            floor = self.recipe.min_learning_rate / group["base"]
            share = batch.step / batch.total * batch.epochs / length
            group["lr"] = factor * group["base"] * cosine(share, min(floor, 1.0))

    def _assign(self, gradients: Gradients) -> None:
        for module, weight, bias in zip(
            self.model.layers, gradients.weights, gradients.biases, strict=True
        ):
            module.weight.grad, module.bias.grad = weight, bias
        if self.model.readout is not None:
            self.model.readout.weight.grad = gradients.readout_weight
            self.model.readout.bias.grad = gradients.readout_bias

    def step(self, batch: Batch) -> dict[str, float]:
        """One update by the recipe's rule."""
        self._set_rates(batch)
        result = self._learn(batch)
        troubles = self.watch.look(result)
        for trouble in troubles:
            self.tell(f"step {batch.step + 1}: {trouble.name}: {trouble.message}")
        # What one process cannot trust, none may use.
        if self.team.any(any(trouble.fatal for trouble in troubles)):
            reason = troubles[0].message if troubles else "not finite in another process"
            self._step_back(batch, reason)
        else:
            self._assign(result.gradients)
            self.team.average_gradients(self.model.parameters(), len(batch.labels))
            self.optimiser.step()
            if self.recipe.back_off and batch.step % GOOD_EVERY == 0:
                self.good = {name: value.clone() for name, value in self._present().items()}
        certificate = result.free.certificate
        loss = torch.nn.functional.cross_entropy(result.logits, batch.labels)
        measured = {
            "loss": loss,
            "accuracy": (result.logits.argmax(1) == batch.labels).double().mean(),
            "sweeps": certificate.sweeps.double().mean(),
            "residual": certificate.residual.max(),
            "converged": certificate.converged.double().mean(),
        }
        if result.tipped is not None:
            measured["tipped"] = result.tipped.double().mean()
        found = torch.stack([value.double() for value in measured.values()]).tolist()
        values = dict(zip(measured, found, strict=True))
        # The loss of a step that was taken back says nothing; a mean must stay finite.
        finite = {k: v if isfinite(v) else 0.0 for k, v in values.items()}
        return self.team.mean(finite, len(batch.labels))

    def _learn(self, batch: Batch) -> Step:
        images = self.model.normalise(batch.images)
        network, recipe = self.model.network(), self.recipe
        if recipe.rule == "implicit":
            return implicit_step(network, images, batch.labels, free=self.free)
        if recipe.rule == "bptt":
            sweeps = recipe.nudged_sweeps
            return bptt_step(network, images, batch.labels, free=self.free, sweeps=sweeps)
        sign = 1 if float(torch.rand((), generator=batch.generator)) < 0.5 else -1
        return ep_step(
            network,
            images,
            batch.labels,
            beta=recipe.beta,
            free=self.free,
            nudged=self.nudged,
            estimator=recipe.estimator,
            sign=sign,
            bounded=self.model.schedule.kind == "red-black",
            treat_tipped=recipe.tipped,
            team=self.team,
        )

    def _step_back(self, batch: Batch, reason: str) -> None:
        """Return to the last good state with halved learning rates, or stop."""
        if int(self.backed_off) >= self.recipe.back_off or self.good is None:
            raise DivergedError(
                f"training diverged at step {batch.step + 1}: {reason}; the last checkpoint is "
                "kept (back_off in the recipe retries by itself)"
            )
        count = self.backed_off + 1
        self._return_to(self.good)
        self.backed_off = count
        self.tell(
            f"step {batch.step + 1}: back to the last good state, learning rates now "
            f"{0.5 ** int(count):g} of the recipe's"
        )

    def validate(self) -> dict[str, float]:
        """Accuracy, sweeps and settling on the validation split."""
        found = measure(self.model, self.validation, team=self.team)
        return {
            "accuracy": found.accuracy,
            "sweeps": found.sweeps,
            "converged": found.converged,
        }

    def _present(self) -> dict[str, Tensor]:
        learnt = model_state(self.model, self.optimiser, self.names)
        return {**learnt, "backed_off": self.backed_off}

    def _return_to(self, state: Mapping[str, Tensor]) -> None:
        restore_model(self.model, self.optimiser, self.names, state)
        self.backed_off = state["backed_off"].clone()

    def state(self) -> dict[str, Tensor]:
        """Weights, momentum, and the last good state if there may be a way back to it."""
        good = {f"good.{name}": value for name, value in (self.good or {}).items()}
        return {**self._present(), **good}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._return_to(state)
        good = {n.removeprefix("good."): v for n, v in state.items() if n.startswith("good.")}
        self.good = good or None
