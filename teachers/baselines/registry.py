"""The baselines by name, and how each is built from a recipe or from a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from epdistill.data import DataSet
from epdistill.recipes import Recipe
from epdistill.teachers.baselines.base import Baseline, ImageSpec
from epdistill.teachers.baselines.convnet import ConvNet
from epdistill.teachers.baselines.vit import ViT
from epdistill.teachers.baselines.wca import WcaNet
from epdistill.teachers.teach import architecture_for
from epdistill.training import seed_of

KINDS: dict[str, type[Baseline]] = {
    "bp-cnn": ConvNet,
    "adv-cnn": ConvNet,
    "vit": ViT,
    "wca": WcaNet,
}

# Length of the features that a WCA-Net's noise is added to, in the paper.
FEW_CLASSES, FEW_FEATURES, MANY_FEATURES = 10, 32, 256


def build_baseline(recipe: Recipe, data: DataSet) -> Baseline:
    """The freshly initialised network `recipe.model`; the same seed gives the same weights.

    Raises:
        RecipeError: It cannot take images of this size, or the recipe does not fit them.
    """
    teacher, baselines = recipe.teacher, recipe.baselines
    mean, std = teacher.mean or data.mean, teacher.std or data.std
    name = recipe.model
    shape: dict[str, Any]
    if name in ("bp-cnn", "adv-cnn"):
        own = baselines.bp_cnn if name == "bp-cnn" else baselines.adv_cnn
        std = tuple(value * own.std_scale for value in std)
        # The EP-CNN's convolutions; its settling output layer, if any, is no part of them.
        plain = teacher.model_copy(update={"readout": "cross-entropy"})
        architecture = architecture_for(recipe.model_copy(update={"teacher": plain}), data)
        shape = {"layers": [asdict(layer) for layer in architecture.layers]}
    elif name == "vit":
        shape = baselines.vit.model_dump(include={"patch", "width", "depth", "heads", "hidden"})
    else:
        wca = baselines.wca
        usual = FEW_FEATURES if len(data.classes) <= FEW_CLASSES else MANY_FEATURES
        shape = {"width": wca.width, "features": wca.features or usual}
    images = ImageSpec(data.channels, data.image_size, len(data.classes), mean, std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, 0))
        return KINDS[name](images, **shape)


def baseline_from(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Baseline:
    """The network of a run, in eval mode.

    Args:
        content: Its name, and what `Baseline.describe` gave.
        weights: By name.

    Raises:
        KeyError, TypeError, RuntimeError: They do not fit together.
    """
    images = dict(content["images"])
    images["mean"], images["std"] = tuple(images["mean"]), tuple(images["std"])
    with torch.random.fork_rng(devices=[]):
        model = KINDS[content["name"]](ImageSpec(**images), **content["shape"])
    model.to(weights["mean"].dtype)
    model.load_state_dict(dict(weights))
    return model.eval()
