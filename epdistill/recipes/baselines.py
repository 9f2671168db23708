"""What a recipe may say about the baselines, as `[baselines.bp_cnn]` and so on.

The defaults are the published hyperparameters.
"""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from epdistill.errors import RecipeError
from epdistill.recipes.section import Section

EP_CNN = "ep-cnn"
MODELS = (EP_CNN, "bp-cnn", "adv-cnn", "vit", "wca")


def check_model(name: str) -> str:
    """The name itself, if there is a teacher of that name.

    Raises:
        RecipeError: There is none.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(f"unknown model {name!r}{hint}; expected one of {', '.join(MODELS)}")
    return name


def section_of(model: str) -> str:
    """Where a recipe says how a teacher is trained, as a dotted key."""
    return "teacher" if model == EP_CNN else f"baselines.{model.replace('-', '_')}"


class ConvRecipe(Section):
    """BP-CNN: the layers of `[teacher]` with BatchNorm and ReLU, by SGD (as run beside AdvEP).

    Attributes:
        std_scale: Factor on the images' standard deviation that they are divided by.
        learning_rate: At the start.
        momentum: Of stochastic gradient descent.
        weight_decay: On all parameters.
        step_epochs: Epochs after which the learning rate is multiplied by `step_factor`, again
            and again.
        step_factor: See there.
        batch_size: Images per step.
        epochs: Passes over the training set.
    """

    std_scale: PositiveFloat = 3.0
    learning_rate: PositiveFloat = 0.1
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    step_epochs: PositiveInt = 8
    step_factor: float = Field(default=0.3, gt=0.0, le=1.0)
    batch_size: PositiveInt = 200
    epochs: PositiveInt = 45


class AdversarialRecipe(ConvRecipe):
    """Adv-CNN: the BP-CNN trained on PGD images alone; published with l2 .5, l2 1 and linf 8/255.

    Attributes:
        norm: Of the ball that the images stay in.
        eps: Its radius, on pixels in [0,1].
        steps: PGD steps of 2.5 eps / steps, from the image itself.
    """

    norm: Literal["l2", "linf"] = "l2"
    eps: PositiveFloat = 0.5
    steps: PositiveInt = 20


class VitRecipe(Section):
    """A vision transformer for small images, by Adam.

    Published are patches of 4 pixels and AutoAugment. The rest was not: these are the
    settings of ViT-CIFAR (omihub777), whose requirements it shares.

    Attributes:
        patch: Side of a patch in pixels; less for images under 16 pixels, to keep 4x4 tokens.
        width: Length of a token.
        depth: Number of blocks.
        heads: Of the attention.
        hidden: Width of the perceptrons.
        auto_augment: AutoAugment's policy, after crops and flips.
        label_smoothing: Share of the target that is spread over all classes.
        learning_rate: After the warm-up; falls along a cosine to a hundredth.
        weight_decay: On all parameters, added to the gradient.
        warmup: Share of all steps spent on the linear warm-up.
        batch_size: Images per step.
        epochs: Passes over the training set.
    """

    patch: PositiveInt = 4
    width: PositiveInt = 384
    depth: PositiveInt = 7
    heads: PositiveInt = 12
    hidden: PositiveInt = 384
    auto_augment: Literal["cifar10", "svhn", "none"] = "cifar10"
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    learning_rate: PositiveFloat = 1e-3
    weight_decay: float = Field(default=5e-5, ge=0.0)
    warmup: float = Field(default=0.025, ge=0.0, lt=1.0)
    batch_size: PositiveInt = 128
    epochs: PositiveInt = 200


class WcaRecipe(Section):
    """WCA-Net (Eustratiadis et al., ICML 2021), by Adam; the rate falls tenfold every third.

    Attributes:
        width: Channels of the ResNet-18's first stage.
        features: Length of the features that get the noise; 32 for up to 10 classes and 256
            for more, without it.
        learning_rate: At the start.
        weight_decay: On the classifier's and the noise's matrix alone.
        batch_size: Images per step.
        epochs: Passes over the training set.
    """

    width: PositiveInt = 64
    features: PositiveInt | None = None
    learning_rate: PositiveFloat = 0.01
    weight_decay: float = Field(default=1e-4, ge=0.0)
    batch_size: PositiveInt = 128
    epochs: PositiveInt = 600


class BaselinesRecipe(Section):
    """The rivals, each with its own section.

    Attributes:
        bp_cnn: The EP-CNN's layers as an ordinary network.
        adv_cnn: The same, trained on adversarial images.
        vit: A vision transformer.
        wca: A network that answers at random.
    """

    bp_cnn: ConvRecipe = ConvRecipe()
    adv_cnn: AdversarialRecipe = AdversarialRecipe()
    vit: VitRecipe = VitRecipe()
    wca: WcaRecipe = WcaRecipe()
