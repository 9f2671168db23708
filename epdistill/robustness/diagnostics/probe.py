"""What the checks share: one subject, its images, and attacks that are run only once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import PGDSettings, pgd_linf
from epdistill.robustness.diagnostics.climbing import Climb, climb, image_gradient
from epdistill.robustness.diagnostics.losses import Objective, log_margin
from epdistill.robustness.diagnostics.settings import DiagnosticSettings
from epdistill.robustness.guards import check_logits, derive_seed
from epdistill.robustness.subjects import Predict, Subject
from epdistill.robustness.units import split

if TYPE_CHECKING:
    from epdistill.teachers.model import EPCNN

# What `white` returns: which images are broken (N,) bool, and the images themselves.
Attacked = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Probe:
    """One subject under examination; everything costly is computed once.

    Attributes:
        subject: What is judged (`predict`) and attacked (`views`).
        images: (N,C,H,W) float32 in [0,1], on the subject's device.
        labels: (N,) int64, on the subject's device.
        settings: Budgets.
        seed: Fixes everything random.
        rivals: Other models whose adversarial examples are tried on this one.
        claimed: The accuracy that an evaluation quotes at `settings.eps`, to be checked.
        draw: A stochastic subject's answer before averaging; None: `predict` itself.
        tried: What each attack broke at `eps`, (N,) bool by name, gathered as checks run.
    """

    subject: Subject
    images: Tensor
    labels: Tensor
    settings: DiagnosticSettings
    seed: int
    rivals: tuple[Subject, ...] = ()
    claimed: float | None = None
    draw: Predict | None = None
    tried: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.images)

    @property
    def views(self) -> Mapping[str, nn.Module]:
        """The subject's gradients by name."""
        return self.subject.views

    @property
    def single(self) -> Predict:
        """One answer as it comes, not averaged over draws."""
        return self.draw or self.subject.predict

    @property
    def stochastic(self) -> bool:
        """Whether the subject is declared to answer at random."""
        return self.subject.stochastic

    @cached_property
    def logits(self) -> Tensor:
        """The answers to the clean images, (N,K) on the CPU."""
        return self.answers(self.images)

    @property
    def classes(self) -> int:
        """The number of classes, K."""
        return self.logits.shape[1]

    @cached_property
    def clean_wrong(self) -> Tensor:
        """Images that are wrong without any attack, (N,) bool on the CPU."""
        return self.logits.argmax(dim=1) != self.labels.cpu()

    @property
    def teacher(self) -> EPCNN | None:
        """The EP-CNN that is judged, if the subject is one."""
        if self.subject.kind != "teacher":
            return None
        from epdistill.teachers.model import EPCNN

        return self.subject.predict if isinstance(self.subject.predict, EPCNN) else None

    def answers(self, images: Tensor) -> Tensor:
        """What `predict` says, (n,K) on the CPU; images (n,C,H,W).

        Raises:
            EvaluationError: It cannot be judged.
        """
        told = []
        with torch.no_grad():
            for part in split(images, self.settings.batch_size):
                logits = check_logits(self.subject.predict(part), len(part))
                told.append(logits.detach().cpu())
        return torch.cat(told) if told else torch.empty(0, self.classes)

    def errs(self, images: Tensor, rows: Tensor) -> Tensor:
        """Whether `predict` errs on variants of the images `rows`: (n,) bool on the CPU."""
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.bool)
        return self.answers(images).argmax(dim=1) != self.labels.cpu()[rows]

    @cached_property
    def broken_views(self) -> dict[str, str]:
        """Views along which no attack can be run, with the reason."""
        reasons: dict[str, str] = {}
        for name, view in self.views.items():
            gradient, _, _ = image_gradient(view, self.images[:1], self.labels[:1], log_margin)
            if not bool(torch.isfinite(gradient).all()):
                reasons[name] = "its gradient is not finite"
        return reasons

    @property
    def live_views(self) -> dict[str, nn.Module]:
        """The views along which attacks run."""
        dead = self.broken_views
        return {name: view for name, view in self.views.items() if name not in dead}

    @property
    def first_view(self) -> nn.Module:
        """The view that single-view checks look at."""
        return next(iter((self.live_views or self.views).values()))

    def pgd(
        self,
        view: str,
        eps: float,
        rows: Tensor,
        *,
        use: str,
        steps: int | None = None,
        restarts: int = 1,
        relative_step: float = 2.5,
        random_start: bool = True,
    ) -> Tensor:
        """PGD on one view: adversarial images (n,C,H,W) for the images `rows`.

        A view whose gradient breaks down on the way gives back the originals, and is
        remembered in `broken_views`.

        Args:
            view: Its name.
            eps: Linf radius.
            rows: (n,) int64, numbers of images.
            use: Separates the random numbers of different uses.
            steps: The reported attack's without it.
            restarts: Independent starts.
            relative_step: Step size in units of `eps / steps`.
            random_start: False starts at the image itself.
        """
        settings = PGDSettings(
            steps=steps or self.settings.steps,
            restarts=restarts,
            relative_step=relative_step,
            random_start=random_start,
        )
        found = self.images[rows].clone()
        if view in self.broken_views:
            return found
        seed = derive_seed(self.seed, "diagnosis", use, view, eps)
        for part in split(torch.arange(len(rows)), self.settings.batch_size):
            chosen = rows[part]
            try:
                found[part] = pgd_linf(
                    self.views[view],
                    self.images[chosen],
                    self.labels[chosen],
                    eps,
                    seed=seed,
                    settings=settings,
                    index=chosen,
                )
            except EvaluationError as error:
                self.broken_views[view] = str(error)
                return found
        return found

    def white(self, eps: float, rows: Tensor, craft: Callable[[str, Tensor], Tensor]) -> Attacked:
        """Attack view after view what is not broken yet.

        Args:
            eps: Linf radius; 0 attacks nothing.
            rows: (n,) int64: the images to attack.
            craft: View name and images' numbers to adversarial images.

        Returns:
            Which of all N images are broken (never those outside `rows`), and all N images,
            adversarial where an attack was run.
        """
        broken = torch.zeros(self.n, dtype=torch.bool)
        images = self.images.clone()
        if eps == 0:
            return broken, images
        for view in self.views:
            left = rows[~broken[rows]]
            if len(left) == 0:
                break
            found = craft(view, left)
            images[left] = found
            broken[left] = self.errs(found, left)
        return broken, images

    @cached_property
    def curve(self) -> dict[float, Attacked]:
        """The reported attack with one start, at every radius of the grid on its own.

        An image broken at a smaller radius is not counted as broken at a larger one: whether
        it is, is what check 13 looks at. Images wrong when clean are broken throughout.
        """
        return {eps: self.attack_all(eps) for eps in self.settings.grid}

    def attack_all(self, eps: float) -> Attacked:
        """PGD with one start at one radius, view after view, on all that is right."""
        right = (~self.clean_wrong).nonzero().flatten()
        broken, images = self.white(
            eps, right, lambda view, rows: self.pgd(view, eps, rows, use="reported")
        )
        return broken | self.clean_wrong, images

    @cached_property
    def once(self) -> Attacked:
        """PGD with one start at `eps`: broken (clean errors included), and the images."""
        return self.curve[self.eps] if self.eps in self.curve else self.attack_all(self.eps)

    @cached_property
    def eps(self) -> float:
        """The radius at which attacks are compared (see `DiagnosticSettings.eps`)."""
        if self.settings.eps is not None:
            return self.settings.eps
        half = float((~self.clean_wrong).double().mean()) / 2
        left = {eps: float((~broken).double().mean()) for eps, (broken, _) in self.curve.items()}
        # Of equals the larger: a model that nothing breaks is looked at where it hurts most.
        return min(left, key=lambda eps: (abs(left[eps] - half), -eps))

    @cached_property
    def reported(self) -> Attacked:
        """The reported attack at `eps`: broken (clean errors included), and the images.

        What `once` left is attacked from the other starts.
        """
        broken, images = self.once
        left, more = (~broken).nonzero().flatten(), self.settings.starts - 1
        if more == 0 or len(left) == 0:
            return broken, images
        found, moved = self.white(
            self.eps,
            left,
            lambda view, rows: self.pgd(view, self.eps, rows, use="other starts", restarts=more),
        )
        hit = found.to(images.device)[:, None, None, None]
        return broken | found, torch.where(hit, moved, images)

    @cached_property
    def unbounded(self) -> Tensor:
        """What PGD breaks at eps = 1, clean errors included: (N,) bool."""
        right = (~self.clean_wrong).nonzero().flatten()
        steps = self.settings.unbounded_steps
        found, _ = self.white(
            1.0, right, lambda view, rows: self.pgd(view, 1.0, rows, use="wide", steps=steps)
        )
        return found | self.clean_wrong

    @property
    def survivors(self) -> Tensor:
        """Numbers of the images that withstood the reported attack, (n,) int64."""
        return (~self.reported[0]).nonzero().flatten()

    def beats(self, name: str, broken: Tensor) -> int:
        """Remember what an attack broke at `eps`, and count what the reported one did not."""
        self.tried[name] = self.tried.get(name, torch.zeros_like(broken)) | broken
        return int((broken & ~self.reported[0]).sum())

    def climb(self, view: nn.Module, rows: Tensor, objective: Objective) -> Climb:
        """A recorded ascent at `eps` on some images, in one batch."""
        return climb(
            view,
            self.images[rows],
            self.labels[rows],
            self.eps,
            objective,
            steps=self.settings.objective_steps,
        )

    @property
    def worst(self) -> Tensor:
        """Images broken by anything tried at `eps`, (N,) bool."""
        broken = self.reported[0].clone()
        for found in self.tried.values():
            broken |= found
        return broken
