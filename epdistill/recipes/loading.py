"""Finding, overriding and checking recipes."""

from __future__ import annotations

import copy
import difflib
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from epdistill.errors import RecipeError
from epdistill.recipes.schema import Recipe
from epdistill.sealed import read_sealed

BUNDLED = (
    "digits",
    "cifar10",
    "cifar100",
    "cifar10-small",
    "cifar10-fast",
    "cifar10-gpu",
    "cifar100-gpu",
    "default",
)
PREFIX = "EPDISTILL__"
RUN_CONFIG = "config.json"


def recipe_for(data: str | None) -> str:
    """The recipe when none is named: one of the data set's own, or the rule from the image size."""
    return "digits" if data in (None, "digits") else "default"


def _read(source: str) -> dict[str, Any]:
    """The content of a bundled recipe, of a TOML file, or of a run's recipe."""
    if source in BUNDLED:
        text = resources.files("epdistill.recipes").joinpath(f"{source}.toml").read_text()
        return {"name": source, **tomllib.loads(text)}
    path = Path(source)
    if (path / RUN_CONFIG).is_file() or path.name == RUN_CONFIG:
        return _of_run(path if path.name == RUN_CONFIG else path / RUN_CONFIG)
    if path.suffix == ".toml" or path.is_file():
        try:
            return {"name": path.stem, **tomllib.loads(path.read_text())}
        except OSError as error:
            raise RecipeError(
                f"recipe file {source} cannot be read ({error.strerror}); expected a TOML file"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {source} is not valid TOML: {error}") from error
    near = difflib.get_close_matches(source, BUNDLED, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise RecipeError(
        f"unknown recipe {source!r}{hint}; expected {', '.join(BUNDLED)}, a .toml file "
        "or a run's folder"
    )


def _of_run(path: Path) -> dict[str, Any]:
    """The resolved recipe that a run was made with."""
    try:
        recipe = read_sealed(path)["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} holds no recipe ({error}); expected a run's folder or its {RUN_CONFIG}"
        ) from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: recipe = {recipe!r}; expected a run's resolved recipe")
    return recipe


def set_key(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of a recipe in place, as `student.epochs`; sections are made where needed.

    Raises:
        RecipeError: A part of the path is a value.
    """
    keys = dotted.split(".")
    for key in keys[:-1]:
        inner = content.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{'.'.join(keys)}: {key} is a value, not a section")
        content = inner
    content[keys[-1]] = value


def with_keys(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with some keys changed, not checked; None values are skipped.

    Another student does not inherit what is one's own.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    changed.setdefault("student", {})
    name = changes.get("student.name")
    if name is not None and name != changed["student"].get("name"):
        # A width, stages and weights belong to the student they were written for.
        for key in ("width", "stages", "pretrained"):
            changed["student"].pop(key, None)
    for dotted, value in changes.items():
        if value is not None:
            set_key(changed, dotted, value)
    return changed


def _parse(text: str) -> Any:
    """An environment value in TOML's notation, or a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys a section of the recipe may have."""
    model: type[BaseModel] = Recipe
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _explain(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"recipe {source}: unknown key {where}{hint}; expected one of {', '.join(known)}"
    expected = first["msg"].removeprefix("Input should be ")
    return f"recipe {source}: {where} = {first['input']!r}; expected {expected}"


def validate(content: Mapping[str, Any], source: str) -> Recipe:
    """Check a recipe's content.

    Raises:
        RecipeError: An unknown key, a wrong type or a value out of range, in one line.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_explain(error, source)) from error


def load_recipe(
    source: str = "digits",
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Recipe:
    """Resolve a recipe.

    Args:
        source: A bundled name, the path of a TOML file, or a run's folder for the recipe that
            it was made with.
        overrides: Flags, as `{"teacher.epochs": 3}`; None values are skipped.
        environment: Variables, as `EPDISTILL__TEACHER__EPOCHS=3`; the process's own without it.

    Raises:
        RecipeError: One line: what was received, what was expected.
    """
    content = _read(source)
    environment = os.environ if environment is None else environment
    for name in sorted(environment):
        if name.startswith(PREFIX):
            dotted = name.removeprefix(PREFIX).lower().replace("__", ".")
            set_key(content, dotted, _parse(environment[name]))
    for dotted, value in (overrides or {}).items():
        if value is not None:
            set_key(content, dotted, value)
    return validate(content, source)
