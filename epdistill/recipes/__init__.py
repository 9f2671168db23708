"""Recipes: everything a training depends on, as TOML files checked by pydantic models.

Precedence: recipe file, then environment (`EPDISTILL__TEACHER__EPOCHS=3`), then
flags. The resolved recipe is saved with every run.
"""

from epdistill.recipes.loading import BUNDLED, load_recipe
from epdistill.recipes.schema import (
    DataRecipe,
    EvaluateRecipe,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
)

__all__ = [
    "BUNDLED",
    "DataRecipe",
    "EvaluateRecipe",
    "Recipe",
    "StudentRecipe",
    "TeacherRecipe",
    "load_recipe",
]
