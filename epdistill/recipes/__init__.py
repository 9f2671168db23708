"""Recipes: everything a training depends on, as TOML files checked by pydantic models.

Precedence: recipe file, then environment (`EPDISTILL__TEACHER__EPOCHS=3`), then
flags. The resolved recipe is saved with every run.
"""

from epdistill.recipes.ablation import AblateRecipe
from epdistill.recipes.baselines import (
    EP_CNN,
    MODELS,
    AdversarialRecipe,
    BaselinesRecipe,
    ConvRecipe,
    VitRecipe,
    WcaRecipe,
    section_of,
)
from epdistill.recipes.loading import BUNDLED, load_recipe, recipe_for
from epdistill.recipes.schema import (
    DataRecipe,
    EvaluateRecipe,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
)

__all__ = [
    "BUNDLED",
    "EP_CNN",
    "MODELS",
    "AblateRecipe",
    "AdversarialRecipe",
    "BaselinesRecipe",
    "ConvRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "Recipe",
    "StudentRecipe",
    "TeacherRecipe",
    "VitRecipe",
    "WcaRecipe",
    "load_recipe",
    "recipe_for",
    "section_of",
]
