"""Distilling: a student trained online on a teacher's fixed points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epdistill.data import Split, to_float
from epdistill.recipes import Recipe
from epdistill.students.matching import matching_loss, place
from epdistill.students.model import Student, StudentSpec
from epdistill.teachers.model import EPCNN
from epdistill.training import Batch, cosine, model_state, restore_model, seed_of

EVALUATION_BATCH = 256


def build_student(recipe: Recipe, teacher: EPCNN) -> Student:
    """A freshly initialised student of a teacher; the same seed gives the same weights.

    Raises:
        RecipeError: The student's name is unknown.
    """
    spec = StudentSpec(recipe.student.name, recipe.student.width, teacher.architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, 1))
        student = Student(spec)
    if teacher.readout is not None:
        student.take_readout(teacher.readout.weight.detach(), teacher.readout.bias.detach())
    else:
        # The settled output layer is itself the answer.
        student.take_readout(torch.eye(teacher.architecture.classes), torch.zeros(()))
    return student


@dataclass(frozen=True)
class Fidelity:
    """How a student stands to its teacher on a split.

    Attributes:
        accuracy: Share of images the student answers rightly.
        agreement: Share of images on which student and teacher give the same label.
        r2: Per layer, 1 - MSE / Var of the teacher's fixed points.
    """

    accuracy: float
    agreement: float
    r2: tuple[float, ...]


@torch.no_grad()
def measure(
    student: Student, teacher: EPCNN, split: Split, *, batch_size: int = EVALUATION_BATCH
) -> Fidelity:
    """Accuracy, agreement and per-layer R^2 on a split, every image once."""
    training = student.training
    student.eval()
    right = same = 0
    depth = len(teacher.architecture.layers)
    squares, sums, errors, counts = ([0.0] * depth for _ in range(4))
    network = teacher.network()
    device = teacher.mean.device
    for start in range(0, len(split), batch_size):
        images = to_float(split.images[start : start + batch_size].to(device))
        labels = split.labels[start : start + batch_size].to(device)
        states = teacher.relax(images).states
        theirs = network.answer(teacher.normalise(images), states).argmax(1)
        landed, logits = student.match(images)
        ours = logits.argmax(1)
        right += int((ours == labels).sum())
        same += int((ours == theirs).sum())
        for n, (goal, got) in enumerate(zip(states, landed, strict=True)):
            squares[n] += float(goal.double().square().sum())
            sums[n] += float(goal.double().sum())
            errors[n] += float((got - goal).double().square().sum())
            counts[n] += goal.numel()
    student.train(training)
    r2 = []
    for square, total, error, count in zip(squares, sums, errors, counts, strict=True):
        variance = square - total * total / count
        r2.append(1 - error / variance if variance > 0 else float(error == 0))
    return Fidelity(right / len(split), same / len(split), tuple(r2))


class DistillTask:
    """Fixed-point matching as a task of the training loop."""

    def __init__(self, student: Student, teacher: EPCNN, recipe: Recipe, validation: Split) -> None:
        self.student, self.teacher, self.validation = student, teacher, validation
        self.recipe = recipe.student
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in student.parameters() if p.ndim > 1],
                "weight_decay": self.recipe.weight_decay,
            },
            {"params": [p for p in student.parameters() if p.ndim <= 1]},
        ]
        self.optimiser = torch.optim.SGD(
            groups,
            lr=self.recipe.learning_rate,
            momentum=self.recipe.momentum,
            nesterov=self.recipe.momentum > 0,
        )
        self.names: dict[Tensor, str] = {p: name for name, p in student.named_parameters()}

    def _set_rate(self, batch: Batch) -> None:
        warm = self.recipe.warmup
        done = batch.step / batch.total
        if done < warm:
            factor = (batch.step + 1) / (warm * batch.total + 1)
        else:
            factor = cosine((done - warm) / (1 - warm))
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate * min(factor, 1.0)

    def step(self, batch: Batch) -> dict[str, float]:
        """One update towards the fixed points of this very batch."""
        self._set_rate(batch)
        self.student.train()
        images = place(batch.images, self.recipe.inputs, self.recipe.noise_std, batch.generator)
        relaxed = self.teacher.relax(images)
        teacher_logits = self.teacher.network().answer(
            self.teacher.normalise(images), relaxed.states
        )
        settled = relaxed.certificate.converged
        if self.teacher.schedule.tolerance == 0:
            # A fixed number of sweeps promises nothing; every state is the target.
            settled = torch.ones_like(settled)
        landed, logits = self.student.match(images)
        loss = matching_loss(
            landed,
            logits,
            relaxed.states,
            teacher_logits,
            settled,
            state_weight=self.recipe.state_weight,
            logit_weight=self.recipe.logit_weight,
        )
        self.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.gradient_clip)
        self.optimiser.step()
        return {
            "loss": float(loss.total.detach()),
            "states": float(loss.states),
            "kl": float(loss.logits),
            "accuracy": float((logits.argmax(1) == batch.labels).double().mean()),
            "sweeps": float(relaxed.certificate.sweeps.double().mean()),
            "settled": float(settled.double().mean()),
        }

    def validate(self) -> dict[str, float]:
        """Accuracy, agreement and mean R^2 on the validation split."""
        found = measure(self.student, self.teacher, self.validation)
        mean_r2 = sum(found.r2) / len(found.r2)
        return {"accuracy": found.accuracy, "agreement": found.agreement, "r2": mean_r2}

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and momentum."""
        return model_state(self.student, self.optimiser, self.names)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        restore_model(self.student, self.optimiser, self.names, state)
