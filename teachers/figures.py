"""What is told of every teacher beside its own accuracy: size, cost, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from epdistill.recipes import EP_CNN, Recipe
from epdistill.teachers.captured import unrecorded

# Clean test accuracies printed beside the EP-CNN's (on CIFAR-10 and CIFAR-100; the two
# adversarial rows are l2 .5 and 1). None was found for the WCA-Net in this protocol.
PUBLISHED_CLEAN = {
    "ep-cnn": (0.88, 0.64),
    "bp-cnn": (0.88, 0.67),
    "adv-cnn l2 0.5": (0.82, 0.62),
    "adv-cnn l2 1": (0.74, 0.56),
    "vit": (0.85, 0.59),
}


def parameters(model: nn.Module) -> int:
    """How many numbers are learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations per image of one answer, a multiplication and an addition each.

    Counted are convolutions and matrix products, as `torch.utils.flop_counter` does. A model
    that relaxes spends what these very images need to settle.

    Args:
        model: Images in [0,1] to logits.
        images: (N, C, H, W), on the model's device.
    """
    training = model.training
    model.eval()
    with unrecorded(), FlopCounterMode(display=False) as counter:
        model(images)
    model.train(training)
    return float(counter.get_total_flops() / len(images))


def published_accuracy(recipe: Recipe) -> dict[str, float]:
    """Published clean test accuracy of the recipe's teacher at full size, by data set."""
    name = published_name(recipe.model_dump(mode="json"))
    if name not in PUBLISHED_CLEAN:
        return {}
    return dict(zip(("cifar10", "cifar100"), PUBLISHED_CLEAN[name], strict=True))


def published_name(recipe: Mapping[str, Any]) -> str | None:
    """What a recipe's teacher is called where figures were published; None for an EP-CNN's twins.

    Args:
        recipe: As a run keeps it; older ones name no model and no rule.
    """
    name = str(recipe.get("model", EP_CNN))
    if name == EP_CNN:
        return name if recipe["teacher"].get("rule", "ep") == "ep" else None
    if name == "adv-cnn":
        own = recipe["baselines"]["adv_cnn"]
        return f"{name} {own['norm']} {own['eps']:g}"
    return name
