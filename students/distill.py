"""Distilling: a student trained on a teacher's answers, or as a control without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from epdistill.data import DataSet, Split, to_float
from epdistill.distributed import ALONE, Team
from epdistill.errors import RecipeError
from epdistill.recipes import Recipe
from epdistill.recipes.schema import StudentRecipe
from epdistill.students.cache import ViewCache
from epdistill.students.fidelity import measure
from epdistill.students.inputs import climb, corrupted, noisy
from epdistill.students.matching import Loss, Matching, matching_loss
from epdistill.students.model import Student
from epdistill.students.pretrained import start_from
from epdistill.students.spec import Goal, StudentSpec
from epdistill.teachers.model import EPCNN
from epdistill.teachers.targets import Targets, Teacher
from epdistill.training import Batch, cosine, model_state, restore_model, seed_of

LOOKED_AT = 16
# A loose tolerance is reached early: it is looked for often, and after a short coarse phase.
CHECK_EVERY, COARSE = 5, 10


def hurried(teacher: Teacher, tolerance: float | None) -> Teacher:
    """The teacher as a step of training asks it: stopping at this residual.

    Start, order, omega and precision stay, so it heads for the same equilibria. A teacher
    that does not relax, or a tolerance below its own, is left as it is.
    """
    if tolerance is None or not isinstance(teacher, EPCNN):
        return teacher
    own = teacher.schedule
    if tolerance <= own.tolerance:
        return teacher
    return teacher.with_schedule(
        own.with_(
            tolerance=tolerance,
            check_every=min(own.check_every, CHECK_EVERY),
            coarse=min(own.coarse, COARSE),
        )
    )


def spec_for(recipe: StudentRecipe, teacher: Teacher) -> StudentSpec:
    """What a recipe asks for of a teacher's student.

    Raises:
        RecipeError: A frozen readout of a teacher that has none.
    """
    distilled = recipe.loss == "distill"
    match = recipe.match if distilled else "logits"
    readout = recipe.readout
    if readout is None:
        linear = match != "logits" and teacher.linear_readout() is not None
        readout = "frozen" if linear else "learned"
    elif readout == "frozen" and teacher.linear_readout() is None:
        raise RecipeError(
            "readout frozen, but this teacher's answer is no linear function of its last state; "
            "expected readout learned"
        )
    bounded = match == "states" and recipe.distance == "bce"
    goal = Goal.of(teacher)
    return StudentSpec(recipe.name, recipe.width, goal, recipe.stages, match, bounded, readout)


def build_student(recipe: Recipe, teacher: Teacher) -> Student:
    """A fresh student of a teacher; the same seed gives the same weights.

    Raises:
        RecipeError: The student's name or a stage is unknown, its backbone cannot take the
            images, or the pretrained file does not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, 1))
        student = Student(spec_for(recipe.student, teacher))
    if recipe.student.pretrained is not None:
        start_from(student.backbone, Path(recipe.student.pretrained))
    readout = teacher.linear_readout()
    if student.spec.readout == "frozen" and readout is not None:
        student.take_readout(*readout)
    return student


def check(recipe: StudentRecipe, teacher: Teacher, data: DataSet) -> None:
    """Refuse what could only fail later.

    Raises:
        RecipeError: Teacher and data differ in channels, size or classes; a corruption is
            unknown; a distance does not suit the teacher's states; or views are to be cached
            that depend on the student.
    """
    from epdistill.robustness.corruptions import check_corruption

    theirs = (teacher.in_channels, teacher.image_size, teacher.classes)
    ours = (data.channels, data.image_size, len(data.classes))
    for what, expected, found in zip(
        ("image channels", "pixels a side", "classes"), theirs, ours, strict=True
    ):
        if expected != found:
            raise RecipeError(
                f"the data set {data.name} has {found} {what}, the teacher {expected}; expected "
                "the data that the teacher was taught on"
            )
    for name in recipe.corruptions:
        check_corruption(name, 1)
    if recipe.loss == "ce":
        if recipe.cached_views:
            raise RecipeError(
                f"cached_views = {recipe.cached_views} with loss ce, which asks no teacher; "
                "expected 0"
            )
        return
    if recipe.cached_views and recipe.inputs == "adversarial" and recipe.targets != "clean":
        raise RecipeError(
            f"cached_views = {recipe.cached_views} with adversarial inputs, which change with the "
            "student; expected targets = clean, or no cache"
        )
    if recipe.distance == "bce" and recipe.match == "states":
        images = to_float(data.train.images[:LOOKED_AT]).to(teacher.mean.device)
        states = teacher.targets(images).states[:-1]
        low = min((float(s.min()) for s in states), default=0.0)
        high = max((float(s.max()) for s in states), default=1.0)
        if low < 0 or high > 1:
            raise RecipeError(
                f"distance bce, but this teacher's states reach from {low:.3g} to {high:.3g}; "
                "expected states in [0,1]: choose distance mse or cosine"
            )


def cache_for(
    recipe: StudentRecipe, student: Student, teacher: Teacher, data: DataSet, folder: Path
) -> ViewCache | None:
    """The cache that a recipe asks for, in a run's folder; None if the teacher is online.

    Raises:
        DiskError: The disk has no room for it.
    """
    if recipe.cached_views == 0:
        return None
    device, asked = teacher.mean.device, hurried(teacher, recipe.teacher_tolerance)
    return ViewCache(
        folder,
        views=recipe.cached_views,
        images=len(data.train),
        image=(data.channels, data.image_size, data.image_size),
        states=student.targets,
        classes=teacher.classes,
        teacher=lambda images: asked.targets(images.to(device)),
    )


class _Learnt(NamedTuple):
    """A step's loss, the mean over its images; its parts, means over the settled ones; the rest."""

    loss: Tensor
    settled: int
    parts: dict[str, float]
    values: dict[str, float]


class DistillTask:
    """A student's training as a task of the training loop.

    Args:
        student: What learns.
        teacher: Asked in every step, unless `cache` answers.
        recipe: Losses, inputs, rates.
        validation: What is measured after each epoch.
        cache: Answers to replayed views.
        team: The processes that share out every batch.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        recipe: Recipe,
        validation: Split,
        cache: ViewCache | None = None,
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.student, self.validation = student, validation
        self.recipe, self.cache = recipe.student, cache
        self.teacher = hurried(teacher, self.recipe.teacher_tolerance)
        self.matching = Matching(
            self.recipe.distance,
            self.recipe.state_weight,
            self.recipe.logit_weight,
            self.recipe.temperature,
        )
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

    def _place(self, images: Tensor, batch: Batch) -> Tensor:
        """A batch's images as both sides see them, but for adversarial steps."""
        generator, shard = batch.generator, batch.shard
        if self.recipe.inputs == "corruption":
            # A type is drawn per quarter of the batch and may draw what it likes: the whole
            # batch is corrupted in every process.
            whole = self.team.gather(images, shard)
            return corrupted(whole, self.recipe.corruptions, generator)[shard.rows]
        return noisy(images, self.recipe.inputs, self.recipe.noise_std, generator, shard)

    def _ask(self, batch: Batch) -> tuple[Tensor, Targets]:
        """The placed images, and the teacher's answer to them or to the clean ones."""
        clean = self.recipe.targets == "clean"

        def asked(places: Tensor | slice = slice(None)) -> Tensor:
            seen = batch.images if clean else self._place(batch.images, batch)
            return seen[places]

        if self.cache is None:
            images = asked()
            goal = self.teacher.targets(images)
        else:
            images, goal = self.cache.fetch(batch.epoch % self.cache.views, batch.index, asked)
            device = batch.images.device
            states = [state.to(device) for state in goal.states]
            settled, logits = goal.settled.to(device), goal.logits.to(device)
            images, goal = images.to(device), Targets(states, logits, settled, goal.sweeps)
        return (self._place(images, batch) if clean else images), goal

    def _search(self, loss: Callable[[Tensor], Tensor], images: Tensor, batch: Batch) -> Tensor:
        """Where the loss of the student, in eval mode, is largest around the images."""
        own = self.recipe
        self.student.eval()
        found = climb(
            loss,
            images,
            own.adversarial_norm,
            own.adversarial_eps,
            own.adversarial_steps,
            batch.generator,
            batch.shard,
        )
        self.student.train()
        return found

    def step(self, batch: Batch) -> dict[str, float]:
        """One update towards the teacher's answers to this very batch, or towards the labels."""
        self._set_rate(batch)
        self.student.train()
        # What layers draw for themselves (dropout, stochastic depth, a stochastic teacher).
        devices = [batch.images.device] if batch.images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            drawn = int(torch.randint(2**62, (), generator=batch.generator))
            # Two processes must not draw the same noise for different images.
            torch.manual_seed(drawn if self.team.first else seed_of(drawn, self.team.rank))
            supervised = self.recipe.loss == "ce"
            learnt = self._supervised(batch) if supervised else self._distilled(batch)
            self.optimiser.zero_grad(set_to_none=True)
            learnt.loss.backward()  # type: ignore[no-untyped-call]
        # The clip is for the gradient of the global batch.
        self.team.average_gradients(self.student.parameters(), len(batch.labels))
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.gradient_clip)
        self.optimiser.step()
        self.team.share_buffers(self.student)
        values = {"loss": float(learnt.loss.detach()), **learnt.values}
        over_all = self.team.mean(values, len(batch.labels))
        loss = over_all.pop("loss")
        return {"loss": loss, **self.team.mean(learnt.parts, learnt.settled), **over_all}

    def _supervised(self, batch: Batch) -> _Learnt:
        images, labels = self._place(batch.images, batch), batch.labels
        if self.recipe.inputs == "adversarial":
            images = self._search(lambda x: F.cross_entropy(self.student(x), labels), images, batch)
        logits = self.student(images)
        loss = self._label_loss(logits, labels)
        return _Learnt(
            loss, 0, {}, {"accuracy": float((logits.argmax(1) == labels).double().mean())}
        )

    def _distilled(self, batch: Batch) -> _Learnt:
        images, goal = self._ask(batch)
        spent = [goal.sweeps]
        if self.recipe.inputs == "adversarial":
            # The teacher's answer is held while the student is searched.
            images = self._search(lambda x: self._loss(x, goal)[0].total, images, batch)
            if self.recipe.targets == "there":
                goal = self.teacher.targets(images)
                spent.append(goal.sweeps)
        loss, logits = self._loss(images, goal)
        settled = int(goal.settled.sum())
        total = loss.total
        if self.team.size > 1:
            # It is a mean over settled images, and processes are weighted by all of theirs.
            everywhere = max(int(self.team.sum(torch.tensor(settled))), 1)
            total = total * (settled / everywhere * batch.shard.count / len(batch.labels))
        if self.recipe.label_weight:
            total = total + self.recipe.label_weight * self._label_loss(logits, batch.labels)
        parts = {"states": float(loss.states), "kl": float(loss.logits)}
        values = {
            "accuracy": float((logits.argmax(1) == batch.labels).double().mean()),
            "settled": float(goal.settled.double().mean()),
        }
        sweeps = [float(s.double().mean()) for s in spent if s is not None]
        if sweeps:
            values["sweeps"] = sum(sweeps)
        return _Learnt(total, settled, parts, values)

    def _label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)

    def _loss(self, images: Tensor, goal: Targets) -> tuple[Loss, Tensor]:
        landed, logits = self.student.match(images)
        states = goal.states[len(goal.states) - len(landed) :]
        theirs = [state.to(logits.dtype) for state in states]
        loss = matching_loss(
            landed,
            logits,
            theirs,
            goal.logits.to(logits.dtype),
            goal.settled,
            self.matching,
            self.team,
        )
        return loss, logits

    def validate(self) -> dict[str, float]:
        """Accuracy, agreement and mean R^2 on the validation split."""
        found = measure(self.student, self.teacher, self.validation, team=self.team)
        values = {"accuracy": found.accuracy, "agreement": found.agreement}
        return values if found.mean_r2 is None else {**values, "r2": found.mean_r2}

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and momentum, and which views are cached."""
        state = model_state(self.student, self.optimiser, self.names)
        return state if self.cache is None else {**state, "cache.filled": self.cache.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        restore_model(self.student, self.optimiser, self.names, state)
        if self.cache is not None:
            self.cache.restore(state["cache.filled"])
