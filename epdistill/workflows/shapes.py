"""A stand-in for a data set where only its shapes matter, as in timing untrained networks."""

from __future__ import annotations

import torch

from epdistill.data import DataSet, Split
from epdistill.errors import RecipeError
from epdistill.recipes import Recipe

# name: (channels, image size, classes), as the official files have them.
SHAPES = {
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    "fashion-mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "svhn": (3, 32, 10),
}


def stand_in(recipe: Recipe, *, images: int = 16) -> DataSet:
    """Uniform noise with the shapes of the recipe's data set.

    Args:
        recipe: Names the data set and the seed.
        images: How many images every split has.

    Raises:
        RecipeError: The shapes of the data set are not known without its files.
    """
    if recipe.data.name not in SHAPES:
        raise RecipeError(
            f"data set {recipe.data.name!r} has no known shape; expected one of {', '.join(SHAPES)}"
        )
    channels, size, classes = SHAPES[recipe.data.name]
    size = recipe.data.image_size or size
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (images, channels, size, size)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    split = Split(noise, torch.arange(images) % classes)
    names = tuple(str(index) for index in range(classes))
    return DataSet(recipe.data.name, names, split, split, split)
