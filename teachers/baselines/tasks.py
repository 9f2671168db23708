"""How each baseline is trained, as tasks of the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from epdistill.data import Split, channels_inside, to_float
from epdistill.distributed import ALONE, Team
from epdistill.recipes import AdversarialRecipe, ConvRecipe, Recipe
from epdistill.robustness.attacks import PGDSettings, pgd_l2, pgd_linf
from epdistill.teachers.baselines.base import Baseline
from epdistill.teachers.baselines.wca import WcaNet
from epdistill.training import Batch, cosine, model_state, restore_model, seed_of

EVALUATION_BATCH = 256
# Of the transformer's cosine, as a share of the full rate.
VIT_FLOOR = 0.01


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators, set from `seed` inside and put back afterwards.

    For randomness that a network or a library draws by itself.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Measured:
    """What a baseline does on a split.

    Attributes:
        accuracy: Share of images answered rightly, each asked once.
        without_noise: The same of the expected logits; None if nothing is random.
    """

    accuracy: float
    without_noise: float | None


@torch.no_grad()
def measure(
    model: Baseline,
    split: Split,
    seed: int,
    *,
    batch_size: int = EVALUATION_BATCH,
    team: Team = ALONE,
) -> Measured:
    """Accuracy on a split, every image once; `seed` fixes a stochastic network's noise.

    A team shares out the batches, but for a stochastic network: its noise is one stream.
    """
    training, device = model.training, model.mean.device
    model.eval()

    def count(start: int) -> tuple[int, int]:
        images = channels_inside(to_float(split.images[start : start + batch_size].to(device)))
        labels = split.labels[start : start + batch_size].to(device)
        right, expected = int((model(images).argmax(1) == labels).sum()), 0
        if model.stochastic:
            expected = int((model.targets(images).logits.argmax(1) == labels).sum())
        return right, expected

    with seeded(seed_of(seed, 2), device):
        sharing = ALONE if model.stochastic else team
        found = sharing.share_out(range(0, len(split), batch_size), count)
    model.train(training)
    right, expected = (sum(part[i] for part in found) for i in range(2))
    return Measured(right / len(split), expected / len(split) if model.stochastic else None)


class BaselineTask(ABC):
    """Descending a loss on augmented images; the subclasses say which, where and how."""

    def __init__(
        self, model: Baseline, recipe: Recipe, validation: Split, team: Team = ALONE
    ) -> None:
        self.model, self.validation, self.team = model, validation, team
        self.seed, self.baselines = recipe.seed, recipe.baselines
        self.optimiser = self.make_optimiser()
        for group in self.optimiser.param_groups:
            group["base"] = group["lr"]
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}

    @abstractmethod
    def make_optimiser(self) -> torch.optim.Optimizer:
        """The optimiser, at the full learning rate."""

    @abstractmethod
    def rate(self, batch: Batch) -> float:
        """The factor on the learning rate at this step."""

    def place(self, batch: Batch, seed: int) -> Tensor:
        """The images (N, C, H, W) in [0,1] that are learnt from; `seed` is this step's own."""
        return batch.images

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is descended, a scalar, from logits (N, K) and labels (N,)."""
        return F.cross_entropy(logits, labels)

    def step(self, batch: Batch) -> dict[str, float]:
        """One update; everything random in it comes from the batch's generator."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * self.rate(batch)
        self.model.train()
        seed = int(torch.randint(2**62, (), generator=batch.generator))
        # Two processes must not draw the same noise for different images.
        own = seed if self.team.first else seed_of(seed, self.team.rank)
        with seeded(own, self.model.mean.device):
            logits = self.model(channels_inside(self.place(batch, seed)))
        loss = self.loss(logits, batch.labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        count = len(batch.labels)
        self.team.average_gradients(self.model.parameters(), count)
        self.optimiser.step()
        self.team.share_buffers(self.model)
        accuracy = (logits.argmax(1) == batch.labels).double().mean()
        return self.team.mean({"loss": float(loss.detach()), "accuracy": float(accuracy)}, count)

    def validate(self) -> dict[str, float]:
        """Accuracy on the validation split."""
        found = measure(self.model, self.validation, self.seed, team=self.team)
        return {"accuracy": found.accuracy}

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and what the optimiser remembers."""
        return model_state(self.model, self.optimiser, self.names)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        restore_model(self.model, self.optimiser, self.names, state)


class ConvTask(BaselineTask):
    """BP-CNN: SGD, its rate multiplied by a factor every few epochs."""

    @property
    def own(self) -> ConvRecipe:
        """Its section of the recipe."""
        return self.baselines.bp_cnn

    def make_optimiser(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        own = self.own
        return torch.optim.SGD(
            self.model.parameters(), own.learning_rate, own.momentum, weight_decay=own.weight_decay
        )

    def rate(self, batch: Batch) -> float:
        """Stepwise, per epoch."""
        return self.own.step_factor ** (batch.epoch // self.own.step_epochs)


class AdversarialTask(ConvTask):
    """Adv-CNN: the same on adversarial images alone (Madry et al., ICLR 2018)."""

    @property
    def own(self) -> AdversarialRecipe:
        """Its section of the recipe."""
        return self.baselines.adv_cnn

    def place(self, batch: Batch, seed: int) -> Tensor:
        """PGD's best iterates, crafted in evaluation mode; checked to be in the ball and [0,1]."""
        own = self.own
        attack = pgd_l2 if own.norm == "l2" else pgd_linf
        settings = PGDSettings(own.steps, random_start=False)
        images, labels = channels_inside(batch.images), batch.labels
        return attack(self.model, images, labels, own.eps, seed=seed, settings=settings)


class VitTask(BaselineTask):
    """The transformer: AutoAugment, smoothed labels, Adam, warm-up and cosine."""

    def make_optimiser(self) -> torch.optim.Optimizer:
        """Adam; its weight decay is added to the gradient."""
        own = self.baselines.vit
        return torch.optim.Adam(
            self.model.parameters(), own.learning_rate, weight_decay=own.weight_decay
        )

    def rate(self, batch: Batch) -> float:
        """Linear warm-up, then a cosine."""
        warm, done = self.baselines.vit.warmup, batch.step / batch.total
        if done < warm:
            return (batch.step + 1) / (warm * batch.total + 1)
        return cosine((done - warm) / (1 - warm), VIT_FLOOR)

    def place(self, batch: Batch, seed: int) -> Tensor:
        """Every image by a policy drawn for it alone (Cubuk et al., CVPR 2019)."""
        own = self.baselines.vit
        if own.auto_augment == "none":
            return batch.images
        augment = AutoAugment(AutoAugmentPolicy(own.auto_augment))
        # The policies come from one stream: every process of a team draws those of the whole batch.
        images = self.team.gather(batch.images, batch.shard)
        pixels = (255 * images).round().to(torch.uint8)
        alone = self.team.size == 1
        with nullcontext() if alone else seeded(seed, self.model.mean.device):
            chosen = torch.stack([augment(image) for image in pixels])
        return to_float(chosen[batch.shard.rows])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels."""
        smoothing = self.baselines.vit.label_smoothing
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)


class WcaTask(BaselineTask):
    """WCA-Net: Adam on the cross-entropy less the log of the noise that reaches the logits."""

    model: WcaNet

    def make_optimiser(self) -> torch.optim.Optimizer:
        """Adam, with weight decay on the two matrices that the penalty would blow up."""
        own, model = self.baselines.wca, self.model
        decayed = [model.head.weight, model.factor]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in decayed)]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": own.weight_decay},
            {"params": others},
        ]
        return torch.optim.Adam(groups, own.learning_rate)

    def rate(self, batch: Batch) -> float:
        """A tenth after every third of the epochs."""
        return 0.1 ** (3 * batch.epoch // batch.epochs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy - ln sum_c w_c^T Sigma w_c."""
        return F.cross_entropy(logits, labels) - self.model.alignment().log()


TASKS: dict[str, type[BaselineTask]] = {
    "bp-cnn": ConvTask,
    "adv-cnn": AdversarialTask,
    "vit": VitTask,
    "wca": WcaTask,
}
